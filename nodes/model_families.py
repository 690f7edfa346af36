"""Where each model family keeps its transformer blocks: one row per family.

Block types carry the name that ComfyUI's core gives them in transformer_options["block_type"], where it gives one. The
main blocks come first, in running order, and stacks beside them (refiners, VACE) after, so that the bare numbers of
the main blocks are the same with and without them.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from sage_kernels.block_overrides import BlockId, BlockLayout


@dataclass(frozen=True)
class BlockList:
    """One list of blocks.

    Attributes:
        type: block type of its entries.
        path: attribute path from the diffusion model to a ModuleList or ModuleDict.
        inside: None: the entries are the blocks. Else a class name: the blocks are the `transformer_blocks` of the
            modules of this class among the children of the entries, or of the path itself if that is no list (UNets).
    """

    type: str
    path: str
    inside: str | None = None


@dataclass(frozen=True)
class ModelFamily:
    """A family, recognised by the name of the diffusion model's class or of one of its bases, and by its first list."""

    name: str
    classes: tuple[str, ...]
    lists: tuple[BlockList, ...]


@dataclass(frozen=True)
class FoundBlock:
    """A transformer block of a live model.

    Attributes:
        id: its type and index.
        module: what runs it.
        native_keys: what native_key() gives while core says that this block runs.
    """

    id: BlockId
    module: nn.Module
    native_keys: tuple[Hashable, ...]


_DOUBLE_SINGLE = (BlockList("double", "double_blocks"), BlockList("single", "single_blocks"))
_REFINERS = (
    BlockList("context_refiner", "context_refiner"),
    BlockList("noise_refiner", "noise_refiner"),
    BlockList("ref_image_refiner", "ref_image_refiner"),
    BlockList("siglip_refiner", "siglip_refiner"),
)
_UNET_LAYER = "SpatialTransformer"

FAMILIES = (
    ModelFamily("Flux", ("Flux",), _DOUBLE_SINGLE),
    ModelFamily("Chroma", ("Chroma",), _DOUBLE_SINGLE),
    ModelFamily("HunyuanVideo", ("HunyuanVideo",), _DOUBLE_SINGLE),
    ModelFamily("Hunyuan3D 2", ("Hunyuan3Dv2",), _DOUBLE_SINGLE),
    ModelFamily("JoyImage", ("JoyImageTransformer3DModel",), (BlockList("double", "double_blocks"),)),
    ModelFamily("Wan", ("WanModel",), (BlockList("double", "blocks"), BlockList("vace", "vace_blocks"))),
    ModelFamily(
        "Qwen-Image",
        ("QwenImageTransformer2DModel", "MageFlowTransformer2DModel", "LensTransformer2DModel"),
        (BlockList("double", "transformer_blocks"),),
    ),
    ModelFamily("Lumina 2, Z-Image", ("NextDiT",), (BlockList("double", "layers"), *_REFINERS)),
    ModelFamily("OmniGen 2", ("OmniGen2Transformer2DModel",), (BlockList("double", "layers"), *_REFINERS)),
    ModelFamily("Krea 2", ("SingleStreamDiT",), (BlockList("single", "blocks"),)),
    ModelFamily(
        "Kandinsky 5",
        ("Kandinsky5",),
        (BlockList("double", "visual_transformer_blocks"), BlockList("text", "text_transformer_blocks")),
    ),
    ModelFamily("HiDream O1", ("HiDreamO1Transformer",), (BlockList("double", "language_model.layers"),)),
    ModelFamily(
        "HiDream I1",
        ("HiDreamImageTransformer2DModel",),
        (BlockList("double", "double_stream_blocks"), BlockList("single", "single_stream_blocks")),
    ),
    ModelFamily(
        "Boogu",
        ("BooguTransformer2DModel",),
        (BlockList("double", "double_stream_layers"), BlockList("single", "single_stream_layers"), *_REFINERS),
    ),
    ModelFamily("PixelDiT", ("PixDiT_T2I",), (BlockList("patch", "patch_blocks"), BlockList("pixel", "pixel_blocks"))),
    ModelFamily("Stable Diffusion 3", ("MMDiT",), (BlockList("joint", "joint_blocks"),)),
    ModelFamily("AuraFlow", ("MMDiT",), (BlockList("double", "double_layers"), BlockList("single", "single_layers"))),
    ModelFamily("LTX-Video, LTX-2", ("LTXVModel",), (BlockList("block", "transformer_blocks"),)),
    ModelFamily("ACE-Step", ("ACEStepTransformer2DModel",), (BlockList("block", "transformer_blocks"),)),
    ModelFamily("Cosmos, Cosmos-Predict2", ("GeneralDIT", "MiniTrainDIT"), (BlockList("block", "blocks"),)),
    ModelFamily("Mochi", ("AsymmDiTJoint",), (BlockList("block", "blocks"),)),
    ModelFamily("MiniMax-H3", ("MiniMaxH3Model",), (BlockList("block", "blocks"),)),
    ModelFamily(
        "SD 1.5, SDXL, SVD",
        ("UNetModel",),
        (
            BlockList("input", "input_blocks", _UNET_LAYER),
            BlockList("middle", "middle_block", _UNET_LAYER),
            BlockList("output", "output_blocks", _UNET_LAYER),
        ),
    ),
)

