"""Calls of the INT8 kernels, and what they are compared with; for Triton's interpreter and for GPUs alike."""

import random

import torch

from sage_kernels.attention_call import make_call
from sage_kernels.reference import attention_fp32, quantized_attention

KINDS = ("plain", "causal", "bool", "blocks", "additive", "additive_16", "lengths", "lengths_causal")


def make_qkv(batch, heads, kv_heads, rows, keys, head_dim, dtype, device, seed=0, size=1.0):
    """Q, K and V with biases that all tokens share, as diffusion models have them."""
    generator = torch.Generator(device).manual_seed(seed)

    def tensor(count, length):
        x = torch.randn(batch, count, length, head_dim, generator=generator, device=device)
        bias = 0.7 * torch.randn(batch, count, 1, head_dim, generator=generator, device=device)
        return ((x + bias) * size).to(dtype)

    return tensor(heads, rows), tensor(kv_heads, keys), tensor(kv_heads, keys)


def make_options(kind, batch, heads, rows, keys, device, seed=0):
    """Arguments of attention() for a kind of call."""
    generator = torch.Generator(device).manual_seed(seed + 1)

    def random(*shape):
        return torch.rand(*shape, generator=generator, device=device)

    options = {}
    if kind == "bool":
        options["attn_mask"] = random(batch, 1, rows, keys) > 0.4
        options["attn_mask"][:, :, rows // 2] = False  # a row that may see nothing
    elif kind == "blocks":  # whole tiles that nobody sees, and a mask that all rows share
        options["attn_mask"] = (torch.arange(keys, device=device) // 128 % 2 == 0)[None]
    elif kind == "additive":
        options["attn_mask"] = random(heads, rows, keys) * 6 - 3
    elif kind == "additive_16":
        mask = (random(batch, heads, rows, 1) * 2 - 1).to(torch.bfloat16)
        options["attn_mask"] = mask.expand(batch, heads, rows, keys)
    if kind.startswith("lengths"):
        lengths = [max(1, keys // 3), keys, 0, keys + 5][:batch]
        options["key_lengths"] = torch.tensor(lengths, dtype=torch.int32, device=device)
    options["is_causal"] = kind.endswith("causal")
    return options


def call_of(q, k, v, precision, *, layout="BHND", return_lse=True, **options):
    """A checked call; `options` as the references take them."""
    arguments = [options.get(name) for name in ("attn_mask", "is_causal", "scale")]
    return make_call(q, k, v, *arguments, True, options.get("key_lengths"), layout, precision, return_lse, False)


def make_view(view, q, k, v):
    """The same Q, K and V with other strides."""
    if view == "expanded":
        return q, k[:, :1].expand_as(k), v[:, :1].expand_as(v)
    if view == "transposed":
        return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    if view == "sliced":
        return tuple(torch.nn.functional.pad(x, (3, 2, 1, 1))[:, :, 1:-1, 3:-2] for x in (q, k, v))
    if view == "head_dim_strided":
        return tuple(x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
    return q, k, v


def run(kernel, call):
    """Output and LSE; memory that the allocator hands to the output is NaN before."""
    state = kernel.prepare(call)
    poison = torch.full((call.query.numel() + 64,), torch.nan, device=call.device, dtype=call.query.dtype)
    del poison
    return kernel.run(state)


def relative_l1(output, expected):
    """sum|output - expected| / sum|expected|."""
    return ((output.float() - expected).abs().sum() / expected.abs().sum().clamp_min(1e-30)).item()


def compare(kernel, q, k, v, *, layout="BHND", **options):
    """Run a call and assert everything about it that has no tolerance.

    Returns:
        output, relative L1 against the quantised reference, that against exact attention, largest error of the LSE.
    """
    before = [x.clone() for x in (q, k, v)]
    call = call_of(q, k, v, kernel.precision, layout=layout, **options)
    output, lse = run(kernel, call)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True)), "an input was changed"
    assert output.dtype == q.dtype
    assert torch.isfinite(output).all(), "not finite, or never written"
    operands = [call.query, call.key, call.value]
    if q.dtype == torch.float32:
        operands = [x.bfloat16() for x in operands]  # as the public API promises
    expected, expected_lse = quantized_attention(*operands, kernel.recipe(call), **options)
    exact, _ = attention_fp32(*operands, **options)
    finite = torch.isfinite(expected_lse)
    assert torch.equal(lse == -torch.inf, expected_lse == -torch.inf)
    lse_error = (lse - expected_lse)[finite].abs().max().item() if finite.any() else 0.0
    return output, relative_l1(output, expected), relative_l1(output, exact), lse_error


def random_case(number, device):
    """Precision, q, k, v and options of a call whose sizes, strides, mask and scale follow from `number`.

    What a kernel is compiled for comes from FORMS, so that not every case compiles one.
    """
    rng = random.Random(number)
    precision, kind, head_dim, dtype, view = FORMS[number % len(FORMS)]
    batch, kv_heads, group = rng.randint(1, 3), rng.randint(1, 3), rng.choice([1, 1, 2, 3])
    heads = kv_heads * group
    rows, keys = (rng.choice([1, rng.randint(2, 70), rng.randint(71, 500)]) for _ in range(2))
    if head_dim % 16:  # with an odd length, the strides of heads and batches are no multiples of 16 either
        rows, keys = rows + rows % 2, keys + keys % 2
    q, k, v = make_qkv(batch, heads, kv_heads, rows, keys, head_dim, dtype, device, seed=number)
    q, k, v = make_view(view, q, k, v)
    options = make_options(kind, batch, heads, rows, keys, device, seed=number)
    if rng.random() < 0.2:
        options["scale"] = rng.choice([-0.1, 0.05, 0.2])
    return precision, (q, k, v), options, f"{kind} {[*q.shape]} {[*k.shape]} {dtype} {view}"


def _make_forms():
    operands = [
        (64, torch.bfloat16, "contiguous"),
        (128, torch.bfloat16, "transposed"),
        (40, torch.float16, "contiguous"),
        (128, torch.float32, "contiguous"),
        (72, torch.bfloat16, "transposed"),
        (96, torch.float16, "sliced"),
        (64, torch.float32, "transposed"),
        (160, torch.bfloat16, "contiguous"),
    ]
    pairs = [(precision, kind) for kind in KINDS for precision in ("int8", "int8_fp16")]
    return [(*pair, *operands[index // 2]) for index, pair in enumerate(pairs)]


FORMS = _make_forms()
