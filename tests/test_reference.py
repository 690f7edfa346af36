"""The references: exact attention against torch, quantised attention against exact attention."""

import itertools
from dataclasses import replace

import pytest
import torch

from sage_kernels import reference
from sage_kernels.recipes import EXACT, RECIPES, SAGE_ATTENTION_3, Recipe
from sage_kernels.reference import attention_fp32, power_of_two_scale, quantized_attention
from sage_kernels.score_mask import ScoreMask

sdpa = torch.nn.functional.scaled_dot_product_attention

# Relative L1 of each recipe on Gaussian inputs, where nothing can be smoothed away. Worst measured in the cases
# below: 0.184, 0.136, 0.037, 0.012; the budgets leave 10 to 15 % for other random numbers.
GAUSSIAN_BUDGET = {"fp4": 0.205, "fp8_fp4": 0.155, "int8": 0.042, "int8_fp16": 0.0135}


def relative_l1(output, expected):
    return ((output - expected).abs().sum() / expected.abs().sum()).item()


def qkv(batch=2, heads=4, kv_heads=None, rows=100, keys=127, head_dim=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads, rows), (kv_heads or heads, keys), (kv_heads or heads, keys)]
    return [torch.randn(batch, h, n, head_dim, generator=generator) for h, n in shapes]


def masks(kind, batch=2, heads=4, rows=100, keys=127):
    generator = torch.Generator().manual_seed(1)
    shape = {"full": (batch, heads, rows, keys), "row": (rows, keys), "keys": (batch, 1, 1, keys)}[kind.split("_")[1]]
    allowed = torch.rand(shape, generator=generator) > 0.3
    allowed[..., 0] = True  # no fully masked row: those are tested on their own
    if kind.startswith("bool"):
        return allowed
    return torch.where(allowed, torch.randn(shape, generator=generator), -torch.inf)


MASK_KINDS = [f"{dtype}_{shape}" for dtype in ("bool", "additive") for shape in ("full", "row", "keys")]


@pytest.mark.parametrize("head_dim", [1, 16, 40, 72, 96, 128, 160, 256])
def test_exact_reference_equals_torch_at_every_head_dim(head_dim):
    q, k, v = qkv(head_dim=head_dim)
    assert relative_l1(attention_fp32(q, k, v)[0], sdpa(q, k, v)) < 1e-6


@pytest.mark.parametrize(("rows", "keys"), [*itertools.product([1, 63, 130], [1, 64, 129, 600])])
@pytest.mark.parametrize("is_causal", [False, True])
def test_exact_reference_equals_torch_at_every_length(rows, keys, is_causal):
    q, k, v = qkv(rows=rows, keys=keys)
    expected = sdpa(q, k, v, is_causal=is_causal)
    assert relative_l1(attention_fp32(q, k, v, is_causal=is_causal)[0], expected) < 1e-6


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_exact_reference_equals_torch_with_masks(kind):
    q, k, v = qkv()
    mask = masks(kind)
    assert relative_l1(attention_fp32(q, k, v, attn_mask=mask)[0], sdpa(q, k, v, attn_mask=mask)) < 1e-6


def test_exact_reference_equals_torch_with_finite_mask_minimum_in_a_whole_row():
    """torch averages over the row then, because all scores are equally low."""
    q, k, v = qkv()
    mask = torch.zeros(100, 127)
    mask[3] = torch.finfo(torch.float32).min
    assert torch.allclose(attention_fp32(q, k, v, attn_mask=mask)[0], sdpa(q, k, v, attn_mask=mask), atol=1e-5)


def test_exact_reference_equals_torch_with_grouped_heads_and_scale():
    q, k, v = qkv(heads=6, kv_heads=2)
    expected = sdpa(q, k, v, enable_gqa=True, scale=0.3)
    assert relative_l1(attention_fp32(q, k, v, scale=0.3)[0], expected) < 1e-6


@pytest.mark.parametrize("recipe", [EXACT, *RECIPES.values()], ids=["exact", *RECIPES])
def test_lse_is_that_of_the_true_scores(recipe):
    q, k, v = qkv()
    k = k + 2  # what smoothing K takes away must come back
    mask = masks("additive_full")
    expected = torch.logsumexp(q @ k.transpose(-1, -2) * 0.1 + mask, dim=-1)
    _, lse = quantized_attention(q, k, v, recipe, attn_mask=mask, scale=0.1)
    if recipe is EXACT:
        assert (lse - expected).abs().max() < 1e-5
    else:  # the row sum is that of the quantised weights; measured mean 0.025 with fp4
        assert (lse - expected).abs().mean() < 0.03


