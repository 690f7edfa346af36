"""16-bit attention by torch.nn.functional.scaled_dot_product_attention: the rung that every device has."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sage_kernels.architectures import Architecture, device_architecture
from sage_kernels.attention_call import AttentionCall
from sage_kernels.precision import Precision
from sage_kernels.reference import attention_fp32
from sage_kernels.router import fastest_sixteen_bit
from sage_kernels.score_mask import valid_tokens

_BACKENDS = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class SdpaKernel:
    """torch's own attention, differentiable, in the dtype of the inputs."""

    name: str = "sdpa"
    precision: Precision = "fp16"
    emulated: bool = False

    def refuse(self, call: AttentionCall, architecture: Architecture | None) -> str | None:
        """Never refuses."""
        return None

    def prepare(self, call: AttentionCall) -> AttentionCall:
        """Nothing to prepare."""
        return call

    def run(self, state: Any) -> tuple[Tensor, Tensor | None]:
        """torch's attention; LSE, which torch doesn't return, comes from a second pass in float32."""
        call: AttentionCall = state
        mask, is_causal = call.attn_mask, call.is_causal
        if mask is not None and mask.dtype not in (torch.bool, call.query.dtype):
            mask = mask.to(call.query.dtype)
        if call.key_lengths is not None:
            mask, is_causal = _mask_with_key_lengths(call, mask), False
        with _preferring(_fastest_backend(call)):
            output = torch.nn.functional.scaled_dot_product_attention(
                call.query,
                call.key,
                call.value,
                attn_mask=mask,
                is_causal=is_causal,
                scale=call.scale,
                enable_gqa=call.heads != call.kv_heads,
            )
        if not call.return_lse:
            return output, None
        with torch.no_grad():
            _, lse = attention_fp32(
                call.query,
                call.key,
                call.value,
                attn_mask=call.attn_mask,
                is_causal=call.is_causal,
                scale=call.scale,
                key_lengths=call.key_lengths,
            )
        return output, lse


def _fastest_backend(call: AttentionCall) -> SDPBackend | None:
    """What was measured to be fastest; None leaves the choice to torch."""
    if call.key_lengths is not None or call.needs_grad or call.query.dtype == torch.float32:
        return None
    fastest = fastest_sixteen_bit(call, device_architecture(call.device))
    return None if fastest is None else _BACKENDS[fastest[0]]


def _preferring(backend: SDPBackend | None) -> contextlib.AbstractContextManager[Any]:
    """torch's choice among its kernels, with `backend` first; those that can't do a call pass it on to the next."""
    if backend is None:
        return contextlib.nullcontext()
    others = [each for each in (*_BACKENDS.values(), SDPBackend.MATH) if each != backend]
    return sdpa_kernel([backend, *others], set_priority=True)


def _mask_with_key_lengths(call: AttentionCall, mask: Tensor | None) -> Tensor:
    """One mask that also holds the key lengths and causality, because torch takes a mask or is_causal, not both."""
    assert call.key_lengths is not None
    allowed = valid_tokens(call.key_lengths, call.key_length).transpose(-1, -2)
    if call.is_causal:
        rows = torch.arange(call.query_length, device=call.device)[:, None]
        allowed = allowed & (torch.arange(call.key_length, device=call.device) <= rows)
    if mask is None:
        return allowed
    return allowed & mask if mask.dtype == torch.bool else mask.masked_fill(~allowed, -torch.inf)


KERNEL = SdpaKernel()
