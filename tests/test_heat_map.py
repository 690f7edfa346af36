"""The picture of a calibration."""

import pytest
import torch


@pytest.fixture
def heat_map(pack_module):
    return pack_module("heat_map")


def draw(heat_map, rows, columns, fp16=()):
    cells = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for cell in fp16:
        mask[cell] = True
    names = [f"double.{row}" for row in range(rows)]
    return heat_map.draw_heat_map(cells, mask, names, "Wan, fp4\nkept in FP16: 0: 1")


def pixels_of(picture, colour):
    return int(((picture[0] * 255).round() == torch.tensor(colour)).all(dim=-1).sum())


def test_it_is_an_image_of_comfyui(heat_map):
    picture = draw(heat_map, 5, 20)
    assert picture.dtype == torch.float32
    assert picture.shape[0] == 1
    assert picture.shape[3] == 3
    assert 0 <= float(picture.min()) < float(picture.max()) <= 1


def test_each_fp16_cell_is_outlined(heat_map):
    outlined = [pixels_of(draw(heat_map, 5, 20, fp16), heat_map.OUTLINE) for fp16 in ([], [(0, 0)], [(0, 0), (4, 19)])]
    assert outlined[1] - outlined[0] == outlined[2] - outlined[1] > 0


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (70, 50), (57, 1000)])
def test_many_blocks_and_steps_still_fit(heat_map, rows, columns):
    _, height, width, _ = draw(heat_map, rows, columns).shape
    assert 200 < height < 1600
    assert 200 < width < columns * 10 + 1400


def test_brighter_is_worse(heat_map):
    levels = heat_map._levels(torch.tensor([[1.0, 0.1, 1e-3, 0.0]]).numpy(), 1.0)
    assert levels.tolist() == [pytest.approx([1.0, 2 / 3, 0.0, 0.0], abs=1e-6)]
    brightness = [sum(heat_map._colour(level)) for level in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert brightness == sorted(brightness)


def test_no_error_at_all_can_be_drawn(heat_map):
    cells = torch.zeros(2, 3, dtype=torch.float64)
    assert heat_map.draw_heat_map(cells, torch.zeros(2, 3, dtype=torch.bool), ["0", "1"], "x").isfinite().all()
