"""The blocks of a model file, told from its header alone."""

import json
import struct
import sys
from types import ModuleType

import pytest


@pytest.fixture
def route(pack_module):
    return pack_module("layout_route")


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A folder that stands for ComfyUI's diffusion_models; its checkpoints are empty."""
    folder = tmp_path / "diffusion_models"
    folder.mkdir()
    module = ModuleType("folder_paths")

    def get_filename_list(kind):
        names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        return names if kind == "diffusion_models" else []

    module.get_filename_list = get_filename_list
    module.get_full_path = lambda kind, name: str(folder / name)
    monkeypatch.setitem(sys.modules, "folder_paths", module)
    return folder


def safetensors(header, length=None):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content


def tensors(*names):
    return {name: {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]} for name in names}


def blocks(path, count, suffix="weight"):
    return [f"{path}.{index}.{suffix}" for index in range(count)]


UNET = (
    "input_blocks.0.0.weight",
    *blocks("input_blocks.4.1.transformer_blocks", 2),
    *blocks("input_blocks.10.1.transformer_blocks", 1),
    *blocks("middle_block.1.transformer_blocks", 3),
    *blocks("output_blocks.0.1.transformer_blocks", 2),
)
FAMILIES = {
    "Wan": (("head.modulation", *blocks("blocks", 12)), ["0-11"]),
    "Wan VACE": (("head.modulation", *blocks("blocks", 4), *blocks("vace_blocks", 2)), ["double.0-3", "vace.0-1"]),
    "Flux": (
        (
            "img_in.weight",
            "double_blocks.0.img_attn.norm.key_norm.scale",
            *blocks("double_blocks", 3),
            *blocks("single_blocks", 4),
        ),
        ["double.0-2", "single.0-3"],
    ),
    "Chroma": (
        ("distilled_guidance_layer.norms.0.scale", *blocks("double_blocks", 2), *blocks("single_blocks", 2)),
        ["double.0-1", "single.0-1"],
    ),
    "HunyuanVideo": (
        (
            "txt_in.individual_token_refiner.blocks.0.norm1.weight",
            *blocks("double_blocks", 2),
            *blocks("single_blocks", 4),
        ),
        ["double.0-1", "single.0-3"],
    ),
    "Qwen-Image": (("txt_norm.weight", *blocks("transformer_blocks", 60)), ["0-59"]),
    "Lumina 2, Z-Image": (
        (
            "cap_embedder.1.weight",
            "noise_refiner.0.attention.k_norm.weight",
            *blocks("layers", 5),
            *blocks("context_refiner", 2),
        ),
        ["double.0-4", "context_refiner.0-1", "noise_refiner.0"],
    ),
    "LTX-Video, LTX-2": (
        ("patchify_proj.weight", "adaln_single.linear.weight", *blocks("transformer_blocks", 28)),
        ["0-27"],
    ),
    "Cosmos, Cosmos-Predict2": (
        ("blocks.block0.blocks.0.block.attn.to_q.0.weight", "blocks.block1.blocks.0.block.attn.to_q.0.weight"),
        ["0-1"],
    ),
    "SD 1.5, SDXL, SVD": (UNET, ["input.0-2", "middle.0-2", "output.0-1"]),
}


def ranges(layout):
    """The answer's names, neighbours drawn together."""
    types = {}
    for block in layout["blocks"]:
        assert block["index"] == types.setdefault(block["type"], -1) + 1
        types[block["type"]] = block["index"]
    expected = [block["name"] for block in layout["blocks"]]
    single = len(types) == 1
    assert expected == [("" if single else f"{t}.") + str(i) for t, last in types.items() for i in range(last + 1)]
    return [("" if single else f"{t}.") + (f"0-{last}" if last else "0") for t, last in types.items()]


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "net."])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_known_by_its_tensors(route, models, family, prefix):
    names, expected = FAMILIES[family]
    file = models / "model.safetensors"
    file.write_bytes(safetensors(tensors(*(prefix + name for name in names)) | {"__metadata__": {"a": "b"}}))
    layout = route.model_layout("model.safetensors")
    assert family.startswith(layout["family"])
    assert ranges(layout) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "header would be 0 bytes"),
        (safetensors({}, length=3), "header would be 3 bytes"),
        (safetensors({}, length=2**63), "header would be"),
        (safetensors({}, length=1), "header would be 1 bytes"),
        (safetensors(b"[]"), "no JSON object"),
        (safetensors(b"{broken}"), "no JSON"),
        (safetensors(b"\xff\xfe{}"), "no JSON"),
        (safetensors(b"[" * 100_000), "no JSON"),
        (safetensors({}), "of a family"),
        (safetensors(tensors("head.modulation")), "of a family"),
        (safetensors(tensors("encoder.layers.0.weight")), "of a family"),
    ],
    ids=lambda value: repr(value[:24]),
)
def test_a_broken_or_unknown_file_gives_one_line(route, models, content, message):
    (models / "model.safetensors").write_bytes(content)
    with pytest.raises(route.LayoutError, match=message) as caught:
        route.model_layout("model.safetensors")
    assert caught.value.status == 422
    assert "\n" not in str(caught.value)


def test_a_header_above_the_limit_is_not_read(route, models, monkeypatch):
    monkeypatch.setattr(route, "MAX_HEADER_BYTES", 50)
    (models / "model.safetensors").write_bytes(safetensors(tensors("head.modulation", *blocks("blocks", 3))))
    with pytest.raises(route.LayoutError, match="header would be"):
        route.model_layout("model.safetensors")


def test_other_formats_are_refused_unopened(route, models):
    (models / "model.ckpt").write_bytes(safetensors(tensors("head.modulation", *blocks("blocks", 3))))
    with pytest.raises(route.LayoutError, match=r"\.ckpt files"):
        route.model_layout("model.ckpt")


@pytest.mark.parametrize("name", ["../secret.safetensors", "sub/../../secret.safetensors", "/{}", "model"])
def test_only_what_the_loaders_list_is_opened(route, models, name):
    secret = models.parent / "secret.safetensors"
    secret.write_bytes(safetensors(tensors("head.modulation", *blocks("blocks", 3))))
    with pytest.raises(route.LayoutError) as caught:
        route.model_layout(name.format(secret))
    assert caught.value.status == 404
