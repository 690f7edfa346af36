"""ComfyUI's calling conventions of attention, read into one form that sage_kernels takes.

optimized_attention(q, k, v, heads, mask, attn_precision, skip_reshape, skip_output_reshape, **kwargs), any of the last
five by keyword. q, k, v are [B, N, H * D], or [B, H, N, D] with skip_reshape; core also takes k and v as [B, N, H, D]
without it, and Stable Diffusion 3 gives v so. The output is [B, Nq, H * D], or [B, H, Nq, D] with skip_output_reshape.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_POSITIONAL = ("q", "k", "v", "heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape")
_KNOWN = {*_POSITIONAL, "scale", "enable_gqa", "low_precision_attention", "transformer_options", "_inside_attn_wrapper"}


@dataclass(frozen=True)
class OutputForm:
    """How the model wants the result: kept apart from the tensors, so that those can be freed first."""

    layout: str
    flatten_heads: bool

    def apply(self, output: Tensor) -> Tensor:
        """From [B, Nq, H, D] (layout "BNHD") or [B, H, Nq, D] to what the model expects."""
        if self.flatten_heads:
            return (output if self.layout == "BNHD" else output.transpose(1, 2)).flatten(2)
        return output.transpose(1, 2) if self.layout == "BNHD" else output


@dataclass(frozen=True, eq=False)
class AttentionArguments:
    """One attention call in the terms of sage_kernels.attention.

    Attributes:
        query, key, value: views of the model's tensors, [B, N, H, D] or [B, H, N, D] as `output_form.layout` says.
        attn_mask: with 4 axes, or None.
        scale: None for 1 / sqrt(D).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    scale: float | None
    enable_gqa: bool
    output_form: OutputForm

    @property
    def query_tokens(self) -> int:
        """Nq."""
        return self.query.shape[1 if self.output_form.layout == "BNHD" else 2]

    @property
    def key_tokens(self) -> int:
        """Nk."""
        return self.key.shape[1 if self.output_form.layout == "BNHD" else 2]

    def for_kernels(self) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
        """Positional and keyword arguments of sage_kernels.attention, but for the precision."""
        options = {
            "attn_mask": self.attn_mask,
            "scale": self.scale,
            "enable_gqa": self.enable_gqa,
            "layout": self.output_form.layout,
        }
        return (self.query, self.key, self.value), options


def read_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> AttentionArguments | str:
    """The call in one form, or why it must be left to the model's own attention.

    Args:
        args: positional arguments, q, k and v among them as tensors.
        kwargs: keyword arguments as core passes them.
    """
    if len(args) > len(_POSITIONAL):
        return f"more than {len(_POSITIONAL)} positional arguments"
    call = dict(zip(_POSITIONAL, args, strict=False)) | kwargs
    refusal = _request_refusal(call) or _shape_refusal(call)
    if refusal is not None:
        return refusal
    q, k, v = call["q"], call["k"], call["v"]
    layout = "BHND" if call.get("skip_reshape", False) else "BNHD"
    if layout == "BNHD":
        head_dim = q.shape[-1] // call["heads"]
        q, k, v = (tensor if tensor.ndim == 4 else tensor.unflatten(-1, (-1, head_dim)) for tensor in (q, k, v))
    mask = call.get("mask")
    if mask is not None:
        mask = mask[None, None] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
    form = OutputForm(layout, flatten_heads=not call.get("skip_output_reshape", False))
    return AttentionArguments(q, k, v, mask, call.get("scale"), bool(call.get("enable_gqa", False)), form)


def _request_refusal(call: Mapping[str, Any]) -> str | None:
    """What the model asks for that no kernel gives."""
    if not _KNOWN.issuperset(call):
        return f"unknown arguments: {', '.join(sorted(set(call) - _KNOWN))}"
    if not {"q", "k", "v", "heads"}.issubset(call):
        return "q, k, v or heads is missing"
    if call.get("low_precision_attention", True) is False:
        return "the model asks for full precision here (low_precision_attention)"
    if call.get("attn_precision") == torch.float32:
        return "the model asks for float32 attention here (attn_precision)"
    if torch.is_grad_enabled() and any(call[name].requires_grad for name in "qkv"):
        return "gradients are wanted"
    return None


def _shape_refusal(call: Mapping[str, Any]) -> str | None:
    """Shapes that can't be viewed as heads; whether those fit together is for sage_kernels to say."""
    q, k, v, heads, mask = call["q"], call["k"], call["v"], call["heads"], call.get("mask")
    if mask is not None and not 2 <= mask.ndim <= 4:
        return f"a mask with {mask.ndim} axes"
    if call.get("skip_reshape", False):
        return None if q.ndim == 4 and q.shape[1] == heads else "q is not [B, heads, N, D]"
    if q.ndim != 3 or not {k.ndim, v.ndim} <= {3, 4} or q.shape[-1] % heads:
        return "q, k and v are not [B, N, heads * D]"
    head_dim = q.shape[-1] // heads
    return "k and v don't have q's head_dim" if k.shape[-1] % head_dim or v.shape[-1] % head_dim else None
