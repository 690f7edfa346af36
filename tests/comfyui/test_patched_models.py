"""The node Sage3Attention on small random models inside a real ComfyUI."""

from collections import Counter

import pytest

pytestmark = pytest.mark.comfyui

CALLS_PER_BLOCK = {"wan": 2, "flux": 1, "sdxl": 2}  # self- and cross-attention, or one joint attention
BLOCKS = {
    "wan": ["double.0", "double.1", "double.2"],
    "flux": ["double.0", "double.1", "single.0", "single.1", "single.2"],
    "sdxl": [f"input.{i}" for i in range(3)] + ["middle.0", "middle.1"] + [f"output.{i}" for i in range(6)],
}
FAMILIES = tuple(BLOCKS)
STEPS = 3
EVALUATIONS = {"euler": STEPS, "heun": 2 * STEPS - 1}
FP4_KERNEL = "fp4_emulated"


@pytest.mark.parametrize("sampler", EVALUATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_attention_call_is_counted_for_the_block_that_runs(run_scenario, family, sampler):
    result = run_scenario("attention_calls", family=family, sampler=sampler)
    ran = [call[0] for call in result["calls"]]
    counted_for = [call[1] for call in result["calls"]]
    each = CALLS_PER_BLOCK[family] * EVALUATIONS[sampler]
    assert result["blocks"] == BLOCKS[family]
    assert result["evaluations"] == EVALUATIONS[sampler]
    assert Counter(ran) == dict.fromkeys(BLOCKS[family], each)
    assert counted_for == ran
    assert {call[2] for call in result["calls"]} == {FP4_KERNEL}


@pytest.mark.parametrize("family", FAMILIES)
def test_switching_the_node_off_gives_the_unpatched_latents_bit_for_bit(run_scenario, family):
    result = run_scenario("switched_off", family=family)
    assert result["fp4_differs_by"] > 0.01  # latents are about 1, so attention does matter
    assert result["bypassed_is_identical"]
    assert result["fp16_is_identical"]
    assert result["all_blocks_in_fp16_is_identical"]


@pytest.mark.parametrize("in_threads", [False, True], ids=["alternately", "at once"])
def test_differently_patched_clones_do_not_disturb_each_other(run_scenario, in_threads):
    result = run_scenario("two_clones", in_threads=in_threads)
    assert result["clones_differ_by"] > 0.01
    assert result["same_as_alone"] == [True, True]
    assert result["hooks_left"] == 0


def test_calls_left_alone_go_to_an_earlier_override(run_scenario):
    result = run_scenario("earlier_override")
    assert result["reached"] == ["double.1"] * CALLS_PER_BLOCK["wan"] * STEPS


@pytest.mark.parametrize("inside_a_block", [False, True], ids=["between steps", "inside a block"])
def test_a_cancelled_run_leaves_the_model_clean(run_scenario, inside_a_block):
    result = run_scenario("cancelled", inside_a_block=inside_a_block)
    assert result["interrupted"]
    assert bool(result["hooks_while_running"]) == inside_a_block
    assert all(result["hooks_while_running"])
    assert result["hooks_left"] == 0
    assert result["next_run_is_identical"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("3-1: 2", "runs backwards"), ("3: 1", "its blocks are 0-2"), ("0: 2", "outside 0 to 1"), ("all", "write BLOCKS")],
)
def test_a_bad_block_string_is_one_line_and_leaves_the_model_usable(run_scenario, text, complaint):
    result = run_scenario("bad_blocks", text=text)
    assert complaint in result["message"]
    assert "\n" not in result["message"]
    assert result["model_is_usable"]


def test_low_precision_stays_inside_the_start_end_window(run_scenario):
    everywhere = run_scenario("attention_calls", family="wan", sampler="euler")
    late = run_scenario("attention_calls", family="wan", sampler="euler", start_percent=0.5)
    sigmas = sorted({sigma for *_, sigma, _ in everywhere["calls"]})
    in_fp4 = sorted({sigma for *_, kernel, sigma, _ in late["calls"] if kernel == FP4_KERNEL})
    in_fp16 = sorted({sigma for *_, kernel, sigma, _ in late["calls"] if kernel != FP4_KERNEL})
    assert in_fp4 + in_fp16 == sigmas
    assert in_fp4
    assert in_fp16
