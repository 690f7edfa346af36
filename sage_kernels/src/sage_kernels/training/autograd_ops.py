"""Forward and backward pass as two operators of torch.library, tied together by autograd.

Tensors are [B, H, N, D] in 16 bits. `emulate` chooses the plain PyTorch reference, which runs on any device.
"""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from sage_kernels.kernels.tensor_layout import empty_output
from sage_kernels.training import reference, triton_backend
from sage_kernels.training.recipe import RECIPES
from sage_kernels.training.refusals import require_kernels
from sage_kernels.training.saved import Saved

_SAVED = (
    "Tensor lse, Tensor query, Tensor query_scales, Tensor key, Tensor key_scales, Tensor key_transposed, "
    "Tensor channel_scales, Tensor key_16bit, Tensor value_scales"
)
_SAVED_TENSORS = len(fields(Saved))
_OPTIONS = "bool is_causal, float scale, str layout, str precision, bool emulate"
_FORWARD = f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor output, {_SAVED})"
_TENSORS = f"Tensor d_output, Tensor? q, Tensor? k, Tensor v, Tensor output, {_SAVED}"
_BACKWARD = f"({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)"
_NO_SECOND_DERIVATIVE = (
    "trainable_attention has no second derivative: its backward pass can't be differentiated (create_graph=True). "
    "Use torch.nn.functional.scaled_dot_product_attention with the math backend there."
)


@torch.library.custom_op("sage_kernels::trainable_attention", mutates_args=(), schema=_FORWARD)
def attend(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float, layout: str, precision: str, emulate: bool
) -> tuple[Tensor, ...]:
    """Output, laid out in memory as `layout` says, and what the backward pass needs; that is empty where emulated."""
    output = _empty_output(q, layout)
    if emulate:
        with torch.autocast(q.device.type, enabled=False):
            saved = reference.forward(q, k, v, RECIPES[precision], is_causal=is_causal, scale=scale)
        output.copy_(saved.output)
        return output, *_nothing(q)
    require_kernels(q.device, q.shape[3], precision)
    saved_codes = triton_backend.forward(q, k, v, output, is_causal, scale, precision)
    return output, *_as_integers(saved_codes)


@attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float, layout: str, precision: str, emulate: bool
) -> Any:
    saved = (
        _nothing(q)
        if emulate
        else _as_integers(triton_backend.empty_saved(q, k, precision, triton_backend.in_cuda(q, precision)))
    )
    return _empty_output(q, layout), *saved


@torch.library.custom_op("sage_kernels::trainable_attention_backward", mutates_args=(), schema=_BACKWARD)
def differentiate(
    d_output: Tensor, q: Tensor | None, k: Tensor | None, v: Tensor, output: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK and dV, contiguous, in the dtype of v; q and k are given where emulated, q where key_16bit is."""
    saved, (is_causal, scale, _, precision, emulate) = rest[:_SAVED_TENSORS], rest[_SAVED_TENSORS:]
    if not emulate:
        dtype = triton_backend.CODES[precision]
        codes = Saved(*(x.view(dtype) if x.dtype == torch.int8 else x for x in saved))
        return triton_backend.backward(d_output, q, v, output, codes, is_causal, scale, precision)
    assert q is not None
    assert k is not None
    with torch.autocast(v.device.type, enabled=False):
        again = reference.forward(q, k, v, RECIPES[precision], is_causal=is_causal, scale=scale)
        d_query, d_key, d_value = reference.backward(again, d_output, RECIPES[precision])
    return d_query.to(v.dtype), d_key.to(v.dtype), d_value.to(v.dtype)


@differentiate.register_fake
def _(d_output: Tensor, q: Tensor | None, k: Tensor | None, v: Tensor, output: Tensor, *rest: Any) -> Any:
    return output.new_empty(output.shape), v.new_empty(v.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, *options = inputs
    emulate = options[-1]
    ctx.set_materialize_grads(False)
    ctx.options = options
    needs_query = emulate or Saved(*output[1:]).key_16bit.dim() > 1  # empty ones have one axis
    ctx.save_for_backward(q if needs_query else None, k if emulate else None, v, *output)


def _backward(ctx: Any, d_output: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    none = (None,) * 5
    if d_output is None:
        return None, None, None, *none
    return *differentiate(d_output, *ctx.saved_tensors, *ctx.options), *none


def _refuse(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    raise RuntimeError(_NO_SECOND_DERIVATIVE)


attend.register_autograd(_backward, setup_context=_save)
differentiate.register_autograd(_refuse)


def _empty_output(q: Tensor, layout: str) -> Tensor:
    batch, heads, rows, head_dim = q.shape
    return empty_output((batch, heads, rows, head_dim), layout, q.dtype, q.device)


def _nothing(q: Tensor) -> tuple[Tensor, ...]:
    return tuple(q.new_empty(0, dtype=torch.float32) for _ in range(_SAVED_TENSORS))


def _as_integers(saved: Saved) -> tuple[Tensor, ...]:
    """Its tensors; codes as integers, because autograd takes FP8 for something that has gradients."""
    return tuple(x.view(torch.int8) if x.dtype == torch.float8_e4m3fn else x for x in vars(saved).values())
