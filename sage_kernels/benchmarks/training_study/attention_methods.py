"""The attentions that the experiments compare; all causal, [B, H, N, D]."""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sage_kernels.recipes import RECIPES, SAGE_ATTENTION_3_PUBLISHED, Recipe
from sage_kernels.reference import quantize_operands, quantized_attention
from sage_kernels.training import emulated_attention, trainable_attention

from .language_model import Attention

TRAINING_METHODS = ("bf16", "int8", "fp8")
EMULATOR_BOUND = 2e-3  # relative L1: sums in another order carry some weights across a rounding boundary
FP4_RECIPES = {"fp4": RECIPES["fp4"], "fp4_published": SAGE_ATTENTION_3_PUBLISHED}


def training_attention(name: str) -> Attention:
    """bf16: torch's FlashAttention; int8, fp8: SageBwd, by its kernels on a GPU and its reference elsewhere."""

    def bf16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not q.is_cuda:
            return scaled_dot_product_attention(q, k, v, is_causal=True)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    def sagebwd(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attend = trainable_attention if q.is_cuda else emulated_attention
        return attend(q, k, v, is_causal=True, precision=name)

    return bf16 if name == "bf16" else sagebwd


def fp4_attention(name: str) -> Attention:
    """FP4 by the quantised reference; on a GPU its inner loop is one kernel, checked at its first call."""
    recipe = FP4_RECIPES[name]
    checked = False

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rounded = [x.bfloat16() for x in (q, k, v)]
        if q.is_cuda and k.shape[2] % recipe.key_block == 0:
            nonlocal checked
            if not checked:
                check_emulator(*(x[:1] for x in rounded), recipe)
                checked = True
            return emulate_on_gpu(*rounded, recipe).to(v.dtype)
        return quantized_attention(*rounded, recipe, is_causal=True)[0].to(v.dtype)

    return attend


@torch.no_grad()
def emulate_on_gpu(q: Tensor, k: Tensor, v: Tensor, recipe: Recipe) -> Tensor:
    """What quantized_attention() gives, float32."""
    from recipe_emulator import emulate  # noqa: PLC0415 needs Triton

    return emulate(quantize_operands(q, k, v, recipe), recipe, q.shape[-1] ** -0.5, k.shape[2], is_causal=True)


def check_emulator(q: Tensor, k: Tensor, v: Tensor, recipe: Recipe) -> None:
    """Raise RuntimeError where the kernel is not the reference."""
    expected = quantized_attention(q, k, v, recipe, is_causal=True)[0]
    error = float((emulate_on_gpu(q, k, v, recipe) - expected).abs().sum() / expected.abs().sum())
    if not error < EMULATOR_BOUND:
        raise RuntimeError(f"the emulator of FP4 attention is {error:.2g} from the reference")
