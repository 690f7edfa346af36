"""The cache's Triton kernels in Triton's interpreter, against the plain reference.

Run by tests/test_kv_cache.py, with TRITON_INTERPRET=1.
"""

import pytest
import torch

from kv_cases import code_mismatch, expected_attention, queries, relative_l1, tokens
from sage_kernels.kv_cache import KVCache, launch
from triton_interpreter import round_as_gpus_do

# Weights in float16; queries that float16 holds exactly; float32 output.
BOUND, LSE_BOUND = 5e-4, 2e-4
CODES_BOUND = 1e-3


@pytest.fixture(autouse=True)
def gpu_rounding(monkeypatch):
    round_as_gpus_do(monkeypatch)


def append_both(cache, expected, k, v, counts=None):
    """Kernels into one cache, the reference into the other."""
    state = (counts, cache.lengths, cache._written, cache._key_rotation, cache.capacity, cache.rolling)
    launch.append(cache.key, cache.value, k, v, *state)
    expected.append(k, v, counts)
    assert torch.equal(cache.lengths, expected.lengths)
    assert torch.equal(cache._written, expected._written)


def check_attention(cache, q, splits, is_causal=False, scale=None):
    scale = cache.head_dim**-0.5 if scale is None else scale
    rotated = cache.rotate_queries(q)
    operands = (rotated, cache.key, cache.value, cache.lengths, cache.capacity, scale, is_causal, splits)
    output, lse = launch.attend(*operands, launch.INTERPRETED)
    expected, expected_lse = expected_attention(cache, q, scale, is_causal)
    assert relative_l1(output, expected) < BOUND
    assert torch.equal(lse == -torch.inf, expected_lse == -torch.inf)
    visible = expected_lse > -torch.inf
    assert (lse - expected_lse)[visible].abs().max() < LSE_BOUND


@pytest.mark.parametrize(("head_dim", "group", "rotate_keys"), [(64, 16, True), (128, 32, False)])
def test_codes_and_attention_are_the_references(head_dim, group, rotate_keys):
    options = {"device": "cpu", "rotate_keys": rotate_keys, "group": group}
    cache, expected = (KVCache(2, 1, 200, head_dim, **options) for _ in range(2))
    append_both(cache, expected, *tokens(2, 1, 140, head_dim))
    append_both(cache, expected, *tokens(2, 1, 5, head_dim), torch.tensor([5, 2], dtype=torch.int32))
    assert code_mismatch(cache, expected) < CODES_BOUND
    check_attention(cache, queries(2, 3, 1, head_dim), splits=2)


@pytest.mark.parametrize(("rows", "splits", "is_causal"), [(5, 2, True), (20, 1, False)])
def test_rows_splits_and_causality(rows, splits, is_causal):
    cache, expected = (KVCache(2, 1, 200, 64, device="cpu", rotate_keys=False) for _ in range(2))
    append_both(cache, expected, *tokens(2, 1, 150, 64), torch.tensor([150, 7], dtype=torch.int32))
    check_attention(cache, queries(2, 2, rows, 64), splits, is_causal, scale=0.2)


def test_empty_sequences_and_tiny_numbers():
    cache, expected = (KVCache(2, 1, 64, 64, device="cpu", rotate_keys=False) for _ in range(2))
    k, v = tokens(2, 1, 40, 64, size=1e-6)
    append_both(cache, expected, k, v, torch.tensor([40, 0], dtype=torch.int32))
    assert code_mismatch(cache, expected) < CODES_BOUND
    check_attention(cache, queries(2, 1, 1, 64), splits=2, scale=1e5)


def test_rolling_overwrites_the_oldest():
    cache, expected = (KVCache(1, 1, 48, 64, device="cpu", rotate_keys=False, rolling=True) for _ in range(2))
    for count in (40, 30):
        append_both(cache, expected, *tokens(1, 1, count, 64))
    assert code_mismatch(cache, expected) < CODES_BOUND
    check_attention(cache, queries(1, 2, 1, 64), splits=1)


def test_what_is_not_finite_is_not_hidden():
    cache, expected = (KVCache(1, 1, 32, 64, device="cpu", rotate_keys=False) for _ in range(2))
    k, v = tokens(1, 1, 20, 64)
    v[0, 0, 3, 5] = torch.inf
    append_both(cache, expected, k, v)
    q = queries(1, 1, 1, 64)
    operands = (q, cache.key, cache.value, cache.lengths, 32, 0.1, False, 1)
    output, _ = launch.attend(*operands, launch.INTERPRETED)
    assert output[0, 0, 0].isnan().nonzero().flatten().tolist() == list(range(16))
