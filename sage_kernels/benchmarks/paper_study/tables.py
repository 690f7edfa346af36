"""The tables that compare attention outputs: which methods, and the errors of each on every tensor set."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from paper_study import methods
from paper_study.methods import OURS, PUBLISHED, UNSMOOTHED, Method, by_recipe
from paper_study.tensor_sets import Case, TensorSet
from sage_kernels.recipes import EXACT, RECIPES, SAGE_ATTENTION_3, Recipe
from sage_kernels.reference import attention_fp32

FULL_SMOOTHING = replace(SAGE_ATTENTION_3, smooth_v=True)


def all_tables() -> dict[str, list[Method]]:
    """Rows by table; the names of rows that the paper has are those in `published`."""
    return {
        "smoothing": [
            by_recipe("none", UNSMOOTHED),
            by_recipe("SmoothQuant", UNSMOOTHED, methods.smooth_quant),
            by_recipe("Hadamard", UNSMOOTHED, methods.rotate),
            by_recipe("smooth Q", replace(PUBLISHED, smooth_k=False)),
            by_recipe("smooth K", replace(PUBLISHED, smooth_q_rows=0)),
            by_recipe("smooth Q and K (SageAttention3)", PUBLISHED),
            by_recipe("ours: smooth Q (rows of 32), K and V", OURS),
        ],
        "precisions": [
            by_recipe("P, V in FP4", replace(PUBLISHED, qk="none", smooth_q_rows=0)),
            by_recipe("Q, K in FP4", replace(PUBLISHED, pv="none")),
            Method("P, V in INT8", methods.int8_pv),
            by_recipe("Q, K in INT8", replace(RECIPES["int8"], pv="none")),
            by_recipe("all FP4 (SageAttention3)", PUBLISHED),
            by_recipe(
                "Q, K INT8, P, V FP8 (SageAttention2)",
                Recipe("int8", "fp8", quantized_row_sum=False),
            ),
            by_recipe("ours: fp4", OURS),
            by_recipe("ours: fp8_fp4", RECIPES["fp8_fp4"]),
            by_recipe("ours: int8", RECIPES["int8"]),
            by_recipe("ours: int8_fp16", RECIPES["int8_fp16"]),
        ],
        "two_level": [
            by_recipe("direct", replace(PUBLISHED, two_level=False)),
            by_recipe("two-level (SageAttention3)", PUBLISHED),
            by_recipe("direct, smooth V", replace(FULL_SMOOTHING, two_level=False)),
            by_recipe("two-level, smooth V", FULL_SMOOTHING),
            by_recipe("two-level less 3 powers of two, smooth V", replace(FULL_SMOOTHING, rescale_threshold=3.0)),
        ],
        "trade_off": [
            by_recipe("FlashAttention2", EXACT),
            by_recipe("FlashAttention3 (16bit)", EXACT),
            by_recipe("SageAttention1", Recipe("int8", "fp16", int8_rows=(128, 64))),
            by_recipe("SageAttention2 (8bit)", Recipe("int8", "fp8", quantized_row_sum=False)),
            Method("FlashAttention3 (8bit)", methods.fp8_tensor_scales),
            by_recipe("SageAttention3 (4bit)", PUBLISHED),
            by_recipe("ours: int8_fp16", RECIPES["int8_fp16"]),
            by_recipe("ours: int8", RECIPES["int8"]),
            by_recipe("ours: fp8_fp4", RECIPES["fp8_fp4"]),
            by_recipe("ours: fp4", OURS),
        ],
        "caches": [
            Method("QServe", methods.qserve_cache),
            Method("Atom", methods.atom_cache),
            Method("QuaRot", methods.quarot_cache),
            by_recipe("SageAttention3", PUBLISHED),
            by_recipe("ours: fp4 attention", OURS),
            Method("ours: FP4 cache, groups of 16", methods.our_cache(16)),
            Method("ours: FP4 cache, groups of 32", methods.our_cache(32)),
            Method("ours: FP4 cache, groups of 16, keys not rotated", methods.our_cache(16, rotate_keys=False)),
        ],
        "ideas": list(ideas()),
    }


def ideas() -> Iterator[Method]:
    """Changes one after the other from the published method to ours, then single changes of ours."""
    yield by_recipe("SageAttention3 as published", PUBLISHED)
    recipe = replace(PUBLISHED, rounded_divisor=True)
    yield by_recipe("+ P divided by the rounded scale", recipe)
    yield by_recipe("row sum of quantised P (without V mean removal)", SAGE_ATTENTION_3)
    yield by_recipe("+ V mean removed", replace(recipe, smooth_v=True))
    yield by_recipe("+ row sum of quantised P", FULL_SMOOTHING)
    for rows in (64, 32, 16):
        yield by_recipe(f"+ {rows} rows per Q mean, exact delta_s", replace(FULL_SMOOTHING, smooth_q_rows=rows))
    quantized = replace(FULL_SMOOTHING, smooth_q_rows=32, quantized_delta=True)
    yield by_recipe("+ 32 rows, delta_s from FP4 digits", quantized)
    yield by_recipe("+ headroom of 3 powers of two, steps of 32 keys", replace(quantized, key_block=32,
                                                                                 rescale_threshold=3.0))  # fmt: skip
    yield by_recipe("+ 3 of 8 exponentials by a line", replace(OURS, four_over_six=""))
    for operand in "VK":
        yield by_recipe(f"that + four over six for {operand} alone", replace(OURS, four_over_six=operand.lower()))
    yield by_recipe("+ four over six for K, V = ours (fp4)", OURS)
    yield by_recipe("ours with the row sum of P before rounding", replace(OURS, quantized_row_sum=False))
    yield by_recipe("ours + the mean that rounded V lacks", replace(OURS, recenter_v=True))
    yield by_recipe("ours + four over six for Q", replace(OURS, four_over_six="qkv"))
    yield by_recipe("ours + four over six for Q, P", replace(OURS, four_over_six="qkvp"))
    yield by_recipe("ours + rotation after smoothing", OURS, methods.rotate)
    yield by_recipe("ours + four over six for Q + rotation", replace(OURS, four_over_six="qkv"), methods.rotate)
    yield by_recipe("ours with 16 rows per Q mean", replace(OURS, smooth_q_rows=16))
    yield by_recipe("ours with 64 rows per Q mean", replace(OURS, smooth_q_rows=64))
    for rank in (4, 16):
        yield Method(f"rank {rank} of the means of 128 rows, exact delta_s", methods.low_rank_means(rank))
    yield by_recipe("fp8_fp4 (Q, K in MXFP8)", RECIPES["fp8_fp4"])
    yield by_recipe("fp8_fp4 without four over six for V", replace(RECIPES["fp8_fp4"], four_over_six=""))
    yield by_recipe("fp8_fp4 + rotation after smoothing", RECIPES["fp8_fp4"], methods.rotate)
    for rows in (0, 128, 32):
        label = f"{rows} rows per Q mean, exact delta_s" if rows else "no smooth Q"
        recipe = Recipe("mxfp8", "nvfp4", smooth_q_rows=rows, smooth_v=True, four_over_six="v")
        yield by_recipe(f"Q, K in MXFP8, {label}", recipe)
    yield by_recipe("Q, K in FP4 as ours, P, V in FP8", replace(OURS, pv="fp8", linear_exp_of_8=0))


class Measurer:
    """Errors of methods on one tensor set against exact attention; a method that two tables share runs once."""

    def __init__(self, tensors: TensorSet) -> None:
        self._tensors = tensors
        self._exact = [attention_fp32(case.q, case.k, case.v)[0] for case in tensors.cases]
        self._known: dict[str, dict[str, float]] = {}

    def row(self, table: str, method: Method) -> dict[str, Any]:
        """Means of the errors over all layers and inputs."""
        key = method.name if table in ("ideas", "caches") else f"{table}/{method.name}"
        if key not in self._known:
            found = [
                errors(call(case, method), exact) for case, exact in zip(self._tensors.cases, self._exact, strict=True)
            ]
            self._known[key] = {name: torch.cat([x[name] for x in found]).mean().item() for name in found[0]}
        return {"table": table, "set": self._tensors.name, "method": method.name, **self._known[key]}


def call(case: Case, method: Method) -> Tensor:
    """The output of one case in float32."""
    return method.call(case.q, case.k, case.v).float()


def errors(output: Tensor, exact: Tensor) -> dict[str, Tensor]:
    """The paper's measures of each flattened output [B]; RMSE also relative, since outputs differ in size."""
    a, b = output.flatten(1).double(), exact.flatten(1).double()
    difference = a - b
    rmse = difference.square().mean(1).sqrt()
    return {
        "cosine": torch.nn.functional.cosine_similarity(a, b, dim=1),
        "rel_l1": difference.abs().sum(1) / b.abs().sum(1),
        "rmse": rmse,
        "relative_rmse": rmse / b.square().mean(1).sqrt(),
    }
