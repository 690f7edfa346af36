"""The FP4 cache on a CPU: the plain reference through the public class, and the kernels in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sage_kernels
from kv_cases import queries, relative_l1, tokens
from sage_kernels.formats.nvfp4 import quantize_groups
from sage_kernels.kv_cache import KVCache, cuda_decode
from sage_kernels.reference import attention_fp32

ROOT = Path(__file__).resolve().parent.parent


def test_kernels_agree_with_the_reference_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    packages = [str(Path(sage_kernels.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(packages)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreted/kv_cache.py"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout


def cache_with(k, v, **options):
    cache = KVCache(k.shape[0], k.shape[1], k.shape[2] + 10, k.shape[3], device="cpu", **options)
    cache.append(k, v)
    return cache


@pytest.mark.parametrize(("group", "bound"), [(16, 0.10), (32, 0.115), (64, 0.13)])
def test_attention_is_near_the_exact_one(group, bound):
    """Worst of these cases: 0.083, 0.095 and 0.105."""
    k, v = tokens(2, 2, 200, 64)
    q = queries(2, 4, 3, 64)
    output, lse = cache_with(k, v, group=group).attend(q, return_lse=True)
    exact, exact_lse = attention_fp32(q, k, v)
    assert relative_l1(output, exact) < bound
    assert (lse - exact_lse).abs().mean() < 0.05


def test_rotation_helps_where_keys_have_outliers_and_is_taken_back():
    k, v = tokens(1, 1, 300, 64)
    k = torch.where(torch.rand(k.shape, generator=torch.Generator().manual_seed(2)) < 0.04, k * 8, k)
    q = queries(1, 2, 16, 64) / 2
    exact, _ = attention_fp32(q, k, v)
    rotated, plain = (cache_with(k, v, rotate_keys=each) for each in (True, False))
    assert relative_l1(rotated.attend(q), exact) < 0.98 * relative_l1(plain.attend(q), exact)
    for cache in (rotated, plain):
        assert relative_l1(cache.dequantize()[0][:, :, :300], k) < 0.2


def test_subtracted_means_make_it_more_accurate_and_are_put_back_exactly():
    k, v = tokens(1, 1, 300, 64)
    q = queries(1, 1, 8, 64)
    exact, _ = attention_fp32(q, k, v)
    whole = cache_with(k, v)
    piecewise = KVCache(1, 1, 300, 64, device="cpu")
    piecewise.append(k[:, :, :4], v[:, :, :4])  # too few for a mean
    piecewise.append(k[:, :, 4:], v[:, :, 4:])
    assert not piecewise.key.means.any()
    assert relative_l1(whole.attend(q), exact) < 0.7 * relative_l1(piecewise.attend(q), exact)
    constant = torch.full_like(v, 0.3)
    assert cache_with(k, constant).attend(q).allclose(constant[:, :, :8], atol=1e-6)


def test_memory_is_less_than_29_percent_of_bf16():
    for group, least in ((16, 0.718), (32, 0.734), (64, 0.742)):
        cache = KVCache(1, 8, 8192, 128, device="cpu", group=group)
        assert 1 - cache.bytes / (2 * 8 * 8192 * 128 * 2) > least - 5e-4


@pytest.mark.parametrize("pieces", [[50], [30, 20], [17, *[1] * 33]])
def test_sequences_of_different_lengths(pieces):
    """Appending piece by piece, some sequences taking part of each, equals one cache for each sequence."""
    k, v = tokens(3, 2, 50, 64)
    lengths = torch.tensor([50, 20, 0])
    cache = KVCache(3, 2, 50, 64, device="cpu")
    start = 0
    for piece in pieces:
        counts = (lengths - start).clamp(0, piece).int()
        cache.append(k[:, :, start : start + piece], v[:, :, start : start + piece], counts)
        start += piece
    assert cache.lengths.tolist() == [50, 20, 0]
    q = queries(3, 4, 2, 64)
    output, lse = cache.attend(q, return_lse=True)
    for row, length in enumerate(lengths.tolist()[:2]):
        alone = KVCache(1, 2, 50, 64, device="cpu")
        start = 0
        for piece in pieces:
            stop = min(start + piece, length)
            if stop > start:
                alone.append(k[row : row + 1, :, start:stop], v[row : row + 1, :, start:stop])
            start += piece
        expected, expected_lse = alone.attend(q[row : row + 1], return_lse=True)
        torch.testing.assert_close(output[row : row + 1], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse[row : row + 1], expected_lse, rtol=1e-4, atol=1e-5)
    assert not output[2].any()
    assert (lse[2] == -torch.inf).all()


def test_causal_queries_are_the_last_tokens():
    k, v = tokens(1, 1, 40, 64)
    q = queries(1, 2, 3, 64)
    cache = cache_with(k, v)
    output = cache.attend(q, is_causal=True)
    for row in range(3):
        shorter = cache_with(k, v)
        shorter.lengths.fill_(40 - 2 + row)
        torch.testing.assert_close(output[:, :, row : row + 1], shorter.attend(q[:, :, row : row + 1]))


def test_rolling_keeps_the_newest_tokens():
    k, v = tokens(1, 1, 100, 64)
    cache = KVCache(1, 1, 32, 64, device="cpu", rolling=True)
    for start in range(0, 100, 20):
        cache.append(k[:, :, start : start + 20], v[:, :, start : start + 20])
    assert cache.lengths.tolist() == [32]
    keys, _ = cache.dequantize()
    newest = k[:, :, 68:]
    places = torch.arange(68, 100) % 32
    assert relative_l1(keys[:, :, places], newest) < 0.1


def test_reset_empties_marked_sequences_and_their_means_begin_anew():
    k, v = tokens(2, 1, 30, 64)
    cache = cache_with(k, v, rotate_keys=False)
    means = cache.key.means.clone()
    cache.reset(torch.tensor([True, False]))
    assert cache.lengths.tolist() == [0, 30]
    cache.append(k + 1, v, torch.tensor([30, 0], dtype=torch.int32))
    assert cache.key.means[0].allclose(means[0] + 1, atol=1e-5)
    assert torch.equal(cache.key.means[1], means[1])
    cache.reset()
    assert not cache.lengths.any()


def test_inputs_stay_as_they_are_and_bad_ones_are_refused():
    k, v = tokens(2, 2, 30, 64)
    before = k.clone(), v.clone()
    cache = cache_with(k, v)
    assert torch.equal(k, before[0])
    assert torch.equal(v, before[1])
    q = queries(2, 4, 1, 64)
    refused = [
        (ValueError, "don't fit", lambda: cache.append(k, v)),
        (ValueError, "one shape", lambda: cache.append(k, v[:, :, :5])),
        (ValueError, r"k must be \[2, 2, any, 64\]", lambda: cache.append(k[:1], v[:1])),
        (TypeError, "k must be a float16", lambda: cache.append(k.double(), v)),
        (ValueError, "counts must be int32", lambda: cache.append(k, v, torch.tensor([1, 2]))),
        (ValueError, "multiple of the cache's 2", lambda: cache.attend(q[:, :3])),
        (ValueError, "splits must be 1 to 256", lambda: cache.attend(q, splits=0)),
        (ValueError, "fill the GPU, got 257", lambda: cache.attend(q, splits=257)),
        (ValueError, "requires a gradient", lambda: cache.attend(q.clone().requires_grad_())),
        (ValueError, "head_dim must be one of", lambda: KVCache(1, 1, 8, 96, device="cpu")),
        (ValueError, "group must be one of", lambda: KVCache(1, 1, 8, 64, device="cpu", group=8)),
        (ValueError, "at least 1", lambda: KVCache(1, 1, 0, 64, device="cpu")),
        (ValueError, "bool", lambda: cache.reset(torch.tensor([1, 0]))),
        (ValueError, "rolling cache holds", lambda: KVCache(2, 2, 8, 64, device="cpu", rolling=True).append(k, v)),
        (
            ValueError,
            "order",
            lambda: KVCache(2, 2, 8, 64, device="cpu", rolling=True).attend(q, is_causal=True),
        ),
    ]
    for error, message, call in refused:
        with pytest.raises(error, match=message):
            call()
    assert cache.lengths.tolist() == [30, 30]


def test_four_over_six_takes_the_better_scale_of_each_group():
    groups = torch.randn(500, 16, generator=torch.Generator().manual_seed(0)) * 10
    six, four_over_six = (quantize_groups(groups, four_over_six=each) for each in (False, True))

    def squared_errors(values, scales):
        return (groups - values * scales).square().sum(-1)

    assert (squared_errors(*four_over_six) <= squared_errors(*six)).all()
    assert squared_errors(*four_over_six).sum() < 0.95 * squared_errors(*six).sum()
    values, scales = quantize_groups(torch.tensor([[4.0, 3.0, 2.0] + [0.0] * 13]), four_over_six=True)
    assert (values * scales)[0, :3].tolist() == [4.0, 3.0, 2.0]


def test_splits_fill_the_gpu_and_leave_work_to_each_block():
    slots = 396
    for blocks in (1, 8, 40, 64, 256, 300, 1000):
        for capacity in (1, 100, 4096, 32768, 1 << 20):
            splits = cuda_decode.choose_splits(blocks, capacity, slots)
            assert 1 <= splits <= 256
            assert splits == 1 or capacity // splits >= 256
            rounds = -(-blocks * splits // slots)
            full = blocks * splits / (rounds * slots)
            assert full >= 0.9 or splits in (256, capacity // 256) or capacity < 512 or blocks > 200
    assert cuda_decode.choose_splits(64, 32768, slots) == 6


def test_the_cuda_kernel_is_for_gpus_and_few_rows():
    assert not cuda_decode.serves(torch.device("cpu"), 64, 1)
    assert not cuda_decode.serves(torch.device("cuda", 0), 64, 65)
