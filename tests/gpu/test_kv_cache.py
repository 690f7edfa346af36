"""The FP4 cache on a GPU: codes against the reference, attention against the reference on the very same codes."""

import pytest
import torch

from kv_cases import code_mismatch, expected_attention, queries, relative_l1, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.evidence("kv_cache"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU"),
]
pytest.importorskip("triton", reason="Triton is not installed")
from sage_kernels.kv_cache import KVCache  # noqa: E402 after the skip
from sage_kernels.reference import attention_fp32  # noqa: E402

# Relative L1: the output's own rounding (2^-10.5 for bf16, 2^-13.5 for fp16 on average) and weights in float16.
BOUND = {torch.bfloat16: 2e-3, torch.float16: 5e-4, torch.float32: 3e-4}
LSE_BOUND = 3e-4
CODES_BOUND = 1e-3
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture(autouse=True)
def full_float32_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def filled(k, v, counts=None, **options):
    """Two caches with the same tokens: by the kernels, and by the reference on the CPU."""
    sizes = (k.shape[0], k.shape[1], options.pop("capacity", k.shape[2]), k.shape[3])
    cache, expected = KVCache(*sizes, **options), KVCache(*sizes, device="cpu", **options)
    append_both(cache, expected, k, v, counts)
    return cache, expected


def append_both(cache, expected, k, v, counts=None):
    cache.append(k.cuda(), v.cuda(), None if counts is None else torch.tensor(counts, dtype=torch.int32).cuda())
    expected.append(k, v, None if counts is None else torch.tensor(counts, dtype=torch.int32))


def check(within, cache, q, **options):
    output, lse = cache.attend(q, return_lse=True, **options)
    options.pop("splits", None)
    expected, expected_lse = expected_attention(cache, q, **options)
    assert output.dtype == q.dtype
    assert torch.equal(lse == -torch.inf, expected_lse == -torch.inf)
    visible = expected_lse > -torch.inf
    within((lse - expected_lse)[visible].abs().max().item(), LSE_BOUND)
    within(relative_l1(output, expected), BOUND[q.dtype])
    return output


@pytest.mark.parametrize(
    ("head_dim", "group", "dtype", "rotate_keys"),
    [
        (64, 16, "bf16", True),
        (64, 32, "fp16", True),
        (64, 64, "fp32", False),
        (128, 16, "bf16", True),
        (128, 32, "fp16", False),
        (128, 64, "fp32", True),
    ],
)
def test_codes_and_attention(within, head_dim, group, dtype, rotate_keys):
    k, v = tokens(2, 2, 700, head_dim, DTYPES[dtype])
    cache, expected = filled(k, v, group=group, capacity=1000, rotate_keys=rotate_keys)
    append_both(cache, expected, *tokens(2, 2, 40, head_dim, DTYPES[dtype]), [40, 3])
    append_both(cache, expected, *tokens(2, 2, 1, head_dim, DTYPES[dtype]))
    assert torch.equal(cache.lengths.cpu(), expected.lengths)
    within(code_mismatch(cache, expected), CODES_BOUND)
    check(within, cache, queries(2, 8, 1, head_dim, DTYPES[dtype]).cuda())


@pytest.mark.parametrize(
    ("heads", "rows", "is_causal"),
    [(2, 1, False), (6, 4, True), (10, 1, False), (32, 1, False), (16, 5, True), (32, 150, True)],
)
def test_grouped_heads_and_many_rows(within, heads, rows, is_causal):
    k, v = tokens(2, 2, 1100, 128, torch.bfloat16)
    cache, _ = filled(k, v, [1100, 130])
    check(within, cache, queries(2, heads, rows, 128, torch.bfloat16).cuda(), is_causal=is_causal)


@pytest.mark.parametrize("length", [1, 15, 64, 129, 4096, 33333])
def test_any_length_and_number_of_splits(within, length):
    k, v = tokens(1, 2, length, 64, torch.bfloat16)
    cache, expected = filled(k, v)
    within(code_mismatch(cache, expected), CODES_BOUND)
    for splits in (None, 1, 7, 256):
        check(within, cache, queries(1, 8, 1, 64, torch.bfloat16).cuda(), splits=splits)