@pytest.mark.parametrize("precision", RECIPES)
@pytest.mark.parametrize(
    "case", ["plain", "causal", "causal_wide", "bool_full", "additive_row", "grouped", "head_dim_40"]
)
def test_quantised_error_stays_in_the_budget(precision, case):
    q, k, v = qkv(
        rows=300,
        keys=500 if case == "causal_wide" else 300,
        kv_heads=2 if case == "grouped" else None,
        head_dim=40 if case == "head_dim_40" else 128,
    )
    options = {"is_causal": case.startswith("causal")}
    if "_full" in case or "_row" in case:
        options["attn_mask"] = masks(case, rows=300, keys=300)
    exact, _ = attention_fp32(q, k, v, **options)
    output, _ = quantized_attention(q, k, v, RECIPES[precision], **options)
    assert 0 < relative_l1(output, exact) < GAUSSIAN_BUDGET[precision]


@pytest.mark.parametrize("precision", RECIPES)
def test_weights_sum_to_one_as_quantised(precision):
    """Normalising by the sum of the unquantised weights would be off by their rounding error."""
    q, k, _ = qkv()
    ones = torch.ones(2, 4, 127, 64)
    output, _ = quantized_attention(q, k, ones, RECIPES[precision])
    assert torch.allclose(output, ones[:, :, :100], atol=1e-5)


def test_smoothing_k_removes_a_shared_bias_exactly():
    """Softmax is invariant to it, so the bias must cost nothing (SageAttention3, section 3.1)."""
    q, k, v = qkv()
    bias = 8 * torch.randn(1, 4, 1, 64)
    exact, _ = attention_fp32(q, k, v)
    without, _ = quantized_attention(q, k + bias, v, Recipe("nvfp4", "nvfp4", smooth_k=False))
    smooth, _ = quantized_attention(q, k + bias, v, SAGE_ATTENTION_3)
    unbiased, _ = quantized_attention(q, k, v, SAGE_ATTENTION_3)
    assert relative_l1(smooth, unbiased) < 0.02
    assert relative_l1(without, exact) > 3 * relative_l1(smooth, exact)


def test_smoothing_q_pays_where_rows_of_a_block_share_a_bias():
    q, k, v = qkv(rows=256)
    q = q + 8 * torch.randn(2, 4, 2, 64).repeat_interleave(128, dim=2)
    exact, _ = attention_fp32(q, k, v)
    only_k, _ = quantized_attention(q, k, v, Recipe("nvfp4", "none"))
    both, _ = quantized_attention(q, k, v, Recipe("nvfp4", "none", smooth_q_rows=128))
    assert relative_l1(both, exact) < 0.5 * relative_l1(only_k, exact)


def test_smoothing_q_takes_the_mean_of_a_short_last_block_over_its_own_rows():
    q, k, v = qkv(rows=138)
    q = q + 8 * torch.randn(2, 4, 1, 64)
    exact, _ = attention_fp32(q, k, v)
    smooth, _ = quantized_attention(q, k, v, Recipe("nvfp4", "none", smooth_q_rows=128))
    full, tail = slice(0, 128), slice(128, 138)
    assert relative_l1(smooth[:, :, tail], exact[:, :, tail]) < 1.3 * relative_l1(smooth[:, :, full], exact[:, :, full])


@pytest.mark.parametrize("rows", [256, 250])
def test_correcting_the_rounding_of_keys_pays_where_rows_of_a_block_share_a_mean(rows):
    q, k, v = qkv(rows=rows)
    q = q + 8 * torch.randn(2, 4, 8, 64).repeat_interleave(32, dim=2)[:, :, :rows]
    exact, _ = attention_fp32(q, k, v)
    without, _ = quantized_attention(q, k, v, Recipe("mxfp8", "none"))
    corrected, _ = quantized_attention(q, k, v, Recipe("mxfp8", "none", key_correction_rows=32))
    assert relative_l1(corrected, exact) < 0.8 * relative_l1(without, exact)


def test_a_mean_query_is_subtracted_or_kept():
    with pytest.raises(ValueError, match="not both"):
        Recipe("mxfp8", "nvfp4", smooth_q_rows=32, key_correction_rows=32)


def test_smoothing_v_pays_where_v_has_a_mean():
    q, k, v = qkv()
    v = v + 4
    exact, _ = attention_fp32(q, k, v)
    plain, _ = quantized_attention(q, k, v, Recipe("none", "nvfp4"))
    smooth, _ = quantized_attention(q, k, v, Recipe("none", "nvfp4", smooth_v=True))
    assert relative_l1(smooth, exact) < 0.5 * relative_l1(plain, exact)


