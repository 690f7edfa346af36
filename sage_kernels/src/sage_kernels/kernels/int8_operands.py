"""What the Triton INT8 kernels compute on: the quantised Q, K and V of one call."""

from dataclasses import dataclass

from torch import Tensor

TOKEN_TILE = 128  # operands are padded with zeros to whole tiles of tokens; K has one scale per tile


@dataclass(frozen=True, eq=False)
class Int8Operands:
    """Codes and scales. Mq and Mk are Nq and Nk rounded up to whole tiles, `block_d` is D rounded up; padding is zero.

    Attributes:
        query: int8 [B * H, Mq, block_d], negated where the softmax scale is negative.
        query_scales: float32 [B * H, Mq], one per row.
        key: int8 [B * Hkv, Mk, block_d], of K minus its mean over the tokens.
        key_scales: float32 [B * Hkv, Mk / 128].
        value: E4M3 [B * Hkv, block_d, Mk], transposed, of V minus its mean; or float16 [B * Hkv, Mk, block_d].
        value_scales: float32 [B * Hkv, block_d].
        value_mean: float32 [B * Hkv, block_d]; empty with float16.
        code_sums: int64 [B * Hkv, block_d], the sum of V's E4M3 codes over the tokens in units of 2^-9, for the part of
            the mean that rounding took away; empty with float16.
        lse_shift: float32 [B * H, Mq], q . mean(k); empty where no LSE is wanted.
    """

    query: Tensor
    query_scales: Tensor
    key: Tensor
    key_scales: Tensor
    value: Tensor
    value_scales: Tensor
    value_mean: Tensor
    code_sums: Tensor
    lse_shift: Tensor
