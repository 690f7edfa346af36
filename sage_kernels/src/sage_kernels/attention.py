"""The public functions: attention, explain, prepare, run."""

import torch
from torch import Tensor

from sage_kernels.attention_call import PreparedAttention
from sage_kernels.attention_operator import attention_node
from sage_kernels.dispatch import Decision
from sage_kernels.kernels import find_kernel
from sage_kernels.planned_attention import attend, decide_attention, in_layout, plan_attention


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_lengths: Tensor | None = None,
    layout: str = "BHND",
    precision: str = "auto",
    return_lse: bool = False,
    allow_emulation: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T * scale + mask) v at the chosen precision.

    Works under torch.compile(fullgraph=True). No input is ever changed.

    Args:
        q: [B, H, Nq, D], or [B, Nq, H, D] with layout="BNHD"; float16, bfloat16 or float32; D 1 to 256; any strides.
            float32 is rounded to bfloat16 by the quantised rungs, and the output is float32.
        k, v: [B, Hkv, Nk, D] in q's layout, dtype and device.
        attn_mask: bool (True: attend) or floating point (added to the scaled scores), broadcastable to [B, H, Nq, Nk].
            Rows that may attend to nothing give zeros from the quantised rungs.
        is_causal: query i sees keys 0..i, aligned at the top left, as in torch. Excludes attn_mask.
        scale: softmax scale; 1 / sqrt(D) when None.
        enable_gqa: allow H to be a multiple of Hkv.
        key_lengths: int32 [B]; keys at and beyond are ignored.
        precision: "auto" (the fastest that the device does well), "fp4", "fp8_fp4", "int8", "int8_fp16" or "fp16".
        return_lse: also return the natural-log LSE of the scaled, masked scores, float32 [B, H, Nq].
        allow_emulation: where the device lacks the precision, compute it slowly in plain PyTorch instead of raising.

    Returns:
        The output in q's shape, layout and dtype; with return_lse a pair (output, lse).

    Raises:
        TypeError, ValueError: bad arguments; the message says what is allowed.
        UnsupportedAttention: nothing here runs this call at this precision; carries every reason.
    """
    options = (attn_mask, is_causal, scale, enable_gqa, key_lengths, layout, precision, return_lse, allow_emulation)
    if torch.compiler.is_compiling() and not _wants_gradient(q, k, v, attn_mask):
        return attention_node(q, k, v, *options)
    result: Tensor | tuple[Tensor, Tensor] = attend(q, k, v, *options)
    return result


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_lengths: Tensor | None = None,
    layout: str = "BHND",
    precision: str = "auto",
    return_lse: bool = False,
    allow_emulation: bool = False,
) -> Decision:
    """Say which kernel attention() would use for these arguments, and why not the others; launches nothing.

    Raises:
        TypeError, ValueError: bad arguments, as attention().
    """
    options = (attn_mask, is_causal, scale, enable_gqa, key_lengths, layout, precision, return_lse, allow_emulation)
    return decide_attention(q, k, v, *options)


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_lengths: Tensor | None = None,
    layout: str = "BHND",
    precision: str = "auto",
    return_lse: bool = False,
    allow_emulation: bool = False,
) -> PreparedAttention:
    """First half of attention(): choose the kernel and quantise.

    After it the caller may free q, k and v: quantised kernels keep none of them.

    Raises:
        TypeError, ValueError, UnsupportedAttention: as attention().
    """
    options = (attn_mask, is_causal, scale, enable_gqa, key_lengths, layout, precision, return_lse, allow_emulation)
    planned = plan_attention(q, k, v, *options)
    return PreparedAttention(planned.kernel, planned.layout, planned.plan.prepare(q, k, v, attn_mask, key_lengths))


def run(prepared: PreparedAttention) -> Tensor | tuple[Tensor, Tensor]:
    """Second half of attention(): compute. Returns what attention() returns."""
    return in_layout(prepared.layout, *find_kernel(prepared.kernel).run(prepared.state))


def _wants_gradient(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> bool:
    wants = q.requires_grad or k.requires_grad or v.requires_grad
    return torch.is_grad_enabled() and (wants or (isinstance(attn_mask, Tensor) and attn_mask.requires_grad))
