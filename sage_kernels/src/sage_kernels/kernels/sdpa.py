"""16-bit attention by torch.nn.functional.scaled_dot_product_attention: the rung that every device has."""

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

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


# Which kernel torch tries first is a setting of the process.
_PRIORITY_LOCK = threading.RLock()


class SdpaPlan:
    """How calls of one form are given to torch.

    Args:
        call: one of them.
    """

    def __init__(self, call: AttentionCall) -> None:
        self._is_bnhd = call.layout == "BNHD"
        self._is_causal, self._scale, self._return_lse = call.is_causal, call.scale, call.return_lse
        self._options = {"is_causal": call.is_causal, "scale": call.scale, "enable_gqa": call.heads != call.kv_heads}
        self._first = _first_backend(call)
        self._is_plain = call.attn_mask is None and call.key_lengths is None and not call.return_lse

    def prepare(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, key_lengths: Tensor | None
    ) -> "SdpaState":
        """Nothing to prepare."""
        if self._is_bnhd:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return self, q, k, v, attn_mask, key_lengths

    def run(self, state: "SdpaState") -> tuple[Tensor, Tensor | None]:
        """torch's attention; LSE, which torch doesn't return, comes from a second pass in float32."""
        _, q, k, v, attn_mask, key_lengths = state
        if self._is_plain:
            return self._attend(q, k, v, self._options), None
        mask, options = attn_mask, self._options
        if mask is not None and mask.dtype not in (torch.bool, q.dtype):
            mask = mask.to(q.dtype)
        if key_lengths is not None:
            mask = _mask_with_key_lengths(key_lengths, q.shape[2], k.shape[2], self._is_causal, mask)
            options = {**options, "is_causal": False}
        output = self._attend(q, k, v, {**options, "attn_mask": mask})
        if not self._return_lse:
            return output, None
        with torch.no_grad():
            _, lse = attention_fp32(
                q, k, v, attn_mask=attn_mask, is_causal=self._is_causal, scale=self._scale, key_lengths=key_lengths
            )
        return output, lse

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, key_lengths: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """All at once."""
        if self._is_plain and not self._is_bnhd:
            return self._attend(q, k, v, self._options), None
        return self.run(self.prepare(q, k, v, attn_mask, key_lengths))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        """torch's choice among its kernels, the preferred one first; those that can't do a call pass it on."""
        if self._first is None:
            return scaled_dot_product_attention(q, k, v, **options)
        with _PRIORITY_LOCK:
            before = torch._C._get_sdp_priority_order()
            torch._C._set_sdp_priority_order([self._first, *(each for each in before if each != self._first)])
            try:
                return scaled_dot_product_attention(q, k, v, **options)
            finally:
                torch._C._set_sdp_priority_order(before)


SdpaState = tuple[SdpaPlan, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class SdpaKernel:
    """torch's own attention, differentiable, in the dtype of the inputs."""

    name: str = "sdpa"
    precision: Precision = "fp16"
    emulated: bool = False

    def refuse(self, call: AttentionCall, architecture: Architecture | None) -> str | None:
        """Never refuses."""
        return None

    def plan(self, call: AttentionCall) -> SdpaPlan:
        """What torch is to be told, and which of its kernels is to come first."""
        return SdpaPlan(call)

    def prepare(self, call: AttentionCall) -> SdpaState:
        """Nothing to prepare."""
        return SdpaPlan(call), call.query, call.key, call.value, call.attn_mask, call.key_lengths

    def run(self, state: Any) -> tuple[Tensor, Tensor | None]:
        """The plan's."""
        plan: SdpaPlan = state[0]
        return plan.run(state)


def _first_backend(call: AttentionCall) -> int | None:
    """What was measured to be fastest, where torch wouldn't choose it by itself; None leaves the choice to torch."""
    fastest = _fastest_backend(call)
    if fastest is None:
        return None
    chosen = torch._fused_sdp_choice(
        call.query,
        call.key,
        call.value,
        call.attn_mask if call.attn_mask is None or call.attn_mask.dtype == torch.bool else None,
        is_causal=call.is_causal,
        scale=call.scale,
        enable_gqa=call.heads != call.kv_heads,
    )
    return None if chosen == fastest.value else int(fastest.value)


def _fastest_backend(call: AttentionCall) -> SDPBackend | None:
    """What was measured to be fastest; None leaves the choice to torch."""
    if call.key_lengths is not None or call.needs_grad or call.query.dtype == torch.float32:
        return None
    fastest = fastest_sixteen_bit(call, device_architecture(call.device))
    return None if fastest is None else _BACKENDS[fastest[0]]


def _mask_with_key_lengths(
    key_lengths: Tensor, query_length: int, key_length: int, is_causal: bool, mask: Tensor | None
) -> Tensor:
    """One mask that also holds the key lengths and causality, because torch takes a mask or is_causal, not both."""
    allowed = valid_tokens(key_lengths, key_length).transpose(-1, -2)
    if is_causal:
        rows = torch.arange(query_length, device=key_lengths.device)[:, None]
        allowed = allowed & (torch.arange(key_length, device=key_lengths.device) <= rows)
    if mask is None:
        return allowed
    return allowed & mask if mask.dtype == torch.bool else mask.masked_fill(~allowed, -torch.inf)


KERNEL = SdpaKernel()
