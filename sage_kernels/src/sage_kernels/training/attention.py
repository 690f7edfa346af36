"""trainable_attention, and the checks before it."""

import torch
from torch import Tensor

from sage_kernels.attention_call import make_call
from sage_kernels.training import autograd_ops  # registers torch.ops.sage_kernels.trainable_attention
from sage_kernels.training.recipe import RECIPES
from sage_kernels.training.refusals import require_kernels


def trainable_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    layout: str = "BHND",
    precision: str = "int8",
) -> Tensor:
    """softmax(q k^T * scale) v in 8 bits, with gradients in 8 bits (SageBwd: SageAttention3, section 4).

    All matmuls of forward and backward pass but dO V^T multiply INT8 (or FP8) numbers; in CUDA (below) P^T dO, dS^T Q
    and dS K are in 16 bits, too, which is faster there and more accurate. Results are bit-identical from run to run.
    Works under torch.compile(fullgraph=True), autocast (float32 inputs are rounded to its dtype, as by torch's own
    attention), gradient checkpointing, DDP and FSDP. There is no second derivative. No input is changed.

    For the backward pass it keeps Q in 8 bits, K twice in 8 bits, V, the output and the LSE; in CUDA also Q, and K in 8
    and 16 bits. INT8 is CUDA on Hopper GPUs where head_dim is a multiple of 8 beyond 32, in Triton otherwise.

    Args:
        q: [B, H, Nq, D], or [B, Nq, H, D] with layout="BNHD"; float16, bfloat16 or float32; D 1 to 128, any strides.
            float32 is rounded to bfloat16; output and gradients are float32.
        k, v: [B, Hkv, Nk, D] in q's layout, dtype and device.
        is_causal: query i sees keys 0..i, aligned at the top left, as in torch.
        scale: softmax scale; 1 / sqrt(D) when None.
        enable_gqa: allow H to be a multiple of Hkv. Gradients of K and V are summed over a group in float32.
        precision: "int8", or "fp8" (E4M3) for comparison: it is less accurate.

    Returns:
        The output in q's shape, layout and dtype.

    Raises:
        TypeError, ValueError: bad arguments; the message says what is allowed.
        UnsupportedAttention: no kernel here can do it; carries the reasons.
    """
    return _attention(q, k, v, is_causal, scale, enable_gqa, layout, precision, emulate=False)


def emulated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    layout: str = "BHND",
    precision: str = "int8",
) -> Tensor:
    """What trainable_attention() computes, in plain PyTorch on any device: for experiments and tests.

    Slow, and takes memory for whole score matrices; arguments, gradients and errors are those of trainable_attention().
    """
    return _attention(q, k, v, is_causal, scale, enable_gqa, layout, precision, emulate=True)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    layout: str,
    precision: str,
    emulate: bool,
) -> Tensor:
    if precision not in RECIPES:
        raise ValueError(f"precision must be one of {', '.join(RECIPES)}, got {precision!r}")
    if isinstance(q, Tensor) and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in (q, k, v))
    call = make_call(q, k, v, None, is_causal, scale, enable_gqa, None, layout, "auto", False, False)
    if not emulate and not torch.compiler.is_compiling():  # in compiled graphs the operator asks when it runs
        require_kernels(call.device, call.head_dim, precision)
    operands = (call.query, call.key, call.value)
    if q.dtype == torch.float32:
        operands = (call.query.bfloat16(), call.key.bfloat16(), call.value.bfloat16())
    results = autograd_ops.attend(*operands, call.is_causal, call.scale, layout, precision, emulate)
    output: Tensor = results[0].to(q.dtype)
    return output.transpose(1, 2) if layout == "BNHD" else output
