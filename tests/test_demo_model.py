"""The demo model: latents, conditioning, weights file and sampler."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def transformer(demo):
    return demo("wan_checkpoint").load_transformer()


@pytest.fixture(scope="module")
def wan_tensors(demo):
    return load_file(demo("wan_checkpoint").DEFAULT_WEIGHTS)


def test_decode_inverts_encode(demo):
    pixels = torch.rand(2, 1, 3, 16, 24) * 2 - 1
    latents = demo("latents").encode(pixels)
    assert latents.shape == (2, 16, 3, 4, 6)
    torch.testing.assert_close(demo("latents").decode(latents), pixels, rtol=0, atol=1e-6)


def test_a_latent_cell_holds_the_16_pixels_of_its_4x4_patch(demo):
    pixels = torch.zeros(1, 1, 2, 8, 8)
    pixels[0, 0, 1, 4:, :4] = 1.0
    cells = demo("latents").encode(pixels)[0, :, 1]
    lit = cells == cells.max()
    assert lit[:, 1, 0].all()
    assert lit.sum() == 16


@pytest.mark.parametrize("shape", [(1, 8, 128, 128), (1, 3, 8, 128, 128), (1, 1, 8, 126, 128)])
def test_encode_names_the_wrong_shape(demo, shape):
    with pytest.raises(ValueError, match=r"pixels must be \[B, 1, T, H, W\]"):
        demo("latents").encode(torch.zeros(shape))


@pytest.mark.parametrize("function", ["decode", "from_wan21_latent", "to_wan21_latent"])
def test_latents_with_other_channels_are_refused(demo, function):
    with pytest.raises(ValueError, match=r"latents must be \[B, 16, T, h, w\]"):
        getattr(demo("latents"), function)(torch.zeros(1, 4, 8, 32, 32))


def test_wan21_normalisation_round_trips_and_has_the_published_first_channel(demo):
    latents = torch.randn(1, 16, 2, 4, 4)
    comfy = demo("latents").to_wan21_latent(latents)
    torch.testing.assert_close(comfy[:, 0], latents[:, 0] * 2.8184 - 0.7571)
    torch.testing.assert_close(demo("latents").from_wan21_latent(comfy), latents, rtol=1e-5, atol=1e-5)


def _solid_glyphs(demo, count: int, side_px: int) -> torch.Tensor:
    """Filled squares in place of digits, so that the tests need no scikit-learn."""
    margin = (demo("moving_digits").GLYPH_PX - side_px) // 2
    return torch.nn.functional.pad(torch.ones(count, 1, side_px, side_px), [margin] * 4)


def test_rendered_latents_have_mean_zero_and_std_one(demo):
    # 35 px: the area of a mean digit.
    clips = demo("moving_digits").render_clips(_solid_glyphs(demo, 64, 35), torch.arange(64) % 8)
    latents = demo("latents").encode(clips)
    assert latents.mean().abs() < 0.05
    assert (latents.std() - 1).abs() < 0.05


@pytest.mark.parametrize("direction", range(8))
def test_the_digit_moves_6_px_a_frame_in_its_direction_and_stays_inside(demo, direction):
    clips = demo("moving_digits").render_clips(_solid_glyphs(demo, 32, 64), torch.full((32,), direction))
    lit = ((clips.squeeze(1) + 1) / 2 - 0.5).clamp(min=0)
    assert not lit[:, :, [0, -1]].any()
    assert not lit[:, :, :, [0, -1]].any()
    mass = lit.sum((2, 3))
    pixel = torch.arange(lit.shape[-1], dtype=torch.float32)
    centres = torch.stack([(lit.sum(axis) * pixel).sum(-1) / mass for axis in (2, 3)], dim=-1)
    angle = math.radians(45 * direction)
    step = torch.tensor([6 * math.cos(angle), 6 * math.sin(angle)])
    assert ((centres[:, -1] - centres[:, 0]) / 7 - step).abs().max() < 0.05


def test_conditioning_is_deterministic_and_distinct_for_all_80_pairs(demo):
    conditioning = demo("conditioning").conditioning
    contexts = torch.stack([conditioning(digit, direction) for digit in range(10) for direction in range(8)])
    assert contexts.shape == (80, 8, 4096)
    assert contexts.dtype == torch.float32
    assert torch.equal(contexts[11], conditioning(1, 3))
    assert len(contexts.flatten(1).unique(dim=0)) == 80
    assert len(contexts[0].unique(dim=0)) == 8


@pytest.mark.parametrize(("digit", "direction", "message"), [(10, 0, "digit must be 0..9"), (3, 8, r"0..7 \(right")])
def test_conditioning_names_what_is_allowed(demo, digit, direction, message):
    with pytest.raises(ValueError, match=message):
        demo("conditioning").conditioning(digit, direction)


def test_key_names_map_one_to_one(demo, transformer, wan_tensors):
    checkpoint = demo("wan_checkpoint")
    keys = list(transformer.state_dict())
    wan_keys = [checkpoint.wan_key(key) for key in keys]
    assert set(wan_keys) == set(wan_tensors)
    assert len(set(wan_keys)) == len(keys)
    assert [checkpoint.diffusers_key(key) for key in wan_keys] == keys


@pytest.mark.parametrize("key", ["blocks.0.attn3.to_q.weight", "norm_out.weight", "blocks.x.norm2.weight"])
def test_an_unknown_key_is_refused(demo, key):
    with pytest.raises(demo("wan_checkpoint").CheckpointError, match="no parameter of the demo model is called"):
        demo("wan_checkpoint").wan_key(key)


def test_the_weights_file_is_fp16_below_16_mb(demo, wan_tensors):
    assert {value.dtype for value in wan_tensors.values()} == {torch.float16}
    assert demo("wan_checkpoint").DEFAULT_WEIGHTS.stat().st_size < 16_000_000


def test_saving_what_was_loaded_gives_the_same_tensors(demo, transformer, wan_tensors, tmp_path):
    path = tmp_path / "again.safetensors"
    demo("wan_checkpoint").save_wan_checkpoint(transformer, path, {"seed": "0"})
    again = load_file(path)
    assert again.keys() == wan_tensors.keys()
    assert all(torch.equal(again[key], value) for key, value in wan_tensors.items())
    assert [file.name for file in tmp_path.iterdir()] == ["again.safetensors"]


def _without_a_tensor(tensors):
    del tensors["blocks.2.ffn.0.bias"]


def _with_an_extra_tensor(tensors):
    tensors["img_emb.emb_pos"] = torch.zeros(1)


def _with_a_wrong_shape(tensors):
    tensors["head.modulation"] = torch.zeros(1, 2, 128)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_a_tensor, r"lacks tensor blocks\.2\.ffn\.0\.bias"),
        (_with_an_extra_tensor, r"unknown tensor img_emb\.emb_pos"),
        (_with_a_wrong_shape, r"head\.modulation must have shape \[1, 2, 256\], got \[1, 2, 128\]"),
    ],
)
def test_a_foreign_weights_file_is_refused_in_one_line(demo, wan_tensors, tmp_path, damage, message):
    tensors = dict(wan_tensors)
    damage(tensors)
    path = tmp_path / "foreign.safetensors"
    save_file(tensors, path)
    with pytest.raises(demo("wan_checkpoint").CheckpointError, match=message) as caught:
        demo("wan_checkpoint").load_transformer(path)
    assert "\n" not in str(caught.value)


def test_a_truncated_weights_file_is_refused_in_one_line(demo, tmp_path):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(demo("wan_checkpoint").DEFAULT_WEIGHTS.read_bytes()[:100_000])
    with pytest.raises(demo("wan_checkpoint").CheckpointError, match="not a readable safetensors file") as caught:
        demo("wan_checkpoint").load_transformer(path)
    assert "\n" not in str(caught.value)


def test_a_missing_weights_file_is_named(demo, tmp_path):
    with pytest.raises(demo("wan_checkpoint").CheckpointError, match=r"no weights file at .*none"):
        demo("wan_checkpoint").load_transformer(tmp_path / "none.safetensors")


# As ComfyUI 0.33's calculate_sigmas gives them for `simple` and ModelSamplingSD3.
@pytest.mark.parametrize(
    ("steps", "shift", "expected"),
    [
        (4, 3.0, [1.0, 0.9, 0.75, 0.5, 0.0]),
        (3, 8.0, [1.0, 0.94125944, 0.80047935, 0.0]),
    ],
)
def test_sigmas_are_those_of_the_simple_scheduler(demo, steps, shift, expected):
    torch.testing.assert_close(demo("sampling").simple_sigmas(steps, shift), torch.tensor(expected), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("steps", "shift"), [(0, 3.0), (1001, 3.0), (20, 0.0), (20, float("nan"))])
def test_bad_sampling_settings_are_refused(demo, steps, shift):
    with pytest.raises(ValueError, match="must be"):
        demo("sampling").simple_sigmas(steps, shift)


def test_a_context_of_another_width_is_refused(demo, transformer):
    with pytest.raises(ValueError, match=r"context must be \[L, 4096\]"):
        demo("sampling").sample(transformer, torch.zeros(8, 768), seed=0)


def test_sampling_depends_on_the_seed_alone_and_reports_each_step(demo, transformer):
    context = demo("conditioning").conditioning(3, 2)
    steps_seen = []

    def draw(seed: int) -> torch.Tensor:
        return demo("sampling").sample(
            transformer, context, seed=seed, steps=2, on_step=lambda step, _: steps_seen.append(step)
        )

    first = draw(7)
    torch.rand(3)
    assert first.shape == (1, 16, 8, 32, 32)
    assert torch.equal(draw(7), first)
    assert not torch.equal(draw(8), first)
    assert steps_seen == [1, 2] * 3


def test_an_interrupt_leaves_the_sampler(demo, transformer):
    def interrupt(step: int, latents: torch.Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo("sampling").sample(transformer, demo("conditioning").conditioning(0, 0), seed=0, on_step=interrupt)
