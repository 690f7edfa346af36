"""What a kernel file provides."""

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from sage_kernels.architectures import Architecture
from sage_kernels.attention_call import AttentionCall
from sage_kernels.precision import Precision


class Plan(Protocol):
    """How calls that differ only in their tensors' contents are computed. Holds no tensors."""

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, key_lengths: Tensor | None) -> Any:
        """As Kernel.prepare(), of the tensors that attention() was given; q, k and v in the caller's layout."""

    def run(self, state: Any) -> tuple[Tensor, Tensor | None]:
        """As Kernel.run()."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, key_lengths: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """run() of prepare(); what cheaper way there is."""


class Kernel(Protocol):
    """One way to compute attention at one precision."""

    @property
    def name(self) -> str:
        """Unique; what explain() and the coverage counts show."""

    @property
    def precision(self) -> Precision:
        """The rung that it serves."""

    @property
    def emulated(self) -> bool:
        """Whether it is a slow stand-in that a caller must ask for (allow_emulation)."""

    def refuse(self, call: AttentionCall, architecture: Architecture | None) -> str | None:
        """Why this kernel can't do the call, in plain words, or None when it can. Cheap: no launch, no sync.

        architecture is None on devices that are no CUDA GPU.
        """

    def prepare(self, call: AttentionCall) -> Any:
        """Quantise. The result must not hold the caller's key and value where the kernel doesn't need them."""

    def run(self, state: Any) -> tuple[Tensor, Tensor | None]:
        """Output [B, H, Nq, D] in the query's dtype, and LSE float32 [B, H, Nq] where the call wants it."""


@runtime_checkable
class PlanningKernel(Kernel, Protocol):
    """A kernel that works out once what all calls of one form share."""

    def plan(self, call: AttentionCall) -> Plan:
        """The plan of all calls of `call`'s form; it keeps none of its tensors."""
