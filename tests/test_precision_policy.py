"""Block overrides as text, and the precision that the policy chooses."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_kernels.block_overrides import (
    BlockId,
    BlockLayout,
    BlockOverride,
    BlockOverrideError,
    StepShare,
    format_block_overrides,
    parse_block_overrides,
    resolve_block_overrides,
)
from sage_kernels.precision_policy import PrecisionPolicy, fp16_steps, noise_rank

FLUX = BlockLayout({"double": 19, "single": 38})
WAN = BlockLayout({"double": 30, "vace": 0})
BLOCK = BlockId("double", 0)
TEN_STEPS = tuple(1 - step / 10 for step in range(11))

overrides = st.builds(
    lambda first, length, share, end, block_type: BlockOverride(first, first + length, share, end, block_type),
    st.integers(0, 999),
    st.integers(0, 99),
    st.floats(0, 1),
    st.sampled_from(["high", "low"]),
    st.none() | st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True),
)


def choose(policy, block=BLOCK, sigma=None, schedule=None, query_tokens=4096, key_tokens=4096):
    return policy.choose(
        block, sigma=sigma, schedule=schedule, query_tokens=query_tokens, key_tokens=key_tokens
    ).precision


def fp16_at(share, end="high", schedule=TEN_STEPS, sigmas=None):
    policy = PrecisionPolicy("fp4", {BLOCK: StepShare(share, end)})
    return [choose(policy, sigma=sigma, schedule=schedule) == "fp16" for sigma in sigmas or schedule[:-1]]


# --- text -------------------------------------------------------------------------------------------------------------


@given(st.lists(overrides, max_size=6))
def test_formatted_overrides_are_read_back(some):
    assert parse_block_overrides(format_block_overrides(some)) == tuple(some)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("", ""),
        (" \n", ""),
        ("0-2: 1, 17: 0.5", "0-2: 1, 17: 0.5"),
        ("double.3 :1,single.0-5:.5 low,", "double.3: 1, single.0-5: 0.5 low"),
        ("0 - 2 : 1.0\n 17:0.5   high \n", "0-2: 1, 17: 0.5"),
        ("4-4: 0", "4: 0"),
    ],
)
def test_spacing_and_trailing_commas_are_free(text, canonical):
    assert format_block_overrides(parse_block_overrides(text)) == canonical


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("3-1: 2", ["override 1", "'3-1: 2'", "3-1 runs backwards (write 1-3)", "2 is outside 0 to 1"]),
        ("0: 1, 5: -0.5", ["override 2", "'5: -0.5'", "-0.5 is outside 0 to 1"]),
        ("0: 1, , first: 1", ["override 2", "'first: 1'", "'0-2: 1'"]),
        ("7", ["'7'", "BLOCKS: SHARE"]),
        ("0-2: 1 17: 0.5", ["'0-2: 1 17: 0.5'", "separated by commas"]),
        ("3: nan", ["'3: nan'", "not understood"]),
        ("3: 0.5 middle", ["'middle'", "high, low"]),
        ("\u0663: 1", ["not understood"]),
        ("bl\u00f6ck.1: 1", ["not understood"]),
    ],
)
def test_text_that_cannot_be_read_is_a_one_line_error(text, parts):
    with pytest.raises(BlockOverrideError) as error:
        parse_block_overrides(text)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


# --- blocks -----------------------------------------------------------------------------------------------------------


def test_bare_numbers_count_through_all_blocks_and_typed_ones_within_their_type():
    shares = resolve_block_overrides(parse_block_overrides("18-19: 1, single.5: 0.25 low"), FLUX)
    assert shares == {
        BlockId("double", 18): StepShare(1.0),
        BlockId("single", 0): StepShare(1.0),
        BlockId("single", 5): StepShare(0.25, "low"),
    }


def test_layout_lists_and_names_blocks():
    assert len(FLUX) == 57
    assert list(FLUX)[19] == BlockId("single", 0)
    assert BlockId("single", 37) in FLUX
    assert BlockId("single", 38) not in FLUX
    assert FLUX.name(BlockId("single", 3)) == "single.3"
    assert WAN.name(BlockId("double", 3)) == "3"
    assert (str(FLUX), str(WAN)) == ("double.0-18, single.0-37", "0-29")


@pytest.mark.parametrize(
    ("text", "layout", "parts"),
    [
        ("30: 1", WAN, ["'30: 1'", "no block 30", "0-29"]),
        ("20-57: 1", FLUX, ["no block 57", "0-56 (double.0-18, single.0-37)"]),
        ("double.19: 1", FLUX, ["double.0-18"]),
        ("triple.0: 1", FLUX, ["'triple'", "double.0-18, single.0-37"]),
        ("0-5: 1, double.3: 0.5", FLUX, ["double.3 is named twice", "'0-5: 1'", "'double.3: 0.5'"]),
        ("0: 1", BlockLayout({}), ["none"]),
    ],
)
def test_blocks_that_the_model_has_not_are_a_one_line_error(text, layout, parts):
    with pytest.raises(BlockOverrideError) as error:
        PrecisionPolicy.for_model(layout, "fp4", text)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


# --- choice -----------------------------------------------------------------------------------------------------------


def test_default_precision_where_nothing_speaks_against_it():
    assert choose(PrecisionPolicy("fp4")) == "fp4"
    assert PrecisionPolicy().precision == "auto"


def test_attention_outside_the_blocks_stays_in_fp16():
    assert choose(PrecisionPolicy("fp4"), block=None) == "fp16"


def test_few_query_or_key_tokens_stay_in_fp16():
    policy = PrecisionPolicy("fp4", min_tokens=1024)
    assert choose(policy, query_tokens=1024, key_tokens=1024) == "fp4"
    assert choose(policy, key_tokens=1023) == "fp16"
    assert choose(policy, query_tokens=1023) == "fp16"


def test_cross_attention_is_told_by_its_lengths_and_kept_in_fp16_where_asked():
    policy = PrecisionPolicy("fp4", cross_attention="fp16")
    assert choose(policy, key_tokens=512) == "fp16"
    assert choose(policy) == "fp4"
    assert choose(PrecisionPolicy("fp4"), key_tokens=512) == "fp4"


def test_an_unknown_cross_attention_policy_is_refused():
    with pytest.raises(ValueError, match="cross_attention must be same or fp16, got 'int8'"):
        PrecisionPolicy.for_model(WAN, "fp4", cross_attention="int8")


def test_share_covers_the_first_steps_or_the_last():
    assert fp16_at(0.3) == [True] * 3 + [False] * 7
    assert fp16_at(0.3, "low") == [False] * 7 + [True] * 3
    assert fp16_at(0.0) == [False] * 10
    assert fp16_at(1.0, "low") == [True] * 10


@pytest.mark.parametrize(
    ("share", "steps", "expected"),
    [
        (0.25, 10, 3),
        (0.24, 10, 2),
        (0.145, 100, 15),
        (0.01, 10, 1),
        (0.99, 10, 9),
        (0.2, 1, 1),
        (0, 10, 0),
        (1, 10, 10),
    ],
)
def test_share_is_rounded_but_never_to_none_or_all(share, steps, expected):
    assert fp16_steps(share, steps) == expected


def test_stages_between_two_steps_belong_to_the_step_that_began_above_them():
    assert fp16_at(0.5, sigmas=[0.65, 0.61, 0.55, 0.51, 0.45]) == [True, True, True, True, False]
    assert fp16_at(0.5, sigmas=[1.4]) == [True], "a sampler that adds noise goes above the first sigma"
    assert fp16_at(0.5, "low", sigmas=[0.0]) == [True]


def test_sigmas_that_differ_by_rounding_are_the_same_step():
    sixth_step = TEN_STEPS[5]
    assert fp16_at(0.5, sigmas=[sixth_step * (1 + 1e-7), sixth_step * (1 - 1e-7)]) == [False, False]
    fifth_step = TEN_STEPS[4]
    assert fp16_at(0.5, sigmas=[fifth_step * (1 + 1e-7), fifth_step * (1 - 1e-7)]) == [True, True]


def test_steps_are_ranked_by_noise_in_a_run_from_low_to_high():
    upwards = TEN_STEPS[::-1]
    assert [noise_rank(sigma, upwards) for sigma in upwards[:-1]] == list(range(9, -1, -1))


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=30, unique=True), st.floats(0.0, 1.0))
def test_a_share_at_either_end_is_the_same_number_of_steps(sigmas, share):
    schedule = (*sorted((sigma / 10 for sigma in sigmas), reverse=True), 0.0)
    steps = fp16_steps(share, len(sigmas))
    assert fp16_at(share, "high", schedule) == [True] * steps + [False] * (len(sigmas) - steps)
    assert fp16_at(share, "low", schedule) == [False] * (len(sigmas) - steps) + [True] * steps


@pytest.mark.parametrize(("share", "expected"), [(0.0, "fp4"), (0.5, "fp16"), (1.0, "fp16")])
@pytest.mark.parametrize(("sigma", "schedule"), [(None, None), (0.9, None), (None, TEN_STEPS)])
def test_share_without_a_known_step_is_never_guessed_but_kept_in_fp16(share, expected, sigma, schedule):
    policy = PrecisionPolicy("fp4", {BLOCK: StepShare(share, "low")})
    assert choose(policy, sigma=sigma, schedule=schedule) == expected


def test_window_includes_its_start_and_excludes_its_end():
    policy = PrecisionPolicy("fp4", sigma_start=0.9, sigma_end=0.5)
    precisions = [choose(policy, sigma=sigma) for sigma in (1.0, 0.9 + 1e-8, 0.7, 0.5, 0.1)]
    assert precisions == ["fp16", "fp4", "fp4", "fp16", "fp16"]
    assert choose(policy, sigma=None) == "fp16"


def test_only_policies_that_look_at_the_step_ask_for_sigma():
    assert not PrecisionPolicy("fp4", {BLOCK: StepShare(1.0)}, min_tokens=9).depends_on_step
    assert PrecisionPolicy("fp4", {BLOCK: StepShare(0.5)}).depends_on_step
    assert PrecisionPolicy("fp4", sigma_end=0.1).depends_on_step


def test_every_fp16_choice_has_a_reason():
    policy = PrecisionPolicy("fp4", {BLOCK: StepShare(1.0)}, sigma_start=0.5, min_tokens=10)
    reasons = {
        policy.choose(block, sigma=sigma, schedule=None, query_tokens=tokens, key_tokens=tokens).reason
        for block, sigma, tokens in [(None, 0.1, 10), (BLOCK, 0.1, 9), (BLOCK, 0.9, 10), (BLOCK, 0.1, 10)]
    }
    assert None not in reasons
    assert len(reasons) == 4
    asked = PrecisionPolicy("fp16").choose(BLOCK, sigma=None, schedule=None, query_tokens=1, key_tokens=1)
    assert asked.reason is not None


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"precision": "fp2"}, "fp4"),
        ({"min_tokens": -1}, "0 or more"),
        ({"sigma_start": 0.1, "sigma_end": 0.5}, "higher"),
        ({"sigma_start": math.nan}, "higher"),
    ],
)
def test_bad_policies_are_refused(arguments, part):
    with pytest.raises(ValueError, match=part):
        PrecisionPolicy(**arguments)