@pytest.mark.parametrize("precision", ["fp4", "fp8_fp4"])
def test_four_over_six_lowers_the_error(precision):
    q, k, v = qkv(rows=300, keys=300, head_dim=128)
    exact, _ = attention_fp32(q, k, v)
    without = replace(RECIPES[precision], four_over_six="")
    errors = [relative_l1(quantized_attention(q, k, v, each)[0], exact) for each in (RECIPES[precision], without)]
    assert errors[0] < 0.98 * errors[1]


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 1e2, 1e4])
def test_error_does_not_depend_on_the_size_of_the_tensors(size):
    q, k, v = qkv()
    scale = 0.125 / size**2
    exact, _ = attention_fp32(q * size, k * size, v * size, scale=scale)
    for precision, recipe in RECIPES.items():
        output, _ = quantized_attention(q * size, k * size, v * size, recipe, scale=scale)
        assert relative_l1(output, exact) < GAUSSIAN_BUDGET[precision]


def test_power_of_two_scale_brings_the_maximum_into_range():
    x = torch.logspace(-30, 30, 200)[None, :, None, None] * torch.ones(1, 200, 3, 5)
    scale = power_of_two_scale(x)
    scaled = (x * scale).amax(dim=(2, 3))
    assert ((scaled > 672) & (scaled <= 1344)).all()
    assert (torch.frexp(scale)[0] == 0.5).all()
    odd = torch.tensor([0.0, torch.nan, torch.inf])[None, :, None, None]
    assert power_of_two_scale(odd).eq(1).all()


@pytest.mark.parametrize("recipe", [EXACT, *RECIPES.values()], ids=["exact", *RECIPES])
def test_fully_masked_rows_give_zeros_and_minus_infinity(recipe):
    q, k, v = qkv()
    mask = torch.ones(100, 127, dtype=torch.bool)
    mask[7] = False
    output, lse = quantized_attention(q, k, v, recipe, attn_mask=mask)
    assert not output[:, :, 7].any()
    assert lse[:, :, 7].eq(-torch.inf).all()
    assert output[:, :, 6].any()


@pytest.mark.parametrize("recipe", [EXACT, *RECIPES.values()], ids=["exact", *RECIPES])
def test_keys_beyond_their_length_have_no_influence_at_all(recipe):
    q, k, v = qkv()
    lengths = torch.tensor([64, 5], dtype=torch.int32)
    outputs = []
    for garbage in (torch.nan, 1e4):
        for b, length in enumerate(lengths):
            k[b, :, length:], v[b, :, length:] = garbage, garbage
        outputs.append(quantized_attention(q, k, v, recipe, key_lengths=lengths))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])
    for b, length in enumerate(lengths):
        alone, lse = quantized_attention(q[b : b + 1], k[b : b + 1, :, :length], v[b : b + 1, :, :length], recipe)
        assert torch.allclose(outputs[0][0][b], alone[0], atol=2e-3)
        assert torch.allclose(outputs[0][1][b], lse[0], atol=2e-3)


@pytest.mark.parametrize("recipe", [EXACT, *RECIPES.values()], ids=["exact", *RECIPES])
def test_tiles_bound_memory_and_do_not_change_the_result(recipe, monkeypatch):
    q, k, v = qkv(batch=1, heads=2, rows=2000, keys=700, head_dim=32)
    whole, _ = quantized_attention(q, k, v, recipe, is_causal=True)
    sizes = []
    apply = ScoreMask.apply
    monkeypatch.setattr(ScoreMask, "apply", lambda *args: sizes.append(args[1].numel()) or apply(*args))
    limit = 2 * 128 * recipe.key_block
    monkeypatch.setattr(reference, "_TILE_ELEMENTS", limit)
    tiled, _ = quantized_attention(q, k, v, recipe, is_causal=True)
    assert max(sizes) <= limit
    assert relative_l1(tiled, whole) < 1e-3


def test_causal_skips_tiles_above_the_diagonal(monkeypatch):
    q, k, v = qkv(batch=1, heads=1, rows=256, keys=1024, head_dim=16)
    tiles = []
    apply = ScoreMask.apply
    monkeypatch.setattr(ScoreMask, "apply", lambda *args: tiles.append(args[2:]) or apply(*args))
    monkeypatch.setattr(reference, "_TILE_ELEMENTS", 1)
    quantized_attention(q, k, v, SAGE_ATTENTION_3, is_causal=True)
    assert [(rows.start, keys.start) for rows, keys in tiles] == [(0, 0), (128, 0), (128, 128)]


