"""attention() as opaque nodes of compiled graphs: torch.ops.sage_kernels.attention and .attention_with_lse.

Registered with the dispatcher itself: torch.library.custom_op wraps a function in three more of Python for each call.
Two operators, because a result that isn't wanted costs a tensor.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sage_kernels.attention_call import make_call
from sage_kernels.planned_attention import attend

_ARGUMENTS = (
    "(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, bool is_causal, float? scale, bool enable_gqa,"
    " Tensor? key_lengths, str layout, str precision, bool allow_emulation)"
)


def attention_node(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor | tuple[Tensor, Tensor]:
    """attention() as one node of the graph that is being compiled; `options` in the order of make_call()."""
    *others, return_lse, allow_emulation = options
    operators = torch.ops.sage_kernels
    operator = operators.attention_with_lse if return_lse else operators.attention
    result: Tensor | tuple[Tensor, Tensor] = operator(q, k, v, *others, allow_emulation)
    return result


def _attention(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
    output: Tensor = attend(q, k, v, *_with_lse(False, options))
    return output.contiguous()


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
    make_call(q, k, v, *_with_lse(False, options))
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _attention_with_lse(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    output, lse = attend(q, k, v, *_with_lse(True, options))
    return output.contiguous(), lse


def _attention_with_lse_fake(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    call = make_call(q, k, v, *_with_lse(True, options))
    lse = q.new_empty((call.batch, call.heads, call.query_length), dtype=torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


def _with_lse(return_lse: bool, options: Sequence[Any]) -> tuple[Any, ...]:
    """All options in the order of make_call(), of those that the operators take."""
    *others, allow_emulation = options
    return (*others, return_lse, allow_emulation)


def _register() -> Any:
    """The library, as long as which lives the operators do."""
    make_library: Any = torch.library.Library  # has no type annotations
    library = make_library("sage_kernels", "DEF")
    for name, results, function, fake in (
        ("attention", "Tensor", _attention, _attention_fake),
        ("attention_with_lse", "(Tensor, Tensor)", _attention_with_lse, _attention_with_lse_fake),
    ):
        library.define(f"{name}{_ARGUMENTS} -> {results}", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"sage_kernels::{name}", fake, lib=library)
    return library


_LIBRARY = _register()
