"""Which numbers a trainable attention multiplies: the parameters that kernels and reference must agree on."""

from dataclasses import dataclass
from typing import Literal

Matmul = Literal["qk", "pv", "dp", "dv", "dq", "dk"]
MATMULS: tuple[Matmul, ...] = ("qk", "pv", "dp", "dv", "dq", "dk")


@dataclass(frozen=True)
class TrainingRecipe:
    """SageBwd (SageAttention3, section 4): every matmul but dP = dO V^T in 8 bits.

    Attributes:
        number: of the codes, INT8 or FP8 E4M3.
        query_tile: tokens of Q and of dO that share a scale.
        key_tile: tokens of K and of V that share a scale.
        forward_keys: keys for which one query's weights P share a scale in P V.
        backward_queries: queries for which one key's P and dS share a scale in P^T dO and dS^T Q.
        backward_keys: keys for which one query's dS share a scale in dS K.
        channel_keys: in dS K, K has a scale for each channel, which all keys of a head share, rather than one for
            each key_tile: channels of trained models differ by far more than keys do.
        smooth_k: subtract the mean key first.
        return_mean: add rowsum(dS) * mean(k) to dQ. In exact arithmetic every row of dS sums to zero.
        exact: matmuls whose operands keep 16 bits.
        rounds: P, dP - delta, dS and K without its mean are rounded to the 16 bits of Q where `exact` has dv, dk and
            dq; otherwise they stay as they are there.
    """

    number: Literal["int8", "fp8"] = "int8"
    query_tile: int = 64
    key_tile: int = 128
    forward_keys: int = 128
    backward_queries: int = 64
    backward_keys: int = 64
    channel_keys: bool = True
    smooth_k: bool = True
    return_mean: bool = False
    exact: frozenset[Matmul] = frozenset({"dp"})
    rounds: bool = False


RECIPES: dict[str, TrainingRecipe] = {"int8": TrainingRecipe(), "fp8": TrainingRecipe(number="fp8")}
