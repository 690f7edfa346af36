"""Which rung is fastest at a size, preparation included: by measured times, else by a careful rule.

router_table.json has the times, one entry per architecture:
`python sage_kernels/benchmarks/tune_router.py` measures them on the GPU at hand.
"""

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from sage_kernels.architectures import Architecture
from sage_kernels.attention_call import AttentionCall
from sage_kernels.precision import Precision

TABLE = Path(__file__).with_name("router_table.json")
SIXTEEN_BIT_METHODS = ("sdpa_flash", "sdpa_cudnn", "sdpa_efficient")
HEAD_DIM_CLASSES = (64, 128, 256)
MaskClass = Literal["none", "aligned", "odd"]
_ALIGNED_KEYS = 8  # 16 bytes of bfloat16
# What a quantised rung must gain on 16 bit: what is measured as a tie may be a loss in the next run.
_LEAST_GAIN = 1.02
# On architectures without any measured times: tokens from which on a rung is taken to be faster. Preparation costs a
# share of the attention that falls with the length. At 4096 tokens the public 8-bit packages still lose to cuDNN in 16
# bit on an H100; at twice that the share is half. FP4 tensor cores do four times the work of 8-bit ones.
UNMEASURED_LENGTH: dict[Precision, int] = {"fp4": 2048, "fp8_fp4": 2048, "int8": 8192, "int8_fp16": 8192}
_UNMEASURED_HEADS = 24  # with so many heads such a length fills any GPU


@dataclass(frozen=True)
class _Times:
    """Times of one shape class.

    Attributes:
        heads: batch times heads.
        lengths: of queries and keys, ascending.
        costs: by method, seconds for each score at each length.
    """

    heads: int
    lengths: tuple[int, ...]
    costs: dict[str, tuple[float, ...]]


def predicted_seconds(call: AttentionCall, architecture: Architecture | None, method: str) -> float | None:
    """Seconds of a whole call, preparation included; None where nothing of the kind was measured.

    Args:
        call: what is to be computed.
        architecture: of the call's device.
        method: name of a kernel, or one of SIXTEEN_BIT_METHODS.
    """
    times = _times_of(call, architecture)
    if times is None or method not in times.costs:
        return None
    length = _effective_length(call, times.heads)
    if length < times.lengths[0]:
        return None
    scores = call.batch * call.heads * call.query_length * call.key_length
    return _interpolate(length, times.lengths, times.costs[method]) * scores


def fastest_sixteen_bit(call: AttentionCall, architecture: Architecture | None) -> tuple[str, float] | None:
    """The fastest of torch's own kernels and its seconds; None where nothing was measured."""
    seconds = {method: predicted_seconds(call, architecture, method) for method in SIXTEEN_BIT_METHODS}
    known = {method: value for method, value in seconds.items() if value is not None}
    return min(known.items(), key=lambda item: item[1]) if known else None


def slower_than_sixteen_bit(
    call: AttentionCall, architecture: Architecture | None, kernel: str, precision: Precision
) -> str | None:
    """Why 16 bit is taken to serve this call faster than `kernel`, in plain words, or None."""
    sixteen_bit = fastest_sixteen_bit(call, architecture)
    seconds = predicted_seconds(call, architecture, kernel)
    if sixteen_bit is not None and seconds is not None:
        if seconds * _LEAST_GAIN <= sixteen_bit[1]:
            return None
        return f"at this size {sixteen_bit[0]} in 16 bit was measured to be as fast or faster"
    if architecture is not None and architecture.name in {key[0] for key in _load(TABLE)}:
        return f"not measured on {architecture.name} at this size and head_dim; 16 bit is taken to be faster"
    least = UNMEASURED_LENGTH[precision]
    if _effective_length(call, _UNMEASURED_HEADS) >= least:
        return None
    return f"not measured at this size; 16 bit is taken to be faster below {least} tokens of {_UNMEASURED_HEADS} heads"


def _times_of(call: AttentionCall, architecture: Architecture | None) -> _Times | None:
    if architecture is None:
        return None
    head_dim = next(size for size in HEAD_DIM_CLASSES if call.head_dim <= size)
    return _load(TABLE).get((architecture.name, head_dim, call.is_causal, mask_class(call.attn_mask, call.key_length)))


def mask_class(mask: Tensor | None, key_length: int) -> MaskClass:
    """Masks whose rows are no multiple of 16 bytes as torch's kernels take them, in 16 bits, cost them a copy."""
    if mask is None:
        return "none"
    return "odd" if key_length % _ALIGNED_KEYS else "aligned"


def _effective_length(call: AttentionCall, heads: int) -> float:
    """The length at which `heads` heads have no more keys to a row, and no more rows in all, than the call has.

    Preparation pays by the keys that each row meets, and a GPU is filled by rows.
    """
    return min(call.key_length, call.query_length * call.batch * call.heads / heads)


def _interpolate(length: float, lengths: tuple[int, ...], costs: tuple[float, ...]) -> float:
    """Between two lengths along a straight line of the logarithms; beyond the last one as there."""
    if length >= lengths[-1]:
        return costs[-1]
    upper = next(index for index, each in enumerate(lengths) if each > length)
    part = math.log(length / lengths[upper - 1]) / math.log(lengths[upper] / lengths[upper - 1])
    return float(costs[upper - 1] * (costs[upper] / costs[upper - 1]) ** part)


@lru_cache
def _load(path: Path) -> dict[tuple[str, int, bool, str], _Times]:
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {
        (architecture, row["head_dim"], row["is_causal"], row["mask"]): _read_row(row)
        for architecture, entry in table.items()
        for row in entry["rows"]
    }


def _read_row(row: dict[str, Any]) -> _Times:
    scores = [row["heads"] * length**2 for length in row["lengths"]]
    costs = {
        name: tuple(ms / 1000 / count for ms, count in zip(times, scores, strict=True))
        for name, times in row["ms"].items()
    }
    return _Times(row["heads"], tuple(row["lengths"]), costs)