# For classes without a row: models newer than this table mostly keep to these names.
UNLISTED = ModelFamily(
    "unlisted",
    ("Module",),
    (
        *_DOUBLE_SINGLE,
        BlockList("block", "blocks"),
        BlockList("block", "transformer_blocks"),
        BlockList("block", "layers"),
        *_REFINERS,
    ),
)


def find_family(diffusion_model: nn.Module) -> ModelFamily:
    """The row for a model; UNLISTED where there is none."""
    names = _class_names(diffusion_model)
    for family in FAMILIES:
        if names.intersection(family.classes) and _container(diffusion_model, family.lists[0]) is not None:
            return family
    return UNLISTED


def find_blocks(diffusion_model: nn.Module) -> tuple[FoundBlock, ...]:
    """The transformer blocks of a model, in the order of its family's row; () where none are known."""
    # torch.compile's wrapper passes attributes on, but has a class name of its own.
    diffusion_model = getattr(diffusion_model, "_orig_mod", diffusion_model)
    found: list[FoundBlock] = []
    counts: dict[str, int] = {}
    for block_list in find_family(diffusion_model).lists:
        for module, unet_key in _entries(diffusion_model, block_list):
            index = counts.get(block_list.type, 0)
            counts[block_list.type] = index + 1
            keys: tuple[Hashable, ...] = ((block_list.type, index),) if unet_key is None else (unet_key,)
            if len(counts) == 1:
                keys += ((None, index),)  # Cosmos-Predict2 gives the index alone
            found.append(FoundBlock(BlockId(block_list.type, index), module, keys))
    return tuple(found)


def block_layout(blocks: tuple[FoundBlock, ...]) -> BlockLayout:
    """How many blocks of each type there are."""
    counts: dict[str, int] = {}
    for block in blocks:
        counts[block.id.type] = counts.get(block.id.type, 0) + 1
    return BlockLayout(counts)


def native_key(transformer_options: dict[str, Any]) -> Hashable:
    """What core says about the block that is running; None where it says nothing."""
    index = transformer_options.get("block_index")
    if index is None:
        return None
    place = transformer_options.get("block")  # UNets: ("input", 4)
    if place is not None:
        return (*place, index)
    return transformer_options.get("block_type"), index


def _container(diffusion_model: nn.Module, block_list: BlockList) -> Any:
    container: Any = diffusion_model
    for attribute in block_list.path.split("."):
        container = getattr(container, attribute, None)
    return container


def _entries(diffusion_model: nn.Module, block_list: BlockList) -> Iterator[tuple[nn.Module, Hashable]]:
    container = _container(diffusion_model, block_list)
    if container is None:
        return
    if block_list.inside is None:
        for block in container.values() if isinstance(container, nn.ModuleDict) else container:
            yield block, None
        return
    for place, sequence in enumerate(container if isinstance(container, nn.ModuleList) else [container]):
        for layer in sequence:
            if block_list.inside in _class_names(layer):
                for position, block in enumerate(layer.transformer_blocks):
                    yield block, (block_list.type, place, position)


def _class_names(module: nn.Module) -> set[str]:
    return {cls.__name__ for cls in type(module).__mro__}
