"""The choice of FP16 blocks and steps: never worse than trying everything, and written as the parser reads it."""

import dataclasses
import itertools
import math
import sys
from types import ModuleType

import pytest
import torch

from sage_kernels.block_overrides import BlockId, BlockLayout, parse_block_overrides, resolve_block_overrides
from sage_kernels.precision_policy import fp16_steps

FINGERPRINT = "0" * 64


@pytest.fixture
def choice(pack_module):
    return pack_module("fp16_choice")


@pytest.fixture
def make_profile(pack_module):
    def make_profile(sensitivity, shares=None, steps=4, looked_at=(0, 3), counts=None):
        sensitivity = torch.as_tensor(sensitivity, dtype=torch.float32)
        blocks = len(sensitivity)
        shares = torch.tensor(shares or [1.0] * blocks)
        return pack_module("profile").CalibrationProfile(
            family="Wan",
            fingerprint=FINGERPRINT,
            pack_version="0.1.0",
            layout=BlockLayout(counts or {"double": blocks}),
            schedule=tuple(1 - step / steps for step in range(steps + 1)),
            steps=looked_at,
            precisions=("fp4",),
            heads=(1,) * blocks,
            errors=torch.zeros(1, blocks, 1, len(looked_at)),
            sensitivity=sensitivity[None],
            final_errors=torch.tensor([[0.3, 0.4][: len(looked_at)]]),
            full_error=torch.tensor([0.6]),
            attention_share=shares / shares.sum(),
        )

    return make_profile


@pytest.fixture(params=[None, [1.0, 0.5, 0.25]], ids=["equal blocks", "unequal blocks"])
def profile(make_profile, request):
    generator = torch.Generator().manual_seed(3)
    return make_profile(torch.rand(3, 2, generator=generator), request.param)


def everything(cells, work):
    """(error, part of the work) of every combination of a number of steps at one end for each block."""
    blocks, steps = cells.shape
    squares = cells.square()
    options = [(count, end) for count in range(steps + 1) for end in ("high", "low")]
    for combination in itertools.product(options, repeat=blocks):
        error = cost = 0.0
        for row, (count, end) in enumerate(combination):
            left = squares[row, count:] if end == "high" else squares[row, : steps - count]
            error += float(left.sum())
            cost += count * float(work[row]) / steps
        yield math.sqrt(error), cost


@pytest.mark.parametrize("max_work", [0.0, 0.1, 0.25, 0.5, 0.8, 1.0])
def test_no_choice_of_equal_work_has_a_smaller_error(choice, profile, max_work):
    best = choice.choose_for_work(profile, "fp4", max_work)
    tried = everything(choice.cell_errors(profile, "fp4"), profile.attention_share)
    smallest = min(error for error, work in tried if work <= max_work + 1e-6)
    assert best.predicted_error == pytest.approx(smallest, abs=1e-7)
    assert best.work <= max_work + 1e-6


@pytest.mark.parametrize("max_error", [0.05, 0.2, 0.4, 0.59])
def test_no_choice_of_equal_error_takes_less_work(choice, profile, max_error):
    best = choice.choose_for_error(profile, "fp4", max_error)
    tried = everything(choice.cell_errors(profile, "fp4"), profile.attention_share)
    least = min(work for error, work in tried if error <= max_error)
    assert best.predicted_error <= max_error + 1e-6
    assert best.work == pytest.approx(least, abs=1e-6)


def test_the_ends_of_the_scale(choice, profile):
    assert choice.choose_for_error(profile, "fp4", 0.0).text == "0-2: 1"
    nothing = choice.choose_for_error(profile, "fp4", float(profile.full_error[0]))
    assert (nothing.text, nothing.steps, nothing.work) == ("", {}, 0.0)
    assert nothing.predicted_error == pytest.approx(0.6)


def test_the_prediction_is_that_of_the_outlined_cells(choice, profile):
    best = choice.choose_for_work(profile, "fp4", 0.4)
    mask = choice.fp16_mask(best, profile.layout, 4)
    cells = choice.cell_errors(profile, "fp4")
    assert math.sqrt(float(cells[~mask].square().sum())) == pytest.approx(best.predicted_error)


def test_the_text_means_the_choice(choice, make_profile):
    sensitivity = torch.rand(7, 2, generator=torch.Generator().manual_seed(1))
    profile = make_profile(sensitivity, steps=21, looked_at=(3, 15), counts={"double": 3, "single": 4})
    best = choice.choose_for_work(profile, "fp4", 0.5)
    shares = resolve_block_overrides(parse_block_overrides(best.text), profile.layout)
    meant = {block: (fp16_steps(share.share, 21), share.end) for block, share in shares.items()}
    whole = {block: (count, "high" if count == 21 else end) for block, (count, end) in best.steps.items()}
    assert meant == whole
    assert len(meant) > 3


