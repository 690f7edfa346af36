"""Calls of the training kernels, and what they are compared with; for Triton's interpreter and for GPUs alike."""

import torch

from sage_kernels.training import reference, triton_backend

GRADIENTS = ("output", "dq", "dk", "dv")


def make_tensors(batch, heads, kv_heads, rows, keys, head_dim, dtype, device="cpu", seed=0, size=1.0):
    """Q, K with a bias that all tokens share, V, and the gradient of the output."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(count, length):
        return torch.randn(batch, count, length, head_dim, generator=generator, device=device)

    key = normal(kv_heads, keys) + 2 * normal(kv_heads, 1)
    tensors = (normal(heads, rows), key, normal(kv_heads, keys), normal(heads, rows))
    return tuple((x * size).to(dtype) for x in tensors)


def run(q, k, v, d_output, *, is_causal=False, scale=None, precision="int8", config=None):
    """Output, dQ, dK, dV and LSE of the kernels; memory that allocators hand to results is NaN before."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    output = torch.full_like(q, torch.nan, memory_format=torch.contiguous_format)
    saved = triton_backend.forward(q, k, v, output, is_causal, scale, precision, config)
    poison = [torch.full((x.numel() + 64,), torch.nan, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    del poison
    gradients = triton_backend.backward(d_output, q, v, output, saved, is_causal, scale, precision, config)
    lse = saved.lse[:, : q.shape[2]].view(q.shape[:3]) * 0.6931471805599453
    return (output, *gradients), lse


def expected(q, k, v, d_output, recipe, *, is_causal=False, scale=None):
    """The same from the reference."""
    saved = reference.forward(q, k, v, recipe, is_causal=is_causal, scale=scale)
    return (saved.output, *reference.backward(saved, d_output, recipe)), saved.lse


def exact(q, k, v, d_output, *, is_causal=False, scale=None):
    """Output and gradients of exact attention in float64, by autograd."""
    operands = [x.double().requires_grad_() for x in (q, k, v)]
    group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in operands[1:])
    output = torch.nn.functional.scaled_dot_product_attention(
        operands[0], keys, values, is_causal=is_causal, scale=scale
    )
    output.backward(d_output.double())
    return (output.detach(), *(x.grad for x in operands))


def relative_l1(x, wanted):
    """sum|x - wanted| / sum|wanted|."""
    return float((x.double() - wanted.double()).abs().sum() / wanted.double().abs().sum().clamp_min(1e-30))
