"""What the forward pass hands to the backward pass."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Saved:
    """What the forward pass leaves to the backward pass besides V and O. Padding is zero; block_d is D rounded up.

    For the kernels of sm90_backend, query, key and key_transposed hold tiles of query_tile or key_tile tokens whose
    rows are swizzled as csrc/sm90_channels.cuh says.

    Attributes:
        lse: float32 [B * H, Mq], of log2, without the mean key's part; infinite in rows of padding.
        query, key: codes [B * H, Mq, block_d] and [B * Hkv, Mk, block_d], K without its mean over the tokens.
        key_transposed: codes [B * Hkv, Mk / key_tile, block_d, key_tile] of the same K with a scale for each channel,
            tokens in the order of triton_kernels.numbers.permuted.
        channel_scales: float32 [B * Hkv, block_d].
        key_16bit: K without its mean [B * Hkv, Mk, block_d], in its dtype but seen as int16, for sm90_backend.
            key_transposed and channel_scales are empty then, and this and value_scales are empty otherwise.
        value_scales: float32 [B * Hkv, Mk / key_tile].
        query_scales, key_scales: float32 [B * H, Mq / query_tile] and [B * Hkv, Mk / key_tile].
    """

    lse: Tensor
    query: Tensor
    query_scales: Tensor
    key: Tensor
    key_scales: Tensor
    key_transposed: Tensor
    channel_scales: Tensor
    key_16bit: Tensor
    value_scales: Tensor
