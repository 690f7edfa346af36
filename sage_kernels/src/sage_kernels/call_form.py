"""What a call's form is: all of its arguments but the tensors' contents and addresses. Calls of one form run alike."""

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from sage_kernels.attention_call import AttentionCall

_ALIGNMENT = 16  # bytes; where an address is no multiple of it, kernels load in another way

_Value = TypeVar("_Value")


class FormCache(Generic[_Value]):
    """What was worked out for the forms that came last; threads may share it.

    Args:
        capacity: forms; beyond it the one that was used least recently is dropped.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[Hashable, _Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, form: Hashable) -> _Value | None:
        """What was put in for a form, or None."""
        value = self._entries.get(form)
        # As long as nothing is about to be dropped it doesn't matter which came last; each call pays for it.
        if value is not None and 2 * len(self._entries) > self._capacity:
            with self._lock:
                if form in self._entries:
                    self._entries.move_to_end(form)
        return value

    def put(self, form: Hashable, value: _Value) -> None:
        """Keep `value` for a form."""
        with self._lock:
            self._entries[form] = value
            self._entries.move_to_end(form)
            if len(self._entries) > self._capacity:
                self._entries.popitem(last=False)

    def __len__(self) -> int:
        return len(self._entries)


def form_of_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    key_lengths: Tensor | None,
    layout: str,
    precision: str,
    return_lse: bool,
    allow_emulation: bool,
) -> Hashable | None:
    """Form of a call of attention(); None where only checking the arguments one by one can tell.

    That is so off the GPU, where nothing is gained, and for what isn't plainly a tensor: tracers, subclasses, mistakes.
    """
    if not (type(q) is type(k) is type(v) is Tensor and q.is_cuda and type(layout) is type(precision) is str):
        return None
    if torch.compiler.is_compiling():
        return None
    try:
        # Written out, and with what is nearly always so put into one entry: every call pays for each of these.
        q_start, k_start, v_start = q.data_ptr(), k.data_ptr(), v.data_ptr()
        misaligned = (q_start | k_start | v_start) % _ALIGNMENT != 0
        wants_gradient = q.requires_grad or k.requires_grad or v.requires_grad
        return (
            q.shape,
            q.stride(),
            q.dtype,
            q.device,
            k.shape,
            k.stride(),
            k.dtype,
            k.device,
            v.shape,
            v.stride(),
            v.dtype,
            v.device,
            (q_start % _ALIGNMENT, k_start % _ALIGNMENT, v_start % _ALIGNMENT) if misaligned else None,
            wants_gradient and torch.is_grad_enabled(),
            # A learned bias wants its gradient too.
            None
            if attn_mask is None
            else (_tensor_form(attn_mask), attn_mask.requires_grad and torch.is_grad_enabled()),
            None if key_lengths is None else _tensor_form(key_lengths),
            None if scale is None else float(scale),
            # bool() takes twice as long.
            True if is_causal else False,  # noqa: SIM210
            True if enable_gqa else False,  # noqa: SIM210
            True if return_lse else False,  # noqa: SIM210
            True if allow_emulation else False,  # noqa: SIM210
            layout,
            precision,
        )
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None


def form_of_call(call: AttentionCall) -> Hashable:
    """Form of a checked call, for kernels that are called without attention()."""
    tensors = (call.query, call.key, call.value, call.attn_mask, call.key_lengths)
    forms = tuple(None if x is None else _tensor_form(x) for x in tensors)
    return (*forms, call.is_causal, call.scale, call.layout, call.return_lse)


def _tensor_form(x: Tensor) -> Hashable:
    return x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % _ALIGNMENT
