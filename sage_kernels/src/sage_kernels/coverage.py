"""Which kernel served how many attention calls of which block, and why calls were left alone. Pure Python."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from threading import Lock

from sage_kernels.block_overrides import BlockId

UNPATCHED = "unpatched"
"""The kernel name of a call that was left to the model's own attention."""


@dataclass(frozen=True)
class CoverageCounts:
    """A snapshot of a Coverage; subtracting an earlier one gives what happened in between.

    Attributes:
        calls: (block, kernel) -> calls; block None is attention outside the model's blocks.
        reasons: why calls were left to the model's own attention -> calls.
    """

    calls: Counter[tuple[BlockId | None, str]] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    def __sub__(self, earlier: "CoverageCounts") -> "CoverageCounts":
        return CoverageCounts(self.calls - earlier.calls, self.reasons - earlier.reasons)

    def by_kernel(self) -> dict[str, int]:
        """Kernel -> calls, the busiest first."""
        totals: Counter[str] = Counter()
        for (_, kernel), count in self.calls.items():
            totals[kernel] += count
        return dict(totals.most_common())

    def by_block(self) -> dict[BlockId | None, dict[str, int]]:
        """Block -> kernel -> calls, in the order in which they first called."""
        blocks: dict[BlockId | None, dict[str, int]] = {}
        for (block, kernel), count in self.calls.items():
            blocks.setdefault(block, {})[kernel] = count
        return blocks

    def __str__(self) -> str:
        kernels = ", ".join(f"{kernel} {count}" for kernel, count in self.by_kernel().items())
        reasons = "; ".join(f"{count} x {reason}" for reason, count in self.reasons.most_common())
        return f"{self.calls.total()} attention calls: {kernels or 'none'}" + (f" ({reasons})" if reasons else "")


class Coverage:
    """Counts attention calls; safe to share between threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._calls: Counter[tuple[BlockId | None, str]] = Counter()
        self._reasons: Counter[str] = Counter()

    def record(self, block: BlockId | None, kernel: str, reasons: Iterable[str] = ()) -> list[str]:
        """Count one call that `kernel` served, and why it wasn't another kernel.

        Returns:
            those of the reasons that were never given before, for the caller to log: each is worth one line, not one
            per call.
        """
        with self._lock:
            self._calls[block, kernel] += 1
            new = []
            for reason in reasons:
                if reason not in self._reasons:
                    new.append(reason)
                self._reasons[reason] += 1
            return new

    def counts(self) -> CoverageCounts:
        """What was counted so far."""
        with self._lock:
            return CoverageCounts(self._calls.copy(), self._reasons.copy())
