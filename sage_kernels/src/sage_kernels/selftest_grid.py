"""The correctness grid of the selftest: small calls of every kind, against the references."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sage_kernels.attention_call import AttentionCall, make_call
from sage_kernels.evidence import Case
from sage_kernels.kernels.interface import Kernel
from sage_kernels.precision import Precision
from sage_kernels.recipes import EXACT, RECIPES, Recipe
from sage_kernels.reference import quantized_attention

KINDS = ("plain", "causal", "bool_mask", "additive_mask", "key_lengths", "gqa", "bnhd", "large")
HEAD_DIMS = (64, 96, 128)
BATCH, HEADS, QUERIES, KEYS = 2, 4, 300, 420
# Relative L1 to the quantised reference: the output's rounding (7e-4 in bf16), and the few values that sums in another
# order carry across a rounding boundary of Q, K, V or P.
REFERENCE_BOUND = 1e-2
# Relative L1 to exact attention: what the reference itself has, and this much more.
EXACT_FACTOR, EXACT_MARGIN = 1.1, 2e-3

Attention = Callable[..., Tensor | tuple[Tensor, Tensor]]


@runtime_checkable
class RecipeKernel(Protocol):
    """A kernel that rounds otherwise than its precision's recipe says."""

    def recipe(self, call: AttentionCall) -> Recipe:
        """What it computes."""


@dataclass(frozen=True)
class GridCall:
    """One call of the grid."""

    kind: str
    head_dim: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """Such as "causal_d128_bfloat16"."""
        return f"{self.kind}_d{self.head_dim}_{str(self.dtype).removeprefix('torch.')}"

    def operands(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, H, Nq, D], key and value [B, Hkv, Nk, D]; with a bias per head, as the keys of models have."""
        generator = torch.Generator().manual_seed(0)
        size = 1000.0 if self.kind == "large" else 1.0

        def tensor(heads: int, length: int, factor: float) -> Tensor:
            x = torch.randn(BATCH, heads, length, self.head_dim, generator=generator)
            bias = torch.randn(BATCH, heads, 1, self.head_dim, generator=generator)
            return ((x + 0.7 * bias) * factor).to(device, self.dtype)

        kv_heads = HEADS // 2 if self.kind == "gqa" else HEADS
        return tensor(HEADS, QUERIES, size), tensor(kv_heads, KEYS, 1 / size), tensor(kv_heads, KEYS, 1.0)

    def options(self, device: torch.device) -> dict[str, Any]:
        """Arguments of attention() that the references take too."""
        generator = torch.Generator().manual_seed(1)
        if self.kind == "causal":
            return {"is_causal": True}
        if self.kind == "bool_mask":
            return {"attn_mask": (torch.rand(BATCH, 1, QUERIES, KEYS, generator=generator) > 0.4).to(device)}
        if self.kind == "additive_mask":
            return {"attn_mask": (torch.rand(HEADS, QUERIES, KEYS, generator=generator) * 6 - 3).to(device)}
        if self.kind == "key_lengths":
            return {"key_lengths": torch.tensor([KEYS, KEYS // 3], dtype=torch.int32, device=device)}
        return {}


def grid() -> Iterator[GridCall]:
    """All calls, each head_dim in both 16-bit types."""
    for (kind, head_dim), dtype in zip(
        itertools.product(KINDS, HEAD_DIMS), itertools.cycle((torch.bfloat16, torch.float16)), strict=False
    ):
        yield GridCall(kind, head_dim, dtype)


def kernel_recipe(kernel: Kernel, call: GridCall, device: torch.device) -> Recipe | None:
    """What `kernel` computes of a call: its own answer where it has one, else its precision's; None at 16 bits."""
    if not isinstance(kernel, RecipeKernel):
        return RECIPES.get(kernel.precision)
    q, k, v = call.operands(device)
    options = call.options(device)
    checked = make_call(
        *(q, k, v, options.get("attn_mask"), options.get("is_causal", False)),
        scale=None,
        enable_gqa=True,
        key_lengths=options.get("key_lengths"),
        layout="BHND",
        precision=kernel.precision,
        return_lse=False,
        allow_emulation=False,
    )
    return kernel.recipe(checked)


def run_call(
    call: GridCall, precision: Precision, attention: Attention, device: torch.device, recipe: Recipe | None = None
) -> list[Case]:
    """Run one call at one precision.

    Args:
        call: of the grid.
        precision: the rung.
        attention: with attention()'s arguments.
        device: where.
        recipe: what the kernel computes; the precision's own where it is None.

    Returns:
        Two cases, against the quantised and the exact reference; at 16 bits, which has no quantised one, the latter.
    """
    q, k, v = call.operands(device)
    options = call.options(device)
    before = [x.clone() for x in (q, k, v)]
    output = _attend(call, attention, (q, k, v), precision, options).float()
    unchanged = all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))
    exact, _ = quantized_attention(q, k, v, EXACT, **options)
    bounds = {"exact": (_relative_l1(output, exact), EXACT_MARGIN * 2)}
    recipe = recipe or RECIPES.get(precision)
    if recipe is not None:
        reference, _ = quantized_attention(q, k, v, recipe, **options)
        limit = EXACT_FACTOR * _relative_l1(reference, exact) + EXACT_MARGIN
        bounds = {"reference": (_relative_l1(output, reference), REFERENCE_BOUND), "exact": (bounds["exact"][0], limit)}
    return [
        Case(f"{precision}/{call.name}/{against}", unchanged and error <= bound, _finite(error), bound)
        for against, (error, bound) in bounds.items()
    ]


def _attend(
    call: GridCall, attention: Attention, qkv: tuple[Tensor, ...], precision: Precision, options: dict[str, Any]
) -> Tensor:
    if call.kind == "bnhd":
        qkv, options = tuple(x.transpose(1, 2) for x in qkv), {**options, "layout": "BNHD"}
    output = attention(*qkv, precision=precision, enable_gqa=call.kind == "gqa", **options)
    assert isinstance(output, Tensor)
    return output.transpose(1, 2) if call.kind == "bnhd" else output


def _relative_l1(output: Tensor, expected: Tensor) -> float:
    return ((output - expected).abs().sum() / expected.abs().sum()).item()


def _finite(error: float) -> float | None:
    return error if error - error == 0 else None
