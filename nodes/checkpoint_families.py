"""Which family a checkpoint file is of and how many blocks it has, by the names of its tensors alone.

The lists of blocks are those of model_families: in these families the tensors are named after the modules.
"""

import re
from collections.abc import Collection, Iterable

from sage_kernels.block_overrides import BlockLayout

from .model_families import FAMILIES, BlockList, ModelFamily

# What the network's tensors are called in files that hold more than the network.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.model.", "net.", "")

# Family and the beginnings of names that only its tensors have, all of them. The first row that fits counts.
MARKERS = (
    ("Stable Diffusion 3", ("joint_blocks.0.context_block.",)),
    ("AuraFlow", ("double_layers.0.attn.w1q.",)),
    ("HunyuanVideo", ("txt_in.individual_token_refiner.",)),
    ("Chroma", ("double_blocks.0.", "distilled_guidance_layer.")),
    ("Hunyuan3D 2", ("double_blocks.0.", "latent_in.")),
    ("Flux", ("double_blocks.0.img_attn.norm.key_norm.", "img_in.")),
    ("Mochi", ("t5_yproj.",)),
    ("MiniMax-H3", ("video_patch_proj.", "audio_patch_proj.")),
    ("LTX-Video, LTX-2", ("patchify_proj.", "adaln_single.")),
    ("ACE-Step", ("genre_embedder.",)),
    ("Lumina 2, Z-Image", ("cap_embedder.1.", "noise_refiner.0.attention.")),
    ("Wan", ("head.modulation",)),
    ("HiDream I1", ("caption_projection.0.linear.", "double_stream_blocks.")),
    ("Cosmos, Cosmos-Predict2", ("blocks.block0.blocks.0.block.attn.",)),
    ("Cosmos, Cosmos-Predict2", ("blocks.0.mlp.layer1.",)),
    ("Boogu", ("double_stream_layers.0.",)),
    ("OmniGen 2", ("time_caption_embed.timestep_embedder.",)),
    ("Qwen-Image", ("txt_norm.", "transformer_blocks.0.")),
    ("Krea 2", ("txtfusion.projector.",)),
    ("Kandinsky 5", ("visual_transformer_blocks.0.",)),
    ("SD 1.5, SDXL, SVD", ("input_blocks.0.0.", "middle_block.")),
)
_FAMILY_BY_NAME = {family.name: family for family in FAMILIES}


def checkpoint_layout(names: Collection[str]) -> tuple[ModelFamily, BlockLayout] | None:
    """The family and the blocks of a checkpoint whose tensors have these names; None where no family fits."""
    for prefix in PREFIXES:
        own = [name[len(prefix) :] for name in names if name.startswith(prefix)]
        family = _find_family(own)
        if family is not None:
            layout = BlockLayout(_count_blocks(own, family.lists))
            return (family, layout) if len(layout) else None
    return None


def _find_family(names: Collection[str]) -> ModelFamily | None:
    wanted = {marker for _, markers in MARKERS for marker in markers}
    found = {marker for marker in wanted if any(name.startswith(marker) for name in names)}
    return next((_FAMILY_BY_NAME[family] for family, markers in MARKERS if found.issuperset(markers)), None)


def _count_blocks(names: Iterable[str], lists: tuple[BlockList, ...]) -> dict[str, int]:
    blocks: dict[str, set[tuple[str, ...]]] = {block_list.type: set() for block_list in lists}
    patterns = [(block_list.type, _block_pattern(block_list)) for block_list in lists]
    for name in names:
        for type_, pattern in patterns:
            match = pattern.match(name)
            if match is not None:
                blocks[type_].add(match.groups())
    return {type_: len(found) for type_, found in blocks.items()}


def _block_pattern(block_list: BlockList) -> re.Pattern[str]:
    path = re.escape(block_list.path)
    if block_list.inside is None:
        return re.compile(rf"{path}\.(?:block)?(\d+)\.")  # Cosmos calls its blocks block0, block1, ...
    return re.compile(rf"{path}((?:\.\d+)+)\.transformer_blocks\.(\d+)\.")