@pytest.mark.parametrize("threshold", [0.0, 1.0, 3.0])
def test_deferred_rescaling_keeps_headroom(threshold, monkeypatch):
    """Scores that rise from tile to tile would leave P's range if the stretch left no room for them."""
    q, k, v = qkv(keys=512)
    k = k * torch.linspace(0.1, 3, 512)[:, None]
    exact, _ = attention_fp32(q, k, v)
    eager, _ = quantized_attention(q, k, v, SAGE_ATTENTION_3)
    largest = []
    round_p = reference.round_p
    monkeypatch.setattr(
        reference, "round_p", lambda p, recipe: largest.append(2 ** p.max().item()) or round_p(p, recipe)
    )
    recipe = Recipe("nvfp4", "nvfp4", smooth_q_rows=128, rescale_threshold=threshold)
    deferred, _ = quantized_attention(q, k, v, recipe)
    assert 2688 * 0.9 < max(largest) <= 2688 * 1.0001
    assert relative_l1(deferred, exact) < 1.05 * relative_l1(eager, exact)


def test_a_nan_in_one_query_row_stays_in_its_block_of_rows():
    q, k, v = qkv(rows=300)
    q[0, 0, 10, 3] = torch.nan
    output, _ = quantized_attention(q, k, v, RECIPES["int8_fp16"])
    assert output[0, 0, 10].isnan().all()
    assert output[0, 0, 32:].isfinite().all()
    assert output[0, 1:].isfinite().all()


def test_no_query_rows_give_an_empty_result():
    q, k, v = qkv(rows=0)
    for recipe in (EXACT, *RECIPES.values()):
        output, lse = quantized_attention(q, k, v, recipe)
        assert output.shape == (2, 4, 0, 64)
        assert lse.shape == (2, 4, 0)


@pytest.mark.parametrize("precision", RECIPES)
def test_key_lengths_beyond_the_keys_change_nothing(precision):
    q, k, v = qkv()
    expected, _ = quantized_attention(q, k, v, RECIPES[precision])
    lengths = torch.tensor([127, 500], dtype=torch.int32)
    output, _ = quantized_attention(q, k, v, RECIPES[precision], key_lengths=lengths)
    assert torch.allclose(output, expected, atol=1e-5)


def test_sum_of_unrounded_weights_gives_the_exact_lse_of_the_quantised_scores():
    q, k, v = qkv(keys=40)
    _, expected = quantized_attention(q, k, v, Recipe("int8", "none"))
    errors = []
    for quantized_row_sum in (False, True):
        _, lse = quantized_attention(q, k, v, Recipe("int8", "fp8", quantized_row_sum=quantized_row_sum))
        errors.append((lse - expected).abs().max().item())
    assert errors[0] < 1e-5
    assert errors[1] > 1e-3


@pytest.mark.parametrize("quantized_row_sum", [False, True])
def test_line_exponentials_cost_little_in_fp8(quantized_row_sum):
    q, k, v = qkv(keys=600)
    exact, exact_lse = attention_fp32(q, k, v)
    plain, _ = quantized_attention(q, k, v, Recipe("int8", "fp8"))
    recipe = Recipe("int8", "fp8", linear_exp_of_8=4, quantized_row_sum=quantized_row_sum)
    lines, lse = quantized_attention(q, k, v, recipe)
    assert relative_l1(plain, exact) < relative_l1(lines, exact) < 1.15 * relative_l1(plain, exact)
    assert (lse - exact_lse).abs().mean() < 5e-3


def test_line_exponentials_leave_masked_rows_empty():
    q, k, v = qkv(keys=40)
    mask = torch.ones(q.shape[2], 40, dtype=torch.bool)
    mask[7] = False
    recipe = Recipe("int8", "fp8", smooth_v=True, linear_exp_of_8=4, quantized_row_sum=False)
    output, lse = quantized_attention(q, k, v, recipe, attn_mask=mask)
    assert not output[:, :, 7].any()
    assert (lse[:, :, 7] == -torch.inf).all()


@pytest.mark.parametrize("shares", [2, 3])
def test_softmaxes_over_shares_of_the_keys_merge_into_one(shares):
    """More shares than some rows have key blocks, and rows that see no key of a share."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 700, 32, generator=generator) for _ in range(3))
    recipe = replace(EXACT, key_block=128, key_shares=shares)
    for options in ({}, {"is_causal": True}, {"key_lengths": torch.tensor([130], dtype=torch.int32)}):
        found = quantized_attention(q, k, v, recipe, **options)
        for x, wanted in zip(found, attention_fp32(q, k, v, **options), strict=True):
            torch.testing.assert_close(x, wanted, rtol=1e-5, atol=1e-5)
