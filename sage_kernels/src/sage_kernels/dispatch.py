"""Choice of the kernel for one call, with the reason of every kernel that was passed over."""

from collections.abc import Sequence
from dataclasses import dataclass

from sage_kernels.architectures import Architecture, device_architecture
from sage_kernels.attention_call import AttentionCall
from sage_kernels.kernels import KERNELS
from sage_kernels.kernels.interface import Kernel
from sage_kernels.precision import DESCRIPTIONS, PRECISIONS, Precision
from sage_kernels.router import fastest_sixteen_bit, predicted_seconds, slower_than_sixteen_bit

_ADVICE = "Use precision='auto' for the best that can, or allow_emulation=True to compute it slowly."
NEVER_RUN = "compiled for this GPU, never run on one: its tests ran on another GPU"


@dataclass(frozen=True)
class Refusal:
    """Why a kernel, or a whole precision where `kernel` names one, was passed over."""

    kernel: str
    reason: str

    def __str__(self) -> str:
        return f"{self.kernel}: {self.reason}"


@dataclass(frozen=True)
class Decision:
    """What attention() does with a call.

    Attributes:
        kernel: name of the kernel, or None when none can do what was asked.
        precision: the precision that the kernel computes in, or None.
        refusals: in order of preference, what was passed over and why.
        seconds: predicted time of the call from measured ones, or None where nothing of its kind was measured.
        sixteen_bit_seconds: likewise with torch's fastest kernel; the quotient is the predicted speed-up.
        never_run: whether the kernel is compiled for this GPU but ran on other GPUs only.
    """

    kernel: str | None
    precision: Precision | None
    refusals: tuple[Refusal, ...]
    seconds: float | None = None
    sixteen_bit_seconds: float | None = None
    never_run: bool = False

    @property
    def speedup(self) -> float | None:
        """Predicted, over torch's fastest 16-bit kernel, preparation included; None where nothing was measured."""
        if self.seconds is None or self.sixteen_bit_seconds is None:
            return None
        return self.sixteen_bit_seconds / self.seconds

    def __str__(self) -> str:
        lines = [f"kernel: {self.kernel or 'none'}" + (f" ({self.precision})" if self.precision else "")]
        if self.never_run:
            lines.append(f"  {NEVER_RUN}")
        if self.seconds is not None and self.sixteen_bit_seconds is not None:
            times = f"{self.seconds * 1000:.3g} ms, in 16 bit {self.sixteen_bit_seconds * 1000:.3g} ms"
            lines.append(f"  predicted: {times}")
        return "\n".join(lines + [f"  not {refusal}" for refusal in self.refusals])


class UnsupportedAttention(RuntimeError):
    """No kernel can do the call at the precision that was asked for. Carries the Decision."""

    def __init__(self, decision: Decision, precision: str, what: str = "attention", advice: str = _ADVICE) -> None:
        self.decision = decision
        reasons = "; ".join(str(refusal) for refusal in decision.refusals)
        super().__init__(f"{what} with precision={precision!r} can't run here: {reasons}. {advice}")


def decide(call: AttentionCall, kernels: Sequence[Kernel] = KERNELS) -> Decision:
    """Choose the kernel for `call`. Never raises, never launches anything, never synchronises.

    Emulation is slow, so "auto", which asks for the fastest, never chooses it; nor a rung that 16 bit outruns (router).
    """
    architecture = device_architecture(call.device)
    refusals: list[Refusal] = []
    for precision in [call.precision] if call.precision != "auto" else PRECISIONS[1:]:
        candidates = [kernel for kernel in kernels if kernel.precision == precision]
        reason = precision_refusal(precision, architecture, candidates)
        if reason is not None:
            refusals.append(Refusal(precision, reason))
            candidates = [kernel for kernel in candidates if kernel.emulated]
        for kernel in candidates:
            if kernel.emulated and call.precision == "auto":
                continue
            reason = kernel.refuse(call, architecture)
            if reason is None and call.precision == "auto" and precision != "fp16":
                reason = slower_than_sixteen_bit(call, architecture, kernel.name, precision)
            if reason is None:
                return _decision(call, architecture, kernel, tuple(refusals))
            refusals.append(Refusal(kernel.name, reason))
    return Decision(None, None, tuple(refusals))


def _decision(
    call: AttentionCall, architecture: Architecture | None, kernel: Kernel, refusals: tuple[Refusal, ...]
) -> Decision:
    _, sixteen_bit = fastest_sixteen_bit(call, architecture) or (None, None)
    seconds = sixteen_bit if kernel.precision == "fp16" else predicted_seconds(call, architecture, kernel.name)
    never_run = not kernel.emulated and architecture is not None and kernel.precision in architecture.never_run
    return Decision(kernel.name, kernel.precision, refusals, seconds, sixteen_bit, never_run)


def precision_refusal(
    precision: Precision, architecture: Architecture | None, candidates: Sequence[Kernel]
) -> str | None:
    """Why no native kernel of `candidates` can serve a precision on an architecture (None: no CUDA GPU), or None."""
    if precision == "fp16":
        return None
    if architecture is None:
        return "needs a CUDA GPU"
    if precision not in architecture.runnable:
        return f"{architecture.name} ({architecture.products}) {architecture.refusals[precision]}"
    if all(kernel.emulated for kernel in candidates):
        return f"this version has no kernel yet for {DESCRIPTIONS[precision]}"
    return None
