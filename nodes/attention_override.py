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
from .attention_timing import BASELINE, EARLIER_OVERRIDE, FP16, AttentionTimer, CallShape, Prediction
from .block_tracking import ModelEvaluation, current_evaluation, running_block
from .sentinel import KEPT_IN_FP16, RECOMPUTED, Sentinel, current_watch

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


@dataclasses.dataclass(frozen=True)
class CallSite:
    """Who computes a call and for whom: what is left of it once its tensors are freed.

    Attributes:
        block: the block that is calling.
        kernel: a kernel's name, "fp16" for the model's own attention, or "earlier override".
        shape: None where the arguments can't be read.
        prediction: None where no times of such calls are known.
    """

    block: BlockId | None
    kernel: str
    shape: CallShape | None
    prediction: Prediction | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class KernelCall:
    """A call that a kernel takes; options are those that the model's arguments don't give."""

    site: CallSite
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
        sentinel: says which blocks must not run in low precision any more.
        measure_speedup: time the model's own attention beside the kernels, on a few calls of each shape.
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
        sentinel: Sentinel | None = None,
        measure_speedup: bool = False,
    ) -> None:
        self.coverage = Coverage()
        self.timer = AttentionTimer()
        self.previous = previous
        self._policy = policy
        self._kernels = kernels
        self._native_blocks = dict(native_blocks or {})
        self._window = window
        self._windowed: tuple[weakref.ref[Any], PrecisionPolicy] | None = None
        self._allow_emulation = allow_emulation
        self._sentinel = sentinel
        self._measure_speedup = measure_speedup
        # A compiled model must ask anew in every block and step, not bake in the first answer.
        self._attend_eagerly = torch.compiler.disable(self._attend)
        self._attend_containers_eagerly = torch.compiler.disable(self._attend_containers)

    @property
    def reads_sigma(self) -> bool:
        """Whether the noise level makes a difference."""
        return self._window != WHOLE_RUN or self._policy.depends_on_step

    @property
    def bad_blocks(self) -> frozenset[BlockId]:
        """Blocks that gave non-finite numbers in low precision."""
        return frozenset() if self._sentinel is None else self._sentinel.bad_blocks

    def start_sampling(self) -> None:
        """Forget counts and times, for a new run."""
        self.coverage.reset()
        self.timer.reset()
        if self._sentinel is not None:
            self._sentinel.start()

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
        if isinstance(call, CallSite):
            return self._compute(call, lambda: self._step_aside(func, args, kwargs))
        self._time_baseline(call.site, func, args, kwargs)
        tensors, form = call.arguments.for_kernels()
        output = self._compute(call.site, lambda: self._kernels.attention(*tensors, **form, **call.options))
        return call.arguments.output_form.apply(output)

    def _attend_containers(self, containers: Sequence[Any], rest: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        tensors = [container.peek() for container in containers]
        call = self._plan((*tensors, *rest), kwargs)
        if isinstance(call, CallSite):
            del tensors
            return self._compute(call, lambda: self._step_aside_with_containers(containers, rest, kwargs))
        self._time_baseline(call.site, None, (*tensors, *rest), kwargs)
        site, output_form = call.site, call.arguments.output_form
        operands = [(*call.arguments.for_kernels(), call.options)]
        for container in containers:
            container.take()
        # With operands.pop(), the last references to the model's q, k and v: freed before the attention allocates.
        del call, tensors
        return output_form.apply(self._compute(site, lambda: self._kernels.run(self._prepare(operands))))

    def _prepare(self, operands: list[tuple[Sequence[Tensor], dict[str, Any], dict[str, Any]]]) -> Any:
        tensors, form, options = operands.pop()
        return self._kernels.prepare(*tensors, **form, **options)

    def _step_aside(self, func: Callable[..., Tensor], args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        # _inside_attn_wrapper stays in kwargs: without it core would call this override again.
        return func(*args, **kwargs) if self.previous is None else self.previous(func, *args, **kwargs)

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

    def _compute(self, site: CallSite, compute: Callable[[], Tensor]) -> Tensor:
        """Run a call, timed and under the sentinel's eyes."""
        output = compute() if site.shape is None else self.timer.run(site.kernel, site.shape, compute, site.prediction)
        watch = current_watch()
        if watch is not None:
            watch.record(site.block, output, by_kernel=site.kernel not in {FP16, EARLIER_OVERRIDE})
        return output

    def _time_baseline(
        self, site: CallSite, func: Callable[..., Tensor] | None, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> None:
        """Run the model's own attention beside the kernel, its output thrown away; func None stands for core's."""
        if self._measure_speedup and site.shape is not None and self.timer.wants_baseline(site.shape):
            self.timer.run(BASELINE, site.shape, lambda: (func or core_attention())(*args, **kwargs))

    def _plan(self, args: Sequence[Any], kwargs: dict[str, Any]) -> KernelCall | CallSite:
        """Decide about one call and count it; only a site where it is left to the model or to an earlier override."""
        evaluation = current_evaluation()
        block = running_block(evaluation, self._native_blocks, kwargs.get("transformer_options") or {})
        arguments = read_arguments(args, kwargs)
        if isinstance(arguments, str):
            return self._leave(block, None, arguments)
        shape = _shape(arguments)
        decision = self._decide(block, evaluation, arguments)
        if isinstance(decision, str):
            return self._leave(block, shape, decision)
        kernel, reason, prediction, options = decision
        self.coverage.record(block, kernel, reason)
        return KernelCall(CallSite(block, kernel, shape, prediction), arguments, options)

    def _leave(self, block: BlockId | None, shape: CallShape | None, reason: str) -> CallSite:
        fallback = FP16 if self.previous is None else EARLIER_OVERRIDE
        self.coverage.record(block, fallback, reason)
        return CallSite(block, fallback, shape)

    def _decide(
        self, block: BlockId | None, evaluation: ModelEvaluation | None, arguments: AttentionArguments
    ) -> tuple[str, str | None, Prediction | None, dict[str, Any]] | str:
        """Kernel, why not a faster one, what time it should take, and its options; or why there is none."""
        watch = current_watch()
        if watch is not None and watch.in_fp16:
            return RECOMPUTED
        if block in self.bad_blocks:
            return KEPT_IN_FP16
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
        return decision.kernel, reason or None, _prediction(decision), options

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


def _prediction(decision: Any) -> Prediction | None:
    seconds = getattr(decision, "seconds", None), getattr(decision, "sixteen_bit_seconds", None)
    return None if None in seconds else Prediction(*seconds)


def _shape(arguments: AttentionArguments) -> CallShape:
    query = arguments.query
    masked = arguments.attn_mask is not None
    return CallShape(query.shape, arguments.key.shape, arguments.output_form.layout, masked, query.dtype, query.device)


def core_attention() -> Callable[..., Tensor]:
    """Core's attention as it is without any override; it takes containers.

    Except for checkpoints that prefer an attention of their own (core 0.36 and later): core forgets that preference
    before it asks any override.
    """
    from comfy.ldm.modules.attention import optimized_attention  # noqa: PLC0415  (tests import this file without core)

    return optimized_attention
