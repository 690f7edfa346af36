"""What ComfyUI calls in place of its attention: runs a kernel, or steps aside and says why.

Core calls `override(func, *args, **kwargs)`, func being its own attention; or, where the model hands its tensors over
in containers so that they can be freed early, `override.container_function(*args, **kwargs)`, without func.
"""

import dataclasses
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sage_kernels.block_overrides import BlockId
from sage_kernels.coverage import Coverage
from sage_kernels.precision_policy import SIGMA_UNKNOWN, Choice, PrecisionPolicy

from .attention_arguments import AttentionArguments, read_arguments
from .block_tracking import ModelEvaluation, current_evaluation, running_block

WHOLE_RUN = (0.0, 1.0)


class Kernels(Protocol):
    """The part of sage_kernels that is used here."""

    def explain(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        """Say which kernel would do the call."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        """Do it."""

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        """Do the half of it after which q, k and v can be freed."""

    def run(self, prepared: Any) -> Any:
        """Do the other half."""


@dataclasses.dataclass(frozen=True, eq=False)
class KernelCall:
    """A call that a kernel takes, and why not a faster one; options are those that the model's arguments don't give."""

    kernel: str
    reason: str | None
    arguments: AttentionArguments
    options: dict[str, Any]


class AttentionOverride:
    """The value of transformer_options["optimized_attention_override"].

    Safe to share between threads and between clones of a model: what belongs to one evaluation of the model is in
    block_tracking.

    Args:
        policy: precision by block; its window is replaced by the one below.
        kernels: sage_kernels.
        native_blocks: FoundBlock.native_keys -> block, for models whose blocks can't be watched.
        window: start and end percent of the sampling between which kernels are used.
        previous: the override that was there before, called where this one steps aside.
        allow_emulation: passed on to sage_kernels.
    """

    def __init__(
        self,
        policy: PrecisionPolicy,
        kernels: Kernels,
        *,
        native_blocks: Mapping[Hashable, BlockId] | None = None,
        window: tuple[float, float] = WHOLE_RUN,
        previous: Callable[..., Any] | None = None,
        allow_emulation: bool = False,
    ) -> None:
        self.coverage = Coverage()
        self.previous = previous
        self._policy = policy
        self._kernels = kernels
        self._native_blocks = dict(native_blocks or {})
        self._window = window
        self._windowed: tuple[weakref.ref[Any], PrecisionPolicy] | None = None
        self._allow_emulation = allow_emulation
        # A compiled model must ask anew in every block and step, not bake in the first answer.
        self._attend_eagerly = torch.compiler.disable(self._attend)
        self._attend_containers_eagerly = torch.compiler.disable(self._attend_containers)

    @property
    def reads_sigma(self) -> bool:
        """Whether the noise level makes a difference."""
        return self._window != WHOLE_RUN or self._policy.depends_on_step

    def __deepcopy__(self, memo: dict[int, Any]) -> "AttentionOverride":
        """Itself: cloning a ModelPatcher copies its options deeply, and the counts are to be in one place."""
        return self

    def __call__(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Attention as core calls it; func is core's own attention function, and kwargs go on to it unchanged."""
        return self._attend_eagerly(func, args, kwargs)

    def container_function(self, *args: Any, **kwargs: Any) -> Tensor:
        """Attention on core's AttentionTensorContainers, the first three arguments, which are emptied."""
        return self._attend_containers_eagerly(args[:3], args[3:], kwargs)

    def _attend(self, func: Callable[..., Tensor], args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        call = self._plan(args, kwargs)
        if call is None:
            # _inside_attn_wrapper stays in kwargs: without it core would call this override again.
            return func(*args, **kwargs) if self.previous is None else self.previous(func, *args, **kwargs)
        tensors, options = call.arguments.for_kernels()
        return call.arguments.output_form.apply(self._kernels.attention(*tensors, **options, **call.options))

    def _attend_containers(self, containers: Sequence[Any], rest: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        call = self._plan((*(container.peek() for container in containers), *rest), kwargs)
        if call is None:
            return self._step_aside_with_containers(containers, rest, kwargs)
        for container in containers:
            container.take()
        tensors, options = call.arguments.for_kernels()
        output_form = call.arguments.output_form
        prepared = self._kernels.prepare(*tensors, **options, **call.options)
        # The last references to the model's q, k and v: freed before the attention itself allocates.
        del call, tensors, options
        return output_form.apply(self._kernels.run(prepared))

    def _step_aside_with_containers(
        self, containers: Sequence[Any], rest: Sequence[Any], kwargs: dict[str, Any]
    ) -> Tensor:
        if self.previous is None:
            return core_attention()(*containers, *rest, **kwargs)
        if hasattr(self.previous, "container_function"):
            return self.previous.container_function(*containers, *rest, **kwargs)
        func = core_attention()
        tensors = [container.take() for container in containers]
        return self.previous(getattr(func, "__wrapped__", func), *tensors, *rest, **kwargs)

    def _plan(self, args: Sequence[Any], kwargs: dict[str, Any]) -> KernelCall | None:
        """Decide about one call and count it; None: step aside."""
        evaluation = current_evaluation()
        block = running_block(evaluation, self._native_blocks, kwargs.get("transformer_options") or {})
        call = self._decide(block, evaluation, args, kwargs)
        if isinstance(call, KernelCall):
            self.coverage.record(block, call.kernel, call.reason)
            return call
        self.coverage.record(block, "fp16" if self.previous is None else "earlier override", call)
        return None

    def _decide(
        self, block: BlockId | None, evaluation: ModelEvaluation | None, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> KernelCall | str:
        """The call for a kernel, or why there is none."""
        arguments = read_arguments(args, kwargs)
        if isinstance(arguments, str):
            return arguments
        choice = self._choose(block, evaluation, arguments)
        if choice.precision == "fp16":
            return str(choice.reason)
        options = {"precision": choice.precision, "allow_emulation": self._allow_emulation}
        tensors, form = arguments.for_kernels()
        try:
            decision = self._kernels.explain(*tensors, **form, **options)
        except (TypeError, ValueError) as error:  # core takes shapes and dtypes that sage_kernels doesn't
            return str(error)
        reason = "; ".join(str(refusal) for refusal in decision.refusals)
        if decision.kernel in {None, "sdpa"}:
            return reason
        return KernelCall(decision.kernel, reason or None, arguments, options)

    def _choose(
        self, block: BlockId | None, evaluation: ModelEvaluation | None, arguments: AttentionArguments
    ) -> Choice:
        policy = self._policy
        if self._window != WHOLE_RUN:
            if evaluation is None:
                return SIGMA_UNKNOWN
            policy = self._windowed_policy(evaluation.model_sampling)
        return policy.choose(
            block,
            sigma=evaluation.sigma if evaluation is not None else None,
            schedule=evaluation.schedule if evaluation is not None else None,
            query_tokens=arguments.query_tokens,
            key_tokens=arguments.key_tokens,
        )

    def _windowed_policy(self, model_sampling: Any) -> PrecisionPolicy:
        # Asked for while sampling, because a node further down the graph may have shifted the model's sigmas.
        windowed = self._windowed
        if windowed is None or windowed[0]() is not model_sampling:
            windowed = weakref.ref(model_sampling), _with_window(self._policy, model_sampling, self._window)
            self._windowed = windowed
        return windowed[1]


def _with_window(policy: PrecisionPolicy, model_sampling: Any, window: tuple[float, float]) -> PrecisionPolicy:
    start, end = window
    return dataclasses.replace(
        policy,
        # 0 and 1 are no bounds: core's flow models give 1.0 for 0 percent, and samplers that add noise go above.
        sigma_start=policy.sigma_start if start <= 0.0 else float(model_sampling.percent_to_sigma(start)),
        sigma_end=policy.sigma_end if end >= 1.0 else float(model_sampling.percent_to_sigma(end)),
    )


def core_attention() -> Callable[..., Tensor]:
    """Core's attention as it is without any override; it takes containers.

    Except for checkpoints that prefer an attention of their own (core 0.36 and later): core forgets that preference
    before it asks any override.
    """
    from comfy.ldm.modules.attention import optimized_attention  # noqa: PLC0415  (tests import this file without core)

    return optimized_attention