@pytest.mark.parametrize("total", [1, 2, 3, 7, 20, 50])
def test_every_number_of_steps_has_a_share(choice, total):
    layout = BlockLayout({"double": 1})
    for count in range(1, total + 1):
        text = choice.overrides_text({BlockId("double", 0): (count, "low")}, layout, total)
        share = resolve_block_overrides(parse_block_overrides(text), layout)[BlockId("double", 0)]
        assert fp16_steps(share.share, total) == count
        assert len(text) <= len("0: 0.35 low")


def test_neighbours_share_an_entry(choice):
    layout = BlockLayout({"double": 3, "single": 2})
    steps = {BlockId("double", 1): (2, "low"), BlockId("double", 2): (2, "low"), BlockId("single", 0): (2, "low")}
    assert choice.overrides_text(steps, layout, 4) == "double.1-2: 0.5 low, single.0: 0.5 low"


def test_cells_add_up_to_what_was_measured(choice, make_profile):
    profile = make_profile([[0.1, 0.3], [0.2, 0.1]])
    cells = choice.cell_errors(profile, "fp4")
    first, second = (float(cells[:, part].square().sum().sqrt()) for part in (slice(0, 2), slice(2, 4)))
    assert first / second == pytest.approx(0.3 / 0.4)
    assert float(cells.square().sum().sqrt()) == pytest.approx(0.6)
    assert float(cells[0, 0] / cells[1, 0]) == pytest.approx(0.1 / 0.2)
    # The last step takes all of the model's output over, the one before, from 0.5 to 0.25, half of it.
    assert float(cells[0, 3] / cells[0, 2]) == pytest.approx(0.3 / (0.1 + 0.2 * 2 / 3) / 0.5)


def test_parts_of_the_schedule_meet_halfway(choice):
    assert choice.segments((3, 10, 16), 20) == [range(7), range(7, 13), range(13, 20)]
    assert choice.segments((0,), 1) == [range(1)]


def test_a_slowdown_buys_work_by_the_cost_of_fp16(choice, profile):
    assert choice.choose_for_slowdown(profile, "fp4", 0.75, cost=4.0).work <= 0.25
    slow = choice.choose_for_slowdown(profile, "fp4", 0.75, cost=2.5)
    assert slow == choice.choose_for_work(profile, "fp4", 0.5)
    assert slow != choice.choose_for_slowdown(profile, "fp4", 0.75, cost=4.0)
    assert choice.choose_for_slowdown(profile, "fp4", 0.3) == choice.choose_for_work(profile, "fp4", 0.1)


def timing_of(pack_module, speedup=None, **found):
    return pack_module("attention_timing").Timing({}, speedup, 12 if speedup else 0, **found)


@pytest.mark.parametrize(
    ("found", "value", "origin"),
    [
        ({"speedup": 1.7, "predicted_speedup": 2.5, "predicted_calls": 4}, 1.7, "measured"),
        ({"predicted_speedup": 2.5, "predicted_calls": 4}, 2.5, "predicted"),
        ({"speedup": 0.01, "emulated": True}, 4.0, "assumed"),
        ({"speedup": 0.01, "emulated": True, "predicted_speedup": 2.5}, 2.5, "predicted"),
        ({}, 4.0, "assumed"),
    ],
)
def test_what_fp16_costs_is_measured_else_predicted_else_assumed(
    choice, goals, profile, pack_module, found, value, origin
):
    known = choice.cost_settings("fp4", timing_of(pack_module, **found))
    told = dataclasses.replace(profile, settings={**profile.settings, **known})
    cost = choice.fp16_cost(told, "fp4")
    assert (cost.value, cost.origin) == (value, origin)
    best = choice.choose_for_slowdown(told, "fp4", 0.3)
    assert best == choice.choose_for_work(profile, "fp4", 0.3 / (value - 1))
    text = goals.report(best, 0.1, "fp4", cost)
    assert f"FP16 takes {value:.2f}x the time of fp4" in text
    assert {"measured": "as measured", "predicted": "as predicted", "assumed": "an assumption"}[origin] in text


