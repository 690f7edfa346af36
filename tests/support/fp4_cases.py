"""Calls that the tests of both rungs of the FP4 kernel make on a GPU, and how far kernel and reference may differ."""

import torch

# Relative L1 between kernel and quantised reference. A bf16 output alone is off by 2^-9 at most, 2^-10.5 on average
# (7e-4); fp16 by an eighth. Accumulation in another order moves a score by 2^-22 of its range or so, which carries
# about one weight in 10^4 across a boundary, by a sixth of its group's maximum at most.
BOUND = {torch.bfloat16: 2.5e-3, torch.float16: 1.5e-3}
KINDS = ["plain", "causal", "bool", "blocks", "additive", "additive_16", "lengths"]


def native():
    return torch.cuda.get_device_capability()[0] == 12


def relative_l1(output, expected):
    return ((output.float() - expected).abs().sum() / expected.abs().sum().clamp_min(1e-30)).item()


def make_qkv(batch, heads, kv_heads, rows, keys, head_dim, dtype, seed=0, size=1.0):
    """Q, K and V with biases that all tokens share, as diffusion models have them."""
    generator = torch.Generator(device="cuda").manual_seed(seed)

    def tensor(count, length):
        x = torch.randn(batch, count, length, head_dim, generator=generator, device="cuda")
        return ((x + 0.7 * torch.randn(batch, count, 1, head_dim, generator=generator, device="cuda")) * size).to(dtype)

    return tensor(heads, rows), tensor(kv_heads, keys), tensor(kv_heads, keys)


def make_options(kind, batch, heads, rows, keys, seed=0):
    generator = torch.Generator(device="cuda").manual_seed(seed + 1)

    def random(*shape):
        return torch.rand(*shape, generator=generator, device="cuda")

    if kind == "bool":
        mask = random(batch, 1, rows, keys) > 0.4
        mask[:, :, rows // 2] = False  # a row that may see nothing
        return {"attn_mask": mask}
    if kind == "blocks":  # whole tiles that nobody sees, and a mask that all rows share
        return {"attn_mask": (torch.arange(keys, device="cuda") // 128 % 2 == 0)[None]}
    if kind == "additive":
        return {"attn_mask": random(heads, rows, keys) * 6 - 3}
    if kind == "additive_16":
        mask = (random(batch, heads, rows, 1) * 2 - 1).to(torch.bfloat16)
        return {"attn_mask": mask.expand(batch, heads, rows, keys)}
    if kind == "lengths":
        lengths = torch.tensor([max(1, keys // 3), keys, 0, keys + 5][:batch], dtype=torch.int32, device="cuda")
        return {"key_lengths": lengths}
    return {"is_causal": kind == "causal"}


def means_in_order(x, rows):
    """Means of blocks of rows, summed up in the kernel's order: every second (fourth up to head_dim 64) row one after
    the other, then those sums in pairs.
    """
    blocks = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % rows)).unflatten(2, (-1, rows))
    sums = blocks.unflatten(3, (-1, 4 if x.shape[3] <= 64 else 2))
    total = torch.zeros_like(sums[:, :, :, 0])
    for step in range(sums.shape[3]):
        total = total + sums[:, :, :, step]
    while total.shape[3] > 1:
        total = total[:, :, :, 0::2] + total[:, :, :, 1::2]
    counts = (x.shape[2] - rows * torch.arange(total.shape[2], device=x.device)).clamp(max=rows)
    return total[:, :, :, 0] / counts[:, None]
