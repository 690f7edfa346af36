"""Says after each sampling what ran: in the log, and on the node in the browser."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from sage_kernels.block_overrides import BlockLayout
from sage_kernels.coverage import Coverage

from .attention_override import AttentionOverride
from .attention_timing import EARLIER_OVERRIDE, FP16, Timing
from .sentinel import KEPT_IN_FP16

logger = logging.getLogger(__name__)

NEVER_ASKED = "this model never asked for another attention, so this node changed nothing"


class SamplingReport:
    """Wrapper for core's WrappersMP.OUTER_SAMPLE: counts each sampling anew and says what ran.

    Args:
        show: receives the text for the node.
        verbose: log a line per block.
    """

    def __init__(
        self, override: AttentionOverride, layout: BlockLayout, verbose: bool, show: Callable[[str], None] | None = None
    ) -> None:
        self._override = override
        self._layout = layout
        self._verbose = verbose
        self._show = show

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Sample, then report."""
        self._override.start_sampling()
        try:
            return executor(*args, **kwargs)
        finally:
            self._report()

    def _report(self) -> None:
        coverage = self._override.coverage
        blocks = coverage.by_block()
        if not blocks:
            logger.warning("Sage3: %s", NEVER_ASKED)
        else:
            logger.info("Sage3: attention calls by kernel: %s", coverage)
        if self._verbose:
            for block, kernels in blocks.items():
                name = "outside the blocks" if block is None else f"block {self._layout.name(block)}"
                logger.info("Sage3: %s: %s", name, ", ".join(f"{kernel} {calls}" for kernel, calls in kernels.items()))
        if self._show is not None:
            bad_blocks = [self._layout.name(block) for block in sorted(self._override.bad_blocks)]
            self._show(node_text(coverage, self._override.timer.read(), bad_blocks))


def node_text(coverage: Coverage, timing: Timing, bad_blocks: list[str]) -> str:
    """A few lines: calls and seconds per kernel, the reasons of every refusal, the speed-up, blocks that failed."""
    if not coverage.by_kernel():
        return NEVER_ASKED
    reasons = coverage.reasons()
    lines = [
        _kernel_line(kernel, calls, timing.seconds.get(kernel), reasons.get(kernel, {}))
        for kernel, calls in coverage.by_kernel().items()
    ]
    if set(coverage.by_kernel()) - {FP16, EARLIER_OVERRIDE}:
        lines.append(_speed_line(timing))
    lines += [f"block {name} {KEPT_IN_FP16}" for name in bad_blocks]
    return ".\n".join(lines)  # with full stops: Nodes 2.0 shows all in one paragraph


def _kernel_line(kernel: str, calls: int, seconds: float | None, reasons: Mapping[str, int]) -> str:
    took = "" if seconds is None else f" ({_seconds(seconds)})"
    why = "; ".join(reason if count == calls else f"{reason} ({count})" for reason, count in reasons.items())
    return f"{kernel} {calls}{took}" + (f": {why}" if why else "")


def _speed_line(timing: Timing) -> str:
    if timing.speedup is None:
        parts = ["speed-up not measured (verbose measures it)"]
    else:
        parts = [
            f"{timing.speedup:.2f}x the speed of the model's own attention, measured ({timing.compared_calls} calls)"
        ]
    if timing.predicted_speedup is not None:
        parts.append(f"{timing.predicted_speedup:.2f}x predicted ({timing.predicted_calls} calls)")
    if timing.unpredicted is not None:
        parts.append(f"no prediction{' for the rest' if timing.predicted_calls else ''}: {timing.unpredicted}")
    return "; ".join(parts)


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def text_on_node(node_id: str) -> Callable[[str], None]:
    """A function that shows a text on a node in the browser; it does nothing where there is no server."""

    def show(text: str) -> None:
        from server import PromptServer  # noqa: PLC0415  (ComfyUI's; tests import this file without core)

        server = getattr(PromptServer, "instance", None)
        if hasattr(server, "send_progress_text"):
            server.send_progress_text(text, node_id)

    return show
