"""Attention errors inside the running model: every block at every step, and the ablation of smoothing and formats."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from sage_kernels.block_overrides import BlockId
from sage_kernels.diffusers import AttentionRouter, SdpaCall
from sage_kernels.recipes import RECIPES, SAGE_ATTENTION_3, Recipe
from sage_kernels.reference import attention_fp32, quantized_attention

from .comparison import tensor_errors

# The rows of the paper's two ablations: what is smoothed with everything in FP4, and which operands are in FP4.
ABLATION: dict[tuple[str, str, str], Recipe] = {
    ("none", "fp4", "fp4"): replace(SAGE_ATTENTION_3, smooth_q_rows=0, smooth_k=False),
    ("k", "fp4", "fp4"): replace(SAGE_ATTENTION_3, smooth_q_rows=0),
    ("q", "fp4", "fp4"): replace(SAGE_ATTENTION_3, smooth_k=False),
    ("q+k", "fp4", "fp4"): SAGE_ATTENTION_3,
    ("q+k", "fp4", "fp32"): replace(SAGE_ATTENTION_3, pv="none"),
    ("q+k", "fp32", "fp4"): replace(SAGE_ATTENTION_3, qk="none", smooth_q_rows=0),
    ("q+k+v", "fp4", "fp4"): RECIPES["fp4"],
}


class ShadowAttention:
    """Context manager: the model computes in 16 bit, while every self-attention is also computed in FP4 and compared.

    Attributes:
        errors: relative L1 of the attention output, by (block, step), in the order of the calls.
        captured: (block, step) -> the query, key and value [B, H, N, D] of the steps asked for.
    """

    def __init__(self, transformer: nn.Module, capture_steps: tuple[int, ...] = ()) -> None:
        self.errors: dict[tuple[BlockId, int], float] = {}
        self.captured: dict[tuple[BlockId, int], tuple[Tensor, Tensor, Tensor]] = {}
        self._capture_steps = capture_steps
        self._step = -1
        self._transformer = transformer

    def __enter__(self) -> "ShadowAttention":
        self._router = AttentionRouter(self._transformer, self._attend, self._next_step)
        return self

    def __exit__(self, *_: object) -> None:
        self._router.remove()

    def _next_step(self, _arguments: object) -> None:
        self._step += 1

    def _attend(self, block: BlockId | None, call: SdpaCall) -> Tensor:
        output = call.default()
        if block is not None and call.query.shape[2] == call.key.shape[2]:
            operands = (call.query.bfloat16(), call.key.bfloat16(), call.value.bfloat16())
            quantized, _ = quantized_attention(*operands, RECIPES["fp4"], scale=call.scale)
            self.errors[block, self._step] = tensor_errors(quantized, output)["l1"]
            if self._step in self._capture_steps:
                self.captured[block, self._step] = (call.query, call.key, call.value)
        return output


def removed_energy(captured: dict[tuple[BlockId, int], tuple[Tensor, Tensor, Tensor]]) -> dict[str, float]:
    """Share of the squared size of Q, K and V that the means hold which smoothing subtracts: what it can gain."""
    removed = {"q": 0.0, "k": 0.0, "v": 0.0}
    total = dict.fromkeys(removed, 0.0)
    for query, key, value in captured.values():
        blocks = query.split(SAGE_ATTENTION_3.smooth_q_rows, dim=2)
        removed["q"] += sum(float(x.mean(dim=2).square().sum()) * x.shape[2] for x in blocks)
        removed["k"] += float(key.mean(dim=2).square().sum()) * key.shape[2]
        removed["v"] += float(value.mean(dim=2).square().sum()) * value.shape[2]
        for name, x in (("q", query), ("k", key), ("v", value)):
            total[name] += float(x.square().sum())
    return {name: removed[name] / total[name] for name in removed}


def ablate(captured: dict[tuple[BlockId, int], tuple[Tensor, Tensor, Tensor]]) -> Iterator[dict[str, str | float]]:
    """One row per recipe, errors against exact attention over all captured tensors together; yields as it computes."""
    exact = [attention_fp32(*operands)[0] for operands in captured.values()]
    for (smoothing, qk, pv), recipe in ABLATION.items():
        outputs = [quantized_attention(*operands, recipe)[0] for operands in captured.values()]
        errors = tensor_errors(torch.cat([x.flatten() for x in outputs]), torch.cat([x.flatten() for x in exact]))
        yield {"smoothing": smoothing, "qk": qk, "pv": pv, **errors}
