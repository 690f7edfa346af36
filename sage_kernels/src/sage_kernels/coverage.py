"""Which kernel served how many attention calls, block by block, and why the others stepped aside."""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Hashable
from typing import TypeVar

from sage_kernels.block_overrides import BlockId

_LOG = logging.getLogger("sage_kernels")
_Key = tuple[BlockId | None, str, str | None]
_Group = TypeVar("_Group", bound=Hashable)


class Coverage:
    """Counts of one patched model. Safe to write from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: Counter[_Key] = Counter()
        self._logged: set[str] = set()

    def record(self, block: BlockId | None, kernel: str, reason: str | None = None) -> None:
        """Count one call by `kernel`; `reason` says why it was not a faster one. Each reason is logged once."""
        with self._lock:
            self._calls[block, kernel, reason] += 1
            first = reason is not None and reason not in self._logged
            if reason is not None:
                self._logged.add(reason)
        if first:
            _LOG.info("attention by %s: %s", kernel, reason)

    def reset(self) -> None:
        """Forget all counts, for a new run."""
        with self._lock:
            self._calls.clear()

    def by_kernel(self) -> dict[str, int]:
        """Calls per kernel, most first."""
        return dict(self._total(lambda key: key[1]).most_common())

    def by_block(self) -> dict[BlockId | None, dict[str, int]]:
        """Calls per block and kernel; None is attention outside the blocks."""
        blocks: dict[BlockId | None, dict[str, int]] = {}
        for (block, kernel), count in self._total(lambda key: (key[0], key[1])).items():
            blocks.setdefault(block, {})[kernel] = count
        return blocks

    def reasons(self) -> dict[str, dict[str, int]]:
        """Per kernel, how often each reason sent a call to it."""
        reasons: dict[str, dict[str, int]] = {}
        for (kernel, reason), count in self._total(lambda key: (key[1], key[2])).most_common():
            if reason is not None:
                reasons.setdefault(kernel, {})[reason] = count
        return reasons

    def __str__(self) -> str:
        reasons = self.reasons()
        parts = []
        for kernel, calls in self.by_kernel().items():
            why = ", ".join(f"{reason} ({count})" for reason, count in reasons.get(kernel, {}).items())
            parts.append(f"{kernel} {calls}" + (f": {why}" if why else ""))
        return "; ".join(parts) or "no attention calls yet"

    def _total(self, group: Callable[[_Key], _Group]) -> "Counter[_Group]":
        totals: Counter[_Group] = Counter()
        with self._lock:
            for key, count in self._calls.items():
                totals[group(key)] += count
        return totals
