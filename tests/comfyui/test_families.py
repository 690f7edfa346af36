"""Every model family as ComfyUI's own class, small and random: the attention calls of each block, and who runs them."""

from collections import Counter

import pytest

pytestmark = pytest.mark.comfyui

BOTH = 2  # self- and cross-attention
JOINT = 1  # one attention over text and picture
CALLS_BY_BLOCK_TYPE = {
    "sd15": {"input": BOTH, "middle": BOTH, "output": BOTH},
    "sdxl": {"input": BOTH, "middle": BOTH, "output": BOTH},
    "sd3": {"joint": JOINT},
    "flux": {"double": JOINT, "single": JOINT},
    "chroma": {"double": JOINT, "single": JOINT},
    "hunyuan_video": {"double": JOINT, "single": JOINT},
    "wan": {"double": BOTH},
    "wan22_5b": {"double": BOTH},
    "wan_vace": {"double": BOTH, "vace": BOTH},
    "ltxv": {"block": BOTH},
    "ltx2": {"block": 2 * BOTH + 2},  # video and audio, and each to the other
    "qwen_image": {"double": JOINT},
    "lumina2": {"double": JOINT, "context_refiner": JOINT, "noise_refiner": JOINT},
    "z_image": {"double": JOINT, "context_refiner": JOINT, "noise_refiner": JOINT},
    "cosmos": {"block": BOTH},
    "cosmos_predict2": {"block": BOTH},
    "mochi": {"block": JOINT},
    "hidream": {"double": JOINT, "single": JOINT},
    "aura": {"double": JOINT, "single": JOINT},
}
OUTSIDE = "outside"
CALLS_OUTSIDE = {"hunyuan_video": 2}  # its token refiner


@pytest.fixture(scope="module", params=CALLS_BY_BLOCK_TYPE)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def sampled(run_scenario, family):
    result = run_scenario("attention_calls", family=family, steps=1)
    if "missing" in result:
        pytest.skip(result["missing"])
    return result


def test_every_block_asks_for_its_attention_and_is_counted_as_the_one_that_ran(sampled, family):
    by_type = CALLS_BY_BLOCK_TYPE[family]
    expected = {block: by_type[block.split(".")[0]] for block in sampled["blocks"]}
    if family in CALLS_OUTSIDE:
        expected[OUTSIDE] = CALLS_OUTSIDE[family]
    ran = [call[0] for call in sampled["calls"]]
    counted_for = [call[1] for call in sampled["calls"]]
    assert {block.split(".")[0] for block in sampled["blocks"]} == set(by_type)
    assert Counter(ran) == {block: calls * sampled["evaluations"] for block, calls in expected.items()}
    assert counted_for == ran


def test_every_block_runs_in_fp4_and_agrees_with_core(sampled):
    inside = [call for call in sampled["calls"] if call[0] != OUTSIDE]
    assert {kernel for _, _, kernel, _, _ in inside} == {"fp4_emulated"}
    assert min(cosine for *_, cosine in inside) > 0.97
    assert {kernel for block, _, kernel, _, _ in sampled["calls"] if block == OUTSIDE} <= {"fp16"}