def test_sequences_of_different_lengths(within):
    k, v = tokens(5, 1, 3000, 128, torch.bfloat16)
    cache, expected = filled(k, v, [3000, 1, 0, 128, 777])
    within(code_mismatch(cache, expected), CODES_BOUND)
    output = check(within, cache, queries(5, 4, 1, 128, torch.bfloat16).cuda())
    assert not output[2].any()


@pytest.mark.parametrize("size", [1e-6, 1e4])
def test_tensors_of_any_size(within, size):
    k, v = tokens(1, 2, 500, 64, torch.bfloat16, size=size)
    cache, expected = filled(k, v)
    within(code_mismatch(cache, expected), CODES_BOUND)
    check(within, cache, queries(1, 4, 1, 64, torch.bfloat16).cuda(), scale=0.125 / size)


def test_strided_inputs_give_the_same():
    k, v = tokens(2, 3, 400, 64, torch.bfloat16)
    q = queries(2, 6, 2, 64, torch.bfloat16).cuda()
    cache, _ = filled(k, v)
    strided = KVCache(2, 3, 400, 64)
    strided.append(*(x.cuda().transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)))
    assert torch.equal(strided.key.codes, cache.key.codes)
    assert torch.equal(strided.value.codes, cache.value.codes)
    rows = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(strided.attend(rows), cache.attend(q))
    assert torch.equal(strided.attend(q.mT.contiguous().mT), cache.attend(q))


def test_rolling_overwrites_the_oldest(within):
    cache, expected = (KVCache(1, 2, 300, 64, device=device, rolling=True) for device in ("cuda", "cpu"))
    for count in (200, 200, 1, 300):
        append_both(cache, expected, *tokens(1, 2, count, 64, torch.bfloat16))
    within(code_mismatch(cache, expected), CODES_BOUND)
    check(within, cache, queries(1, 4, 1, 64, torch.bfloat16).cuda())


def test_decoding_in_a_cuda_graph_is_decoding(within):
    """Append one token and attend, replayed: as many tokens as replays, and every output that of an eager run."""
    k, v = tokens(2, 2, 260, 128, torch.bfloat16)
    q = queries(2, 8, 1, 128, torch.bfloat16).cuda()
    graphed, eager = (KVCache(2, 2, 300, 128) for _ in range(2))
    for cache in (graphed, eager):
        cache.append(k[:, :, :250].cuda(), v[:, :, :250].cuda())
    new_k, new_v = k[:, :, :1].cuda(), v[:, :, :1].cuda()
    warm = KVCache(2, 2, 300, 128)
    warm.append(new_k, new_v)
    warm.attend(q)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graphed.append(new_k, new_v)
        output = graphed.attend(q)
    for index in range(250, 260):
        new_k.copy_(k[:, :, index : index + 1])
        new_v.copy_(v[:, :, index : index + 1])
        graph.replay()
        eager.append(new_k, new_v)
        within((output.float() - eager.attend(q).float()).abs().max().item(), 1e-2)
    assert graphed.lengths.tolist() == [260, 260]
    assert torch.equal(graphed.key.codes, eager.key.codes)


def test_a_graph_drops_what_does_not_fit():
    k, v = (x.cuda() for x in tokens(1, 1, 8, 64, torch.bfloat16))
    cache = KVCache(1, 1, 20, 64)
    cache.append(k, v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.append(k, v)
    for _ in range(4):
        graph.replay()
    assert cache.lengths.tolist() == [20]
    with pytest.raises(ValueError, match="don't fit"):
        cache.append(k, v)


@pytest.mark.parametrize("rotate_keys", [False, True])
def test_quality_against_exact_attention(within, rotate_keys):
    dtype = torch.bfloat16
    k, v = tokens(1, 2, 4096, 128, dtype)
    cache = KVCache(1, 2, 4096, 128, rotate_keys=rotate_keys)
    cache.append(k.cuda(), v.cuda())
    q = queries(1, 8, 4, 128, dtype).cuda()
    check(within, cache, q)
    exact, _ = attention_fp32(q, k.cuda(), v.cuda())
    within(relative_l1(cache.attend(q), exact), 0.1)
