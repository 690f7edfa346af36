"""The demo model's configuration, and its one weights file in the original Wan layout.

ComfyUI detects and loads that file as it is; here its keys are renamed for diffusers' WanTransformer3DModel. The
configuration is the one that ComfyUI infers or fixes for a Wan 2.1 text-to-video model of this width.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .atomic_file import replacing
from .conditioning import TEXT_DIM
from .latents import LATENT_CHANNELS

DEFAULT_WEIGHTS = Path(__file__).parent / "model" / "wan_digits_fp16.safetensors"
NUM_BLOCKS = 5

# (Wan prefix, diffusers prefix). In a block, Wan's norm3 is the affine norm before cross-attention: diffusers' norm2.
_TOP_LEVEL = (
    ("patch_embedding.", "patch_embedding."),
    ("text_embedding.0.", "condition_embedder.text_embedder.linear_1."),
    ("text_embedding.2.", "condition_embedder.text_embedder.linear_2."),
    ("time_embedding.0.", "condition_embedder.time_embedder.linear_1."),
    ("time_embedding.2.", "condition_embedder.time_embedder.linear_2."),
    ("time_projection.1.", "condition_embedder.time_proj."),
    ("head.head.", "proj_out."),
    ("head.modulation", "scale_shift_table"),
)
_IN_BLOCK = (
    ("modulation", "scale_shift_table"),
    ("norm3.", "norm2."),
    ("ffn.0.", "ffn.net.0.proj."),
    ("ffn.2.", "ffn.net.2."),
    *(
        (f"{wan_attn}.{wan_part}.", f"{attn}.{part}.")
        for wan_attn, attn in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for wan_part, part in (
            ("q", "to_q"),
            ("k", "to_k"),
            ("v", "to_v"),
            ("o", "to_out.0"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
        )
    ),
)
_BLOCK_KEY = re.compile(r"(blocks\.\d+\.)(.+)")


class CheckpointError(ValueError):
    """A weights file or state dict that the demo model can't use; the message is one line."""


def build_transformer() -> WanTransformer3DModel:
    """The demo model with random fp32 weights: 2 heads of 128, 16 latent channels, patch (1, 2, 2)."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=128,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=256,
        ffn_dim=1024,
        num_layers=NUM_BLOCKS,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=1e-6,
    )


def wan_key(diffusers_key: str) -> str:
    """Name in the original Wan layout of a diffusers parameter. Raises CheckpointError for an unknown name."""
    return _rename(diffusers_key, source=1)


def diffusers_key(wan_key: str) -> str:
    """Name in diffusers of a parameter of the original Wan layout. Raises CheckpointError for an unknown name."""
    return _rename(wan_key, source=0)


def save_wan_checkpoint(
    transformer: WanTransformer3DModel, path: str | os.PathLike[str], metadata: Mapping[str, str]
) -> None:
    """Write the weights in fp16 and Wan layout, atomically. Raises CheckpointError if a weight isn't finite."""
    tensors = {}
    for key, value in transformer.state_dict().items():
        tensors[wan_key(key)] = half = value.detach().to("cpu", torch.float16).contiguous()
        if not half.isfinite().all():
            raise CheckpointError(f"{key} is not finite in fp16; the weights were not written")
    with replacing(Path(path)) as partial:
        save_file(tensors, partial, metadata={"format": "pt", **metadata})


def load_transformer(
    path: str | os.PathLike[str] = DEFAULT_WEIGHTS,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> WanTransformer3DModel:
    """Load the demo model from a file in Wan layout, in eval mode on `device` in `dtype`.

    Raises:
        CheckpointError: no such file, a damaged file, missing or unexpected tensors, or a wrong shape.
    """
    try:
        wan_tensors = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"no weights file at {path}; check the path or restore the file from the repository"
        ) from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({error}); restore it") from None
    transformer = build_transformer()
    expected = {wan_key(key): value.shape for key, value in transformer.state_dict().items()}
    _check_tensors(path, {key: value.shape for key, value in wan_tensors.items()}, expected)
    transformer.load_state_dict({diffusers_key(key): value for key, value in wan_tensors.items()})
    # Parameters only: the RoPE tables are buffers and stay float32, as in ComfyUI.
    for parameter in transformer.parameters():
        parameter.data = parameter.data.to(dtype)
    return transformer.to(device).eval().requires_grad_(False)


def _check_tensors(
    path: str | os.PathLike[str], found: Mapping[str, torch.Size], expected: Mapping[str, torch.Size]
) -> None:
    for complaint, keys in (("lacks", expected.keys() - found.keys()), ("has unknown", found.keys() - expected.keys())):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise CheckpointError(f"{path} {complaint} tensor {min(keys)}{more}; it must be the demo model's file")
    for key, shape in expected.items():
        if found[key] != shape:
            raise CheckpointError(f"{path}: {key} must have shape {list(shape)}, got {list(found[key])}")


def _rename(key: str, source: int) -> str:
    in_block = _BLOCK_KEY.fullmatch(key)
    block, name, table = (*in_block.groups(), _IN_BLOCK) if in_block else ("", key, _TOP_LEVEL)
    for row in table:
        if name.startswith(row[source]):
            return block + row[1 - source] + name.removeprefix(row[source])
    raise CheckpointError(f"no parameter of the demo model is called {key}")
