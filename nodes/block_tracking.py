"""Which block of which model is running, and at which noise level: asked by every attention call.

Core says it for some families and some versions, so the blocks themselves are watched: for the length of one
evaluation of the model each has a forward hook before and after it. Where no hook fires (a model that runs its blocks
in a way of its own) core's word is taken. The hooks come first because core's keys stay set after the block: a VACE
block or a face adapter would pass for the main block before it.
"""

import functools
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from sage_kernels.block_overrides import BlockId

from .model_families import FoundBlock, find_blocks, native_key


class ModelEvaluation:
    """One evaluation of a diffusion model by a sampler.

    Attributes:
        block: the block that is running, None between blocks.
        hooks_fired: whether `block` can be relied upon.
        sigma: noise level; None when unknown, or not read because nobody needs it.
        schedule: sigmas of the sampling run, one more than it has steps; None as for sigma.
        model_sampling: core's object that turns percents into sigmas.
    """

    __slots__ = ("_blocks", "block", "hooks_fired", "model_sampling", "schedule", "sigma")

    def __init__(
        self,
        blocks: Sequence[FoundBlock],
        sigma: float | None = None,
        schedule: tuple[float, ...] | None = None,
        model_sampling: Any = None,
    ) -> None:
        self._blocks = {id(block.module): block.id for block in blocks}
        self.block: BlockId | None = None
        self.hooks_fired = False
        self.sigma = sigma
        self.schedule = schedule
        self.model_sampling = model_sampling

    def enter(self, module: nn.Module) -> None:
        """`module` starts running."""
        self.block = self._blocks.get(id(module))
        self.hooks_fired = True

    def leave(self) -> None:
        """The running block is done."""
        self.block = None


# A ContextVar, because core may evaluate copies of one model in several threads. A plain object in it, because two
# samplings may run one and the same model: then the hooks of both fire in both, and each writes to its own.
_evaluation: ContextVar[ModelEvaluation | None] = ContextVar("sage3_model_evaluation", default=None)


def current_evaluation() -> ModelEvaluation | None:
    """The evaluation that is running in this thread."""
    return _evaluation.get()


def running_block(
    evaluation: ModelEvaluation | None, native_blocks: Mapping[Hashable, BlockId], transformer_options: dict[str, Any]
) -> BlockId | None:
    """The block that an attention call comes from; None outside every known block."""
    if evaluation is not None and evaluation.hooks_fired:
        return evaluation.block
    return native_blocks.get(native_key(transformer_options))


class BlockTracker:
    """Wrapper for core's WrappersMP.APPLY_MODEL that makes a ModelEvaluation of each call of the model.

    Args:
        reads_sigma: read the noise level and the schedule. It costs one wait for the GPU per evaluation.
    """

    def __init__(self, reads_sigma: bool) -> None:
        self._reads_sigma = reads_sigma
        self._schedule: tuple[weakref.ref[Tensor], tuple[float, ...]] | None = None

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the model. apply_model's arguments are (x, t, c_concat, c_crossattn, control, transformer_options)."""
        base_model = executor.class_obj
        blocks = find_blocks(base_model.diffusion_model)
        evaluation = ModelEvaluation(blocks, model_sampling=base_model.model_sampling)
        if self._reads_sigma:
            options = (args[5] if len(args) > 5 else kwargs.get("transformer_options")) or {}
            evaluation.sigma = _first_value(options.get("sigmas", args[1] if len(args) > 1 else None))
            evaluation.schedule = self._read_schedule(options.get("sample_sigmas"))
        enter, leave = _hooks()
        handles = []
        token = _evaluation.set(evaluation)
        try:
            for block in blocks:
                handles.append(block.module.register_forward_pre_hook(enter))
                handles.append(block.module.register_forward_hook(leave, always_call=True))
            return executor(*args, **kwargs)
        finally:
            _evaluation.reset(token)
            for handle in handles:
                handle.remove()

    def _read_schedule(self, sample_sigmas: Tensor | None) -> tuple[float, ...] | None:
        if sample_sigmas is None:
            return None
        # A sampling run passes one and the same tensor, which may be on the GPU, to all its evaluations.
        schedule = self._schedule
        if schedule is None or schedule[0]() is not sample_sigmas:
            schedule = self._schedule = weakref.ref(sample_sigmas), tuple(sample_sigmas.flatten().tolist())
        return schedule[1]


def _first_value(sigmas: Tensor | None) -> float | None:
    return None if sigmas is None else float(sigmas.flatten()[0])


def _enter_block(module: nn.Module, args: Any) -> None:
    evaluation = _evaluation.get()
    if evaluation is not None:
        evaluation.enter(module)


def _leave_block(module: nn.Module, args: Any, output: Any) -> None:
    evaluation = _evaluation.get()
    if evaluation is not None:
        evaluation.leave()


@functools.cache
def _hooks() -> tuple[Callable[..., None], Callable[..., None]]:
    # A compiled model must run the hooks, not bake in what they saw once. Not at import: this imports torch._dynamo,
    # a second that every start of ComfyUI would pay.
    return torch.compiler.disable(_enter_block), torch.compiler.disable(_leave_block)
