"""From the arguments of attention() to the plan of their form: checked, decided and planned once, found again after."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from sage_kernels.attention_call import AttentionCall, make_call
from sage_kernels.call_form import FormCache, form_of_arguments
from sage_kernels.dispatch import Decision, UnsupportedAttention, decide
from sage_kernels.kernels import find_kernel
from sage_kernels.kernels.interface import Kernel, Plan, PlanningKernel

_CAPACITY = 256  # forms; a model has a few, and a plan takes some KiB


@dataclass(frozen=True, eq=False)
class PlannedAttention:
    """How calls of one form are computed.

    Attributes:
        kernel: its name.
        layout: the caller's.
        plan: what prepares and runs them.
    """

    kernel: str
    layout: str
    plan: Plan


def plan_attention(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> PlannedAttention:
    """How attention() computes these arguments; `options` in the order of make_call().

    Raises:
        TypeError, ValueError, UnsupportedAttention: as attention().
    """
    form = form_of_arguments(q, k, v, *options)
    if form is not None:
        known = _PLANNED.get(form)
        if known is not None:
            return known
    call = make_call(q, k, v, *options)
    decision = decide(call)
    if decision.kernel is None:
        raise UnsupportedAttention(decision, call.precision)
    made = _plan(find_kernel(decision.kernel), call)
    if form is not None:
        _PLANNED.put(form, made)
    return made


def attend(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Any:
    """attention() outside of compiled graphs; `options` in the order of make_call().

    Returns:
        Output, or output and LSE.
    """
    planned = plan_attention(q, k, v, *options)
    output, lse = planned.plan.attend(q, k, v, options[0], options[4])
    if planned.layout == "BNHD":
        output = output.transpose(1, 2)
    return output if lse is None else (output, lse)


def in_layout(layout: str, output: Tensor, lse: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    """What the caller gets of output [B, H, N, D] and LSE."""
    if layout == "BNHD":
        output = output.transpose(1, 2)
    return output if lse is None else (output, lse)


def plan_with(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> None:
    """From now on let attention() compute calls of this form by `kernel`, whatever it would choose: for tests and
    measurements of kernels that this machine doesn't offer.

    Args:
        kernel: any kernel, such as one whose instructions are emulated.
        q, k, v: on the GPU.
        options: in the order of make_call().

    Raises:
        TypeError, ValueError: as attention(); also where calls of the form are not planned.
    """
    form = form_of_arguments(q, k, v, *options)
    call = make_call(q, k, v, *options)
    if form is None:
        raise ValueError(f"only calls on the GPU are planned, got device {q.device}")
    _PLANNED.put(form, _plan(kernel, call))


def _plan(kernel: Kernel, call: AttentionCall) -> PlannedAttention:
    plan = kernel.plan(call) if isinstance(kernel, PlanningKernel) else CallByCall(kernel, call)
    return PlannedAttention(kernel.name, call.layout, plan)


def decide_attention(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Decision:
    """What explain() returns for these arguments; `options` in the order of make_call().

    Raises:
        TypeError, ValueError: as attention().
    """
    form = form_of_arguments(q, k, v, *options)
    known = None if form is None else _DECISIONS.get(form)
    if known is not None:
        return known
    decision = decide(make_call(q, k, v, *options))
    if form is not None:
        _DECISIONS.put(form, decision)
    return decision


class CallByCall:
    """The plan of kernels that plan nothing: the choice of the kernel is all that is remembered.

    Args:
        kernel: what computes the calls.
        call: one of them; its tensors are not kept.
    """

    def __init__(self, kernel: Kernel, call: AttentionCall) -> None:
        self._kernel = kernel
        # What is left are the options; each call brings its own tensors.
        nothing: Any = None
        self._options = replace(call, query=nothing, key=nothing, value=nothing, attn_mask=None, key_lengths=None)

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, key_lengths: Tensor | None) -> Any:
        """The kernel's own."""
        if self._options.layout == "BNHD":
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        call = replace(self._options, query=q, key=k, value=v, attn_mask=attn_mask, key_lengths=key_lengths)
        return self._kernel.prepare(call)

    def run(self, state: Any) -> tuple[Tensor, Tensor | None]:
        """The kernel's own."""
        return self._kernel.run(state)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, key_lengths: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """One after the other."""
        return self.run(self.prepare(q, k, v, attn_mask, key_lengths))


_PLANNED: FormCache[PlannedAttention] = FormCache(_CAPACITY)
_DECISIONS: FormCache[Decision] = FormCache(_CAPACITY)
