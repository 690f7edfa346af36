"""Keys, values and queries for tests of the FP4 cache, and its comparison with the plain reference."""

import torch

from sage_kernels.kv_cache import reference


def relative_l1(output, expected):
    """Of two tensors."""
    return ((output.float() - expected.float()).abs().sum() / expected.float().abs().sum()).item()


def tokens(batch, heads, count, head_dim, dtype=torch.float32, seed=0, size=1.0):
    """K and V as trained models have them: a bias for each head and channel."""
    generator = torch.Generator().manual_seed(seed + count)

    def tensor(bias):
        x = torch.randn(batch, heads, count, head_dim, generator=generator)
        shared = torch.randn(1, heads, 1, head_dim, generator=torch.Generator().manual_seed(seed))
        return ((x + bias * shared) * size).to(dtype)

    return tensor(2.0), tensor(0.5)


def queries(batch, heads, count, head_dim, dtype=torch.float32, seed=1):
    """Normal Q, rounded to the bits that every 16-bit type has: the kernels hold Q in float16."""
    x = torch.randn(batch, heads, count, head_dim, generator=torch.Generator().manual_seed(seed))
    return x.bfloat16().to(dtype)


def code_mismatch(cache, expected):
    """Largest share of code bytes or scales in which two caches differ: two equal errors may choose either scale."""
    pairs = [(cache.key, expected.key), (cache.value, expected.value)]
    shares = []
    for a, b in pairs:
        assert torch.equal(a.head_scales.cpu(), b.head_scales)
        torch.testing.assert_close(a.means.cpu(), b.means, rtol=1e-4, atol=1e-5)
        shares += [(x.cpu() != y).float().mean().item() for x, y in ((a.codes, b.codes), (a.scales, b.scales))]
    return max(shares)


def as_kernels_hold(query):
    """Rounded to float16 when its row's maximum is brought to 1..2, float32."""
    largest = query.abs().amax(-1, keepdim=True)
    power = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)
    return (query / power).half().float() * power


def expected_attention(cache, q, scale=None, is_causal=False):
    """The reference on the very codes that `cache` holds, and on the queries as attend() says that it rounds them.

    What the subtracted mean adds to the scores is one number for each row, taken from queries that are not rounded.
    """
    scale = cache.head_dim**-0.5 if scale is None else scale
    query = cache.rotate_queries(q).float()
    held = as_kernels_hold(query)
    output, lse = reference.attend(held, cache.key, cache.value, cache.lengths, scale=scale, is_causal=is_causal)
    means = cache.key.means.repeat_interleave(q.shape[1] // cache.kv_heads, dim=1)
    return output, lse + ((query - held) * means[:, :, None]).sum(-1) * scale
