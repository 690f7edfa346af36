"""Low-bit attention for diffusers: the same per-block precision policy as in ComfyUI, on a pipeline or a transformer.

    with sage_kernels.diffusers.patch(pipeline, precision="fp4", fp16_blocks="0-1: 1, 17: 0.5") as patched:
        video = pipeline(prompt).frames
    print(patched.coverage)

While the patched transformer's forward runs, its calls of torch's scaled_dot_product_attention (diffusers' default
attention backend) are taken by a torch function mode of the current thread. Nothing is replaced in torch or diffusers,
so text encoders and VAEs, and other models, are untouched.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sage_kernels.attention import attention, explain
from sage_kernels.block_overrides import BlockId, BlockLayout
from sage_kernels.coverage import Coverage
from sage_kernels.precision_policy import PrecisionPolicy

# Attribute names of the block lists in diffusers' transformers, in running order, and the type their blocks get.
# A UNet's transformer blocks are spread over its down, mid and up blocks.
BLOCK_LISTS = (
    ("blocks", "block"),
    ("vace_blocks", "vace"),
    ("transformer_blocks", "block"),
    ("double_stream_blocks", "double"),
    ("joint_transformer_blocks", "joint"),
    ("single_transformer_blocks", "single"),
    ("single_stream_blocks", "single"),
    ("layers", "layer"),
)
UNET_PARTS = (("down_blocks", "input"), ("mid_block", "middle"), ("up_blocks", "output"))
FLOW_TIMESTEPS = 1000.0

_sdpa = torch.nn.functional.scaled_dot_product_attention


@dataclass(frozen=True, eq=False)
class SdpaCall:
    """One call of torch's attention inside a block: its arguments, and default() to run it as it was written."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    dropout_p: float
    is_causal: bool
    scale: float | None
    enable_gqa: bool
    default: Callable[[], Tensor]

    def arguments(self) -> dict[str, Any]:
        """What `sage_kernels.attention` takes of them."""
        return {
            "q": self.query,
            "k": self.key,
            "v": self.value,
            "attn_mask": self.attn_mask,
            "is_causal": self.is_causal,
            "scale": self.scale,
            "enable_gqa": self.enable_gqa,
        }


Handler = Callable[[BlockId | None, SdpaCall], Tensor]


