"""Trainable 8-bit attention for diffusers: fine-tuning and LoRA through SageBwd.

    transformer.add_adapter(peft.LoraConfig(...))
    with sage_kernels.diffusers_training.patch_training(transformer) as patched:
        loss(transformer(...)).backward()
    print(patched.coverage)

Calls that trainable_attention() can't take (a mask, dropout, no kernel here) go to torch's attention, with the reason
in the coverage. Gradient checkpointing, which runs blocks again during the backward pass, is followed.
"""

from types import TracebackType

from torch import Tensor, nn

from sage_kernels.block_overrides import BlockId
from sage_kernels.coverage import Coverage
from sage_kernels.diffusers import AttentionRouter, SdpaCall
from sage_kernels.training import emulated_attention, trainable_attention
from sage_kernels.training.recipe import RECIPES
from sage_kernels.training.refusals import refusal


class TrainingPatch:
    """A transformer whose attention trains in 8 bits; a context manager that unpatches at its end.

    Attributes:
        coverage: which kernel served how many forward calls, and why others stepped aside.
    """

    def __init__(self, transformer: nn.Module, precision: str, min_tokens: int, emulate: bool) -> None:
        self.coverage = Coverage()
        self._precision, self._min_tokens, self._emulate = precision, min_tokens, emulate
        self._router = AttentionRouter(transformer, self._attend)

    def remove(self) -> None:
        """Unpatch: the model computes as before, bit by bit. After the backward pass where blocks are checkpointed."""
        self._router.remove()

    def __enter__(self) -> "TrainingPatch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def _attend(self, block: BlockId | None, call: SdpaCall) -> Tensor:
        reason = self._refusal(call)
        if reason is not None:
            self.coverage.record(block, "fp16", reason)
            return call.default()
        self.coverage.record(block, f"sagebwd_{self._precision}" + "_emulated" * self._emulate)
        attend = emulated_attention if self._emulate else trainable_attention
        return attend(
            call.query,
            call.key,
            call.value,
            is_causal=call.is_causal,
            scale=call.scale,
            enable_gqa=call.enable_gqa,
            precision=self._precision,
        )

    def _refusal(self, call: SdpaCall) -> str | None:
        if call.dropout_p:
            return "dropout is asked for"
        if call.attn_mask is not None:
            return "training kernels take no attention mask"
        if call.query.ndim != 4:
            return f"expected [B, H, N, D], got {call.query.ndim} axes"
        if min(call.query.shape[-2], call.key.shape[-2]) < self._min_tokens:
            return f"fewer than {self._min_tokens} tokens"
        return None if self._emulate else refusal(call.query.device, call.query.shape[-1], self._precision)


def patch_training(
    transformer: nn.Module, *, precision: str = "int8", min_tokens: int = 0, emulate: bool = False
) -> TrainingPatch:
    """Let a diffusers transformer train with 8-bit attention, until the returned context ends.

    Args:
        transformer: one transformer, with or without adapters of peft; it may be in any mode.
        precision: as in `trainable_attention`.
        min_tokens: calls with fewer query or key tokens, such as cross-attention to a short text, stay in 16 bit.
        emulate: compute the same numbers in plain PyTorch, slowly, on any device.

    Raises:
        ValueError: unknown precision, or a model without known transformer blocks.
    """
    if precision not in RECIPES:
        raise ValueError(f"precision must be one of {', '.join(RECIPES)}, got {precision!r}")
    return TrainingPatch(transformer, precision, min_tokens, emulate)
