"""Reports, sentinel, doctor and comparison on small random models inside a real ComfyUI."""

import pytest

pytestmark = pytest.mark.comfyui

STEPS, BLOCKS, CALLS_PER_BLOCK = 3, 3, 2


@pytest.mark.parametrize(("step", "sampler"), [(0, "euler"), (2, "euler"), (3, "heun")])
def test_nan_from_a_kernel_never_reaches_the_sampler(run_scenario, step, sampler):
    result = run_scenario("instrument_scenarios.failing_kernel", step=step, block=1, sampler=sampler)
    assert result["finite"]
    assert result["bad_blocks"] == ["double.1"]
    assert result["named"] == 1
    evaluations = {"euler": STEPS, "heun": 2 * STEPS - 1}[sampler]
    calls = CALLS_PER_BLOCK * evaluations
    assert result["next_run_by_block"] == {
        "double.0": {"fp4_emulated": calls},
        "double.1": {"fp16": calls},
        "double.2": {"fp4_emulated": calls},
    }


def test_a_model_that_is_nan_by_itself_is_evaluated_once_more_and_not_blamed_on_kernels(run_scenario):
    result = run_scenario("instrument_scenarios.bad_model")
    assert result == {"evaluations": STEPS + 1, "bad_blocks": 0, "said": 1}


def test_doctor_reports_versions_kernels_and_our_override(run_scenario):
    text = run_scenario("instrument_scenarios.doctor", replaced_by=None)["text"]
    assert text.startswith("== Versions\nComfyUI 0.")
    assert "Sage3 Attention; its last sampling: fp4_emulated" in text
    assert "cpu fp4_emulated: ok: fp4: cosine 0.9" in text
    assert "== Attention replaced for all models\nnothing" in text
    assert "--cpu: ComfyUI runs on the CPU" in text
    assert text.endswith("== What to do\nnothing: no problem was found")


def test_doctor_names_an_override_that_replaced_ours(run_scenario):
    text = run_scenario("instrument_scenarios.doctor", replaced_by="foreign")["text"]
    assert "an attention override of instrument_scenarios (doctor.<locals>.<lambda>)" in text
    assert "A node after Sage3 Attention has replaced it by instrument_scenarios" in text


def test_doctor_names_the_attention_backend_node_of_core(run_scenario):
    text = run_scenario("instrument_scenarios.doctor", replaced_by="core")["text"]
    if text is None:
        pytest.skip("this ComfyUI has no ModelAttentionBackend")
    assert "A node after Sage3 Attention has replaced it by ComfyUI itself" in text


def test_doctor_needs_no_model(run_scenario):
    text = run_scenario("instrument_scenarios.doctor_without_model")["text"]
    assert "== Kernels against torch's attention" in text
    assert "This model's attention" not in text


@pytest.mark.parametrize(
    ("family", "shape"), [("wan", [2, 8, 16, 3]), ("flux", [1, 8, 16, 3]), ("sdxl", [1, 16, 32, 3])]
)
def test_compare_previews_latents_without_a_vae(run_scenario, family, shape):
    result = compare(run_scenario, family=family)
    assert result["frames"] == shape
    assert result["in_range"]
    assert result["latents_differ"]
    assert result["a_is_as_sampled"]
    assert "A: " in result["text"]
    assert "without Sage3 Attention" in result["text"]
    assert "attention: fp4_emulated" in result["text"]
    assert "latents, B against A: relative L1 0.0" in result["text"]
    assert "PSNR" not in result["text"]


@pytest.mark.parametrize(("mode", "columns"), [("side by side", 2), ("difference x4", 1), ("both", 3)])
def test_compare_decodes_and_measures_with_a_vae(run_scenario, mode, columns):
    result = compare(run_scenario, mode=mode, with_vae=True)
    assert result["frames"] == [2, 32, 32 * columns, 3]
    assert "frames, B against A: PSNR " in result["text"]
    assert "SSIM 0.9" in result["text"]


def test_compare_of_a_model_with_itself_finds_no_difference(run_scenario):
    result = compare(run_scenario, mode="difference x4", with_vae=True, same=True)
    assert not result["latents_differ"]
    assert result["largest"] == 0.0
    assert "relative L1 0, cosine 1.000000" in result["text"]
    assert "PSNR inf dB, SSIM 1.0000" in result["text"]


def compare(run_scenario, **arguments):
    defaults = {"family": "wan", "mode": "side by side", "with_vae": False, "same": False}
    return run_scenario("instrument_scenarios.compare", **{**defaults, **arguments})


def test_fifty_runs_leave_no_memory_and_no_objects_behind(run_scenario):
    result = run_scenario("instrument_scenarios.many_runs", runs=50)
    assert result["objects"] < 40, "less than one object per run"
    assert result["bytes"] < 8 * 2**20
    assert result["hooks"] == 0


def test_two_models_in_one_graph_keep_their_own_settings(run_scenario):
    result = run_scenario("instrument_scenarios.two_models")
    assert result["same_as_alone"] == [True] * 4
    assert result["fp16_blocks"] == {"wan": ["double.0"], "flux": ["single.1"]}


def test_lora_after_the_patch_and_a_reload_of_the_model_keep_working(run_scenario):
    result = run_scenario("instrument_scenarios.lora_and_reload")
    assert result["lora_matters"]
    assert not result["order_matters"]
    assert result["same_after_reload"]
    assert set(result["kernels"]) == {"fp4_emulated"}


def test_the_browser_is_told_the_blocks_in_the_order_of_the_bare_numbers(run_scenario):
    message = run_scenario("instrument_scenarios.node_message", family="flux", sensitivity=False)
    names = ["double.0", "double.1", "single.0", "single.1", "single.2"]
    assert message == {
        "family": "Flux",
        "blocks": [{"name": n, "type": n.partition(".")[0], "index": int(n.partition(".")[2])} for n in names],
        "sensitivity": None,
    }


def test_the_browser_is_told_the_sensitivity_of_each_block(run_scenario):
    message = run_scenario("instrument_scenarios.node_message", family="wan", sensitivity=True)
    assert [block["name"] for block in message["blocks"]] == ["0", "1", "2"]
    assert message["sensitivity"] == [0.0, 1.0, 2.0]