class AttentionRouter:
    """Hands every attention call of one transformer to a handler, with the block that is calling.

    Args:
        transformer: a diffusers transformer or UNet; its block lists are found by name.
        handler: computes the call's output; called in the thread of the forward.
        on_forward: called before each forward with its arguments by name.

    Raises:
        ValueError: the model has none of the known block lists.
    """

    def __init__(
        self,
        transformer: nn.Module,
        handler: Handler,
        on_forward: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        blocks = find_blocks(transformer)
        if not blocks:
            known = ", ".join(name for name, _ in (*BLOCK_LISTS, *UNET_PARTS))
            raise ValueError(f"{type(transformer).__name__} has no transformer blocks under a known name ({known})")
        counts: dict[str, int] = {}
        for block, _ in blocks:
            counts[block.type] = counts.get(block.type, 0) + 1
        self.layout = BlockLayout(counts)
        self._block: ContextVar[BlockId | None] = ContextVar("block", default=None)
        self._handler = handler
        self._on_forward = on_forward
        self._signature = inspect.signature(transformer.forward)
        self._modes: ContextVar[tuple[_SdpaMode, ...]] = ContextVar("modes", default=())
        self._alone: ContextVar[bool] = ContextVar("alone", default=False)
        self._handles = [
            transformer.register_forward_pre_hook(self._enter_model, with_kwargs=True),
            transformer.register_forward_hook(self._leave_model, always_call=True),
        ]
        for block, module in blocks:
            self._track(block, module)

    def remove(self) -> None:
        """Take all hooks off; the model is as it was. May be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _track(self, block: BlockId, module: nn.Module) -> None:
        def enter(_module: nn.Module, _args: Any) -> None:
            self._block.set(block)
            if not self._modes.get():  # gradient checkpointing runs blocks alone, in the backward pass
                self._push_mode()
                self._alone.set(True)

        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            self._block.set(None)
            if self._alone.get():
                self._alone.set(False)
                self._pop_mode()

        self._handles += [
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave, always_call=True),
        ]

    def _enter_model(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._on_forward is not None:
            self._on_forward(self._signature.bind_partial(*args, **kwargs).arguments)
        self._push_mode()

    def _leave_model(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        if not self._modes.get():  # another hook, or a bad argument, ended the forward before _enter_model was through
            return
        self._block.set(None)
        self._pop_mode()

    def _push_mode(self) -> None:
        mode = _SdpaMode(lambda call: self._handler(self._block.get(), call))
        mode.__enter__()  # type: ignore[no-untyped-call]
        self._modes.set((*self._modes.get(), mode))

    def _pop_mode(self) -> None:
        *rest, mode = self._modes.get()
        self._modes.set(tuple(rest))
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]


class Patch:
    """A patched pipeline or transformer; a context manager that unpatches at its end.

    Attributes:
        coverage: which kernel served how many calls, and why others stepped aside.
        layout: the blocks that fp16_blocks can name.
        policy: what was asked for, resolved for this model.
    """

    def __init__(
        self, transformers: Iterable[nn.Module], scheduler: Any, sigmas: Sequence[float] | None, options: "_Options"
    ) -> None:
        self.coverage = Coverage()
        self._scheduler = scheduler
        self._sigmas = None if sigmas is None else tuple(float(sigma) for sigma in sigmas)
        self._allow_emulation = options.allow_emulation
        self._sigma: ContextVar[tuple[float | None, tuple[float, ...] | None]] = ContextVar(
            "sigma", default=(None, None)
        )
        self._routers: list[AttentionRouter] = []
        try:
            for transformer in transformers:
                self._routers.append(AttentionRouter(transformer, self._attend, self._read_sigma))
            self.layout = self._routers[0].layout
            if any(router.layout != self.layout for router in self._routers):
                raise ValueError("the pipeline's transformers have different blocks; patch each of them on its own")
            self.policy = PrecisionPolicy.for_model(
                self.layout, options.precision, options.fp16_blocks, min_tokens=options.min_tokens
            )
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Unpatch: the model computes as before, bit by bit."""
        for router in self._routers:
            router.remove()

    def __enter__(self) -> "Patch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def _attend(self, block: BlockId | None, call: SdpaCall) -> Tensor:
        sigma, schedule = self._sigma.get()
        choice = self.policy.choose(
            block,
            sigma=sigma,
            schedule=schedule,
            query_tokens=call.query.shape[-2],
            key_tokens=call.key.shape[-2],
        )
        reason = choice.reason
        if choice.precision != "fp16":
            arguments = call.arguments() | {"precision": choice.precision, "allow_emulation": self._allow_emulation}
            kernel, reason = _decide(call, arguments)
            if kernel is not None:
                self.coverage.record(block, kernel, reason)
                output = attention(**arguments)
                assert isinstance(output, Tensor)
                return output
        self.coverage.record(block, "fp16", reason)
        return call.default()

    def _read_sigma(self, arguments: dict[str, Any]) -> None:
        if not self.policy.depends_on_step:
            return
        if self._scheduler is not None and self._sigmas is None:
            self._sigma.set(_scheduler_sigma(self._scheduler))
        elif (timestep := arguments.get("timestep")) is not None and self._sigmas is not None:
            value = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
            self._sigma.set((value / FLOW_TIMESTEPS, self._sigmas))


@dataclass(frozen=True)
class _Options:
    precision: str
    fp16_blocks: str
    min_tokens: int
    allow_emulation: bool


def patch(
    model: Any,
    *,
    precision: str = "auto",
    fp16_blocks: str = "",
    min_tokens: int = 0,
    sigmas: Sequence[float] | None = None,
    allow_emulation: bool = False,
) -> Patch:
    """Give the attention of a diffusers pipeline or transformer the precision that the arguments say.

    Args:
        model: a pipeline (its transformer, transformer_2 and unet are patched) or one transformer.
        precision: as in `sage_kernels.attention`.
        fp16_blocks: blocks kept in 16 bit and for which share of the steps, such as "0-2: 1, 17: 0.5".
        min_tokens: calls with fewer query or key tokens stay in 16 bit.
        sigmas: for a transformer without a pipeline, the schedule of a flow-matching sampler that calls it with
            timestep = 1000 * sigma; needed only where a share is neither 0 nor 1.
        allow_emulation: as in `sage_kernels.attention`.

    Raises:
        TypeError: model holds no torch module.
        ValueError: unknown precision, unreadable fp16_blocks, or blocks that the model hasn't.
    """
    options = _Options(precision, fp16_blocks, min_tokens, allow_emulation)
    if isinstance(model, nn.Module):
        return Patch([model], None, sigmas, options)
    parts = [getattr(model, name, None) for name in ("transformer", "transformer_2", "unet")]
    transformers = [part for part in parts if isinstance(part, nn.Module)]
    if not transformers:
        raise TypeError(f"expected a diffusers pipeline or a torch module, got {type(model).__name__}")
    return Patch(transformers, getattr(model, "scheduler", None), sigmas, options)


def find_blocks(transformer: nn.Module) -> list[tuple[BlockId, nn.Module]]:
    """The blocks of a transformer in running order; lists that share a type are numbered on."""
    lists = [(getattr(transformer, name, None), block_type) for name, block_type in BLOCK_LISTS]
    for part, block_type in UNET_PARTS:
        modules = getattr(transformer, part, None)
        for name, module in modules.named_modules() if isinstance(modules, nn.Module) else ():
            if name.endswith("transformer_blocks"):
                lists.append((module, block_type))
    blocks: list[tuple[BlockId, nn.Module]] = []
    counts: dict[str, int] = {}
    for modules, block_type in lists:
        for module in modules if isinstance(modules, nn.ModuleList) else ():
            blocks.append((BlockId(block_type, counts.get(block_type, 0)), module))
            counts[block_type] = counts.get(block_type, 0) + 1
    return blocks


class _SdpaMode(TorchFunctionMode):
    def __init__(self, handle: Callable[[SdpaCall], Tensor]) -> None:
        super().__init__()
        self._handle = handle

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not _sdpa:
            return func(*args, **kwargs)
        return self._handle(_sdpa_call(*args, **kwargs))


def _sdpa_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> SdpaCall:
    def default() -> Tensor:
        return _sdpa(
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )

    return SdpaCall(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, default)


def _decide(call: SdpaCall, arguments: dict[str, Any]) -> tuple[str | None, str | None]:
    """The quantised kernel for a call, or None; and why it is not a faster one, if there is a reason."""
    if call.dropout_p:
        return None, "dropout is asked for"
    try:
        decision = explain(**arguments)
    except (TypeError, ValueError) as error:  # torch takes shapes that attention() doesn't, such as three axes
        return None, str(error)
    reason = "; ".join(str(refusal) for refusal in decision.refusals) or None
    return (None if decision.precision == "fp16" else decision.kernel), reason


def _scheduler_sigma(scheduler: Any) -> tuple[float | None, tuple[float, ...] | None]:
    """Noise level of the step that a diffusers scheduler is at, and its schedule; (None, None) where it has none."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        return None, None
    schedule = tuple(float(sigma) for sigma in sigmas)
    step = getattr(scheduler, "step_index", None)
    if step is None:  # before the first step()
        step = getattr(scheduler, "begin_index", None) or 0
    return (schedule[step], schedule) if step < len(schedule) else (None, None)
