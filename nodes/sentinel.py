"""Notices non-finite numbers that low precision brought into a model, and computes that evaluation again in 16 bit.

Nothing waits for the GPU in an attention call. Each watched call leaves one number on the device, the sum of its
output, which is non-finite if anything in it is; an evaluation of the model reads them all at once when it is over,
before the sampler sees its result. The model's own output is read after every evaluation, so that nothing non-finite
passes; single calls are watched on the first evaluations of a sampling, on every few after, and where that is bad.
"""

import logging
import threading
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sage_kernels.block_overrides import BlockId, BlockLayout

logger = logging.getLogger(__name__)

WATCHED_AT_FIRST = 2
WATCHED_EVERY = 8

RECOMPUTED = "recomputed in FP16 after a non-finite result"
KEPT_IN_FP16 = "gave non-finite numbers in low precision, so the block stays in FP16"
_CONTROL_ARGUMENT = 4  # of apply_model(x, t, c_concat, c_crossattn, control, transformer_options)


@dataclass
class EvaluationWatch:
    """What the attention calls of one evaluation of the model leave for the sentinel.

    Attributes:
        in_fp16: no kernel may take a call.
        sees_calls: whether each call's output is summed.
        kernel_calls: how many calls kernels took.
    """

    in_fp16: bool = False
    sees_calls: bool = False
    kernel_calls: int = 0
    _sums: list[tuple[BlockId | None, Tensor]] = field(default_factory=list)

    def record(self, block: BlockId | None, output: Tensor, *, by_kernel: bool) -> None:
        """Note one attention output; doesn't wait for the device."""
        self.kernel_calls += by_kernel
        if self.sees_calls:
            # float32: finite float16 numbers can't overflow in it. A sum needs no temporary, unlike isfinite().
            self._sums.append((block, output.detach().sum(dtype=torch.float32)))

    def bad_calls(self) -> list[BlockId | None]:
        """Blocks of the calls with non-finite outputs, in running order. Waits for the device once."""
        if not self._sums:
            return []
        device = self._sums[-1][1].device
        finite = torch.stack([total.to(device) for _, total in self._sums]).isfinite().tolist()
        return [block for (block, _), good in zip(self._sums, finite, strict=True) if not good]


_watch: ContextVar[EvaluationWatch | None] = ContextVar("sage3_evaluation_watch", default=None)


def current_watch() -> EvaluationWatch | None:
    """The watch over the evaluation that is running in this thread."""
    return _watch.get()


class Sentinel:
    """Wrapper for core's WrappersMP.APPLY_MODEL. It belongs to one patched model and remembers its bad blocks.

    Safe to run in several threads.
    """

    def __init__(self, layout: BlockLayout) -> None:
        self._layout = layout
        self._lock = threading.Lock()
        self._evaluations = 0
        self._off = False
        self._warned = False
        self.bad_blocks: frozenset[BlockId] = frozenset()

    def start(self) -> None:
        """A sampling begins."""
        with self._lock:
            self._evaluations = 0
            self._off = False

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the model; again in 16 bit where the result, or an attention in it, is non-finite."""
        if self._off:
            return executor(*args, **kwargs)
        watch = EvaluationWatch(sees_calls=self._is_watched())
        result = _evaluate(watch, executor, args, kwargs)
        if watch.kernel_calls == 0:
            return result
        bad, result_is_bad = watch.bad_calls(), not _is_finite(result)
        if result_is_bad and not watch.sees_calls:
            watch = EvaluationWatch(sees_calls=True)
            _evaluate(watch, executor, args, kwargs)
            bad = watch.bad_calls()
        if not bad and not result_is_bad:
            return result
        again = EvaluationWatch(in_fp16=True, sees_calls=True)
        result = _evaluate(again, executor, args, kwargs)
        self._judge(bad, again.bad_calls(), fp16_is_bad=not _is_finite(result))
        return result

    def _is_watched(self) -> bool:
        with self._lock:
            number = self._evaluations
            self._evaluations += 1
        return number < WATCHED_AT_FIRST or number % WATCHED_EVERY == 0

    def _judge(self, bad: Sequence[BlockId | None], bad_in_fp16: Sequence[BlockId | None], fp16_is_bad: bool) -> None:
        """Keep the block where it began in FP16; what 16 bit gives as well is not low precision's fault."""
        if fp16_is_bad or (bad and bad[0] in bad_in_fp16):
            self._off = True
            logger.warning(
                "Sage3: this model gives non-finite numbers in 16 bit too, so low precision is not the cause; "
                "not looked for again in this sampling"
            )
        elif bad and bad[0] is not None:  # the blocks after it only passed on what it gave
            with self._lock:
                known, self.bad_blocks = bad[0] in self.bad_blocks, self.bad_blocks | {bad[0]}
            if not known:
                logger.warning(
                    "Sage3: block %s %s; the step was computed again in FP16", self._layout.name(bad[0]), KEPT_IN_FP16
                )
        elif not self._warned:
            self._warned = True
            logger.warning(
                "Sage3: low precision made the model's output non-finite, and no block can be named for it; such steps "
                "are computed again in FP16"
            )


def _evaluate(watch: EvaluationWatch, executor: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    token = _watch.set(watch)
    try:
        return executor(*_with_own_control(args), **_with_own_control(kwargs))
    finally:
        _watch.reset(token)


def _with_own_control(arguments: Any) -> Any:
    """The arguments with a copy of the ControlNet outputs: UNets take them off their lists as they use them."""
    key = "control" if isinstance(arguments, dict) else _CONTROL_ARGUMENT
    control = arguments.get(key) if isinstance(arguments, dict) else arguments[key] if len(arguments) > key else None
    if not isinstance(control, dict):
        return arguments
    own = {name: list(outputs) if isinstance(outputs, list) else outputs for name, outputs in control.items()}
    if isinstance(arguments, dict):
        return {**arguments, key: own}
    return (*arguments[:key], own, *arguments[key + 1 :])


def _is_finite(result: Any) -> bool:
    return not isinstance(result, Tensor) or bool(result.detach().sum(dtype=torch.float32).isfinite())
