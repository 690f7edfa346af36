"""Why there are no training kernels for a call."""

import torch

from sage_kernels.architectures import device_architecture
from sage_kernels.dispatch import Decision, Refusal, UnsupportedAttention
from sage_kernels.training.triton_launch import NO_TRITON, triton_is_missing

MAX_HEAD_DIM = 128
_ADVICE = (
    "Use torch.nn.functional.scaled_dot_product_attention there, or sage_kernels.training.emulated_attention, which "
    "computes the same numbers slowly on any device."
)


def require_kernels(device: torch.device, head_dim: int, precision: str) -> None:
    """Raise UnsupportedAttention, with the reason and what to do, where refusal() has one."""
    reason = refusal(device, head_dim, precision)
    if reason is not None:
        decision = Decision(None, None, (Refusal(f"{precision}_training", reason),))
        raise UnsupportedAttention(decision, precision, "trainable_attention", _ADVICE)


def refusal(device: torch.device, head_dim: int, precision: str) -> str | None:
    """Why no kernel here can do it, in plain words, or None."""
    architecture = device_architecture(device)
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim must be at most {MAX_HEAD_DIM}, got {head_dim}"
    if architecture is None:
        return "needs a CUDA GPU"
    if "int8" not in architecture.runnable:
        return f"{architecture.name} ({architecture.products}) {architecture.refusals['int8']}"
    if precision == "fp8" and not architecture.fp8_mma:
        return f"{architecture.name} ({architecture.products}) has no FP8 tensor cores; use precision='int8'"
    return NO_TRITON if triton_is_missing() else None