def test_where_low_precision_gains_no_speed_everything_stays_in_fp16(choice, goals, profile):
    slow = dataclasses.replace(profile, settings={"fp16_cost_fp4": 0.9, "fp16_cost_fp4_is": "measured"})
    best = choice.choose_for_slowdown(slow, "fp4", 0.1)
    assert best.work == 1.0
    assert "fp4 gains no speed here" in goals.report(best, 0.0, "fp4", choice.fp16_cost(slow, "fp4"))


@pytest.mark.parametrize("call", ["choose_for_error", "choose_for_slowdown"])
def test_a_negative_goal_is_refused(choice, profile, call):
    with pytest.raises(ValueError, match="must be 0 or more"):
        getattr(choice, call)(profile, "fp4", -0.1)


@pytest.mark.parametrize("call", ["choose_for_error", "choose_for_slowdown"])
def test_a_precision_that_was_not_measured_is_refused(choice, profile, pack_module, call):
    with pytest.raises(pack_module("profile").ProfileError, match="has fp4, not int8"):
        getattr(choice, call)(profile, "int8", 0.1)


def test_sixty_blocks_are_chosen_from_quickly(choice, make_profile):
    sensitivity = torch.rand(60, 2, generator=torch.Generator().manual_seed(1))
    profile = make_profile(sensitivity, steps=50, looked_at=(10, 40))
    best = choice.choose_for_work(profile, "fp4", 0.2)
    assert best.work == pytest.approx(0.2, abs=1e-3)
    assert best.predicted_error < 0.6 * math.sqrt(0.8)  # better than FP16 spread evenly


@pytest.fixture
def goals(pack_module, monkeypatch):
    monkeypatch.setitem(sys.modules, "comfy", ModuleType("comfy"))
    return pack_module("calibrated_choice")


def sampled(factor, layout, cells):
    """Latents that are off by `factor` times the predicted error of a text."""

    def sample(text):
        shares = resolve_block_overrides(parse_block_overrides(text), layout)
        left = cells.square().clone()
        for row, block in enumerate(layout):
            if block in shares:
                count = fp16_steps(shares[block].share, cells.shape[1])
                left[row, slice(0, count) if shares[block].end == "high" else slice(cells.shape[1] - count, None)] = 0
        return torch.ones(10) * (1 + factor * float(left.sum().sqrt()))

    return sample


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.4])
def test_the_error_goal_is_met_in_truth_not_only_as_predicted(goals, choice, profile, factor):
    cells = choice.cell_errors(profile, "fp4")
    sample = sampled(factor, profile.layout, cells)
    best, measured = goals.choose(profile, "fp4", "max_error", 0.3, sample, torch.ones(10))
    assert measured <= 0.3
    assert best.work < 1
    assert measured == pytest.approx(factor * best.predicted_error, rel=1e-3)
    assert f"final error {measured:.2%}" in goals.report(best, measured, "fp4", choice.fp16_cost(profile, "fp4"))


@pytest.mark.parametrize("goal", [0.2, 0.3, 0.4])
@pytest.mark.parametrize("factor", [1.05, 1.2, 1.4])
def test_no_attempt_at_an_error_goal_repeats_a_choice_that_missed_it(goals, choice, profile, goal, factor):
    """A goal missed by a little was aimed at again so closely that the same choice came out, to the last attempt."""
    texts, draw = [], sampled(factor, profile.layout, choice.cell_errors(profile, "fp4"))

    def sample(text):
        texts.append(text)
        return draw(text)

    best, measured = goals.choose(profile, "fp4", "max_error", goal, sample, torch.ones(10))
    assert len(set(texts)) == len(texts)
    assert texts[-1] == best.text
    assert 0 < measured <= goal


def test_an_error_goal_that_is_never_met_ends_with_everything_in_fp16(goals, profile):
    best, measured = goals.choose(
        profile, "fp4", "max_error", 0.01, lambda text: torch.full((10,), 3.0), torch.ones(10)
    )
    assert (best.text, measured) == ("0-2: 1", 0.0)


def test_a_slowdown_goal_is_sampled_once(goals, choice, profile):
    texts = []

    def sample(text):
        texts.append(text)
        return torch.full((10,), 1.5)

    best, measured = goals.choose(profile, "fp4", "max_slowdown", 0.6, sample, torch.ones(10))
    assert (texts, measured) == ([best.text], pytest.approx(0.5))


def test_an_unknown_goal_is_refused(goals, profile):
    with pytest.raises(ValueError, match="max_error, max_slowdown"):
        goals.choose(profile, "fp4", "best", 1.0, lambda text: torch.ones(1), torch.ones(1))
