"""Transformer blocks are found in every family's layout, with the keys by which core knows them."""

import pytest
from torch import nn

from sage_kernels.block_overrides import BlockId

FAMILIES = [
    # class name, attribute -> number of blocks, layout
    ("Flux", {"double_blocks": 19, "single_blocks": 38}, "double.0-18, single.0-37"),
    ("Chroma", {"double_blocks": 2, "single_blocks": 3}, "double.0-1, single.0-2"),
    ("HunyuanVideo", {"double_blocks": 20, "single_blocks": 40}, "double.0-19, single.0-39"),
    ("WanModel", {"blocks": 30}, "0-29"),
    ("WanModel", {"vace_blocks": 15, "blocks": 30}, "double.0-29, vace.0-14"),
    ("QwenImageTransformer2DModel", {"transformer_blocks": 60}, "0-59"),
    ("NextDiT", {"noise_refiner": 2, "context_refiner": 2, "layers": 30},
     "double.0-29, context_refiner.0-1, noise_refiner.0-1"),
    ("LTXVModel", {"transformer_blocks": 28}, "0-27"),
    ("ACEStepTransformer2DModel", {"transformer_blocks": 24}, "0-23"),
    ("MMDiT", {"joint_blocks": 24}, "0-23"),
    ("MMDiT", {"double_layers": 4, "single_layers": 32}, "double.0-3, single.0-31"),
    ("HiDreamImageTransformer2DModel", {"double_stream_blocks": 16, "single_stream_blocks": 32},
     "double.0-15, single.0-31"),
    ("MiniTrainDIT", {"blocks": 28}, "0-27"),
    ("AsymmDiTJoint", {"blocks": 48}, "0-47"),
    ("NewModelWithoutARow", {"blocks": 4, "single_blocks": 1}, "single.0, block.0-3"),
]  # fmt: skip


@pytest.fixture
def families(pack_module):
    return pack_module("model_families")


def model_of(class_name, lists):
    model = type(class_name, (nn.Module,), {})()
    for attribute, count in lists.items():
        setattr(model, attribute, nn.ModuleList(nn.Identity() for _ in range(count)))
    return model


@pytest.mark.parametrize(("class_name", "lists", "layout"), FAMILIES)
def test_blocks_are_found_in_the_order_of_their_numbers(families, class_name, lists, layout):
    model = model_of(class_name, lists)
    blocks = families.find_blocks(model)
    assert str(families.block_layout(blocks)) == layout
    assert [block.id for block in blocks] == list(families.block_layout(blocks))
    assert {id(block.module) for block in blocks} == {id(block) for name in lists for block in getattr(model, name)}


def test_subclasses_and_compiled_models_are_of_the_family(families):
    flux = model_of("Flux", {"double_blocks": 1, "single_blocks": 1})
    variant = type("FluxVariant", (type(flux),), {})()
    variant.double_blocks, variant.single_blocks = flux.double_blocks, flux.single_blocks
    compiled = nn.Module()
    compiled._orig_mod = variant
    assert families.find_family(variant).name == "Flux"
    assert families.find_blocks(compiled) == families.find_blocks(flux)


def test_blocks_in_a_dictionary_and_further_down_are_found(families):
    cosmos = type("GeneralDIT", (nn.Module,), {})()
    cosmos.blocks = nn.ModuleDict({f"block{index}": nn.Identity() for index in range(12)})
    assert [block.module for block in families.find_blocks(cosmos)] == list(cosmos.blocks.values())
    hidream = type("HiDreamO1Transformer", (nn.Module,), {})()
    hidream.language_model = model_of("Model", {"layers": 2})
    assert str(families.block_layout(families.find_blocks(hidream))) == "0-1"


def test_models_without_known_blocks_have_none(families):
    assert families.find_blocks(nn.Linear(1, 1)) == ()


@pytest.mark.parametrize(
    ("options", "block"),
    [
        ({"block_type": "double", "block_index": 1}, BlockId("double", 1)),
        ({"block_type": "single", "block_index": 1}, BlockId("single", 1)),
        ({"block_index": 1}, BlockId("double", 1)),
        ({"block_type": "single", "block_index": 2}, None),
        ({"block_type": "double"}, None),
        ({}, None),
    ],
)
def test_core_keys_name_the_same_blocks(families, options, block):
    blocks = families.find_blocks(model_of("Flux", {"double_blocks": 2, "single_blocks": 2}))
    assert native_blocks(blocks).get(families.native_key(options)) == block


def native_blocks(blocks):
    return {key: block.id for block in blocks for key in block.native_keys}


class SpatialTransformer(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.transformer_blocks = nn.ModuleList(nn.Identity() for _ in range(depth))


class SpatialVideoTransformer(SpatialTransformer):
    pass


class MotionModule(nn.Module):
    """What other packs put into a UNet while it runs; no block of the model."""

    def __init__(self):
        super().__init__()
        self.transformer_blocks = nn.ModuleList([nn.Identity()])


class UNetModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_blocks = nn.ModuleList(
            [nn.Sequential(nn.Identity()), nn.Sequential(nn.Identity(), SpatialTransformer(2), MotionModule())]
        )
        self.middle_block = nn.Sequential(nn.Identity(), SpatialTransformer(10), nn.Identity())
        self.output_blocks = nn.ModuleList(
            [nn.Sequential(SpatialVideoTransformer(2)), nn.Sequential(SpatialTransformer(1))]
        )


def test_unet_blocks_are_numbered_through_each_part(families):
    unet = UNetModel()
    blocks = families.find_blocks(unet)
    assert str(families.block_layout(blocks)) == "input.0-1, middle.0-9, output.0-2"
    assert blocks[-1].module is unet.output_blocks[1][0].transformer_blocks[0]
    names = native_blocks(blocks)
    assert names[families.native_key({"block": ("input", 1), "block_index": 1})] == BlockId("input", 1)
    assert names[families.native_key({"block": ("middle", 0), "block_index": 9})] == BlockId("middle", 9)
    assert names[families.native_key({"block": ("output", 1), "block_index": 0})] == BlockId("output", 2)
    assert families.native_key({"block": ("output", 1)}) is None
