"""The quantised references as kernels: any device, slow, only where the caller asks for emulation."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sage_kernels.architectures import Architecture
from sage_kernels.attention_call import AttentionCall
from sage_kernels.precision import Precision
from sage_kernels.recipes import RECIPES
from sage_kernels.reference import QuantizedOperands, attend, quantize_operands
from sage_kernels.score_mask import ScoreMask


@dataclass(frozen=True, eq=False)
class _State:
    operands: QuantizedOperands
    mask: ScoreMask
    scale: float
    dtype: torch.dtype
    return_lse: bool


@dataclass(frozen=True)
class EmulationKernel:
    """`reference.quantized_attention` at one precision."""

    precision: Precision
    emulated: bool = True

    @property
    def name(self) -> str:
        """The precision, marked as emulated."""
        return f"{self.precision}_emulated"

    def refuse(self, call: AttentionCall, architecture: Architecture | None) -> str | None:
        """Refuse unless the caller allowed emulation; it must never be a surprise."""
        if not call.allow_emulation:
            return "emulation is slow and runs only with allow_emulation=True"
        if call.needs_grad:
            return "the inputs require gradients; use trainable_attention or precision='fp16'"
        return None

    def prepare(self, call: AttentionCall) -> _State:
        """Quantise; float32 inputs are rounded to bfloat16 first, as the kernels do."""
        query, key, value = call.query, call.key, call.value
        if query.dtype == torch.float32:
            query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
        return _State(
            quantize_operands(query, key, value, RECIPES[self.precision], key_lengths=call.key_lengths),
            ScoreMask(call.attn_mask, call.is_causal, call.key_lengths, call.key_length),
            call.scale,
            call.query.dtype,
            call.return_lse,
        )

    def run(self, state: Any) -> tuple[Tensor, Tensor | None]:
        """Online softmax over the quantised operands."""
        output, lse = attend(state.operands, state.mask, RECIPES[self.precision], state.scale)
        return output.to(state.dtype), lse if state.return_lse else None


KERNELS = tuple(EmulationKernel(precision) for precision in RECIPES)
