"""The slider strip of Sage3Attention in ComfyUI's own frontend: real pointers, real keys, both renderings."""

import json
import math
import urllib.error
import urllib.parse
import urllib.request

import pytest

pytest.importorskip("selenium", reason="needs selenium: pip install selenium")

from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from .strip import NODE, TEXT, Strip, demo_workflow

pytestmark = pytest.mark.comfyui

BLOCKS = 5  # of the demo model
HIGH, LOW = "high", "low"
NOTHING = [(0, HIGH)] * BLOCKS


@pytest.fixture
def strip(opened):
    loaded = Strip(opened)
    loaded.load(demo_workflow(), sliders=BLOCKS)
    yield loaded
    assert not opened.errors()


def test_the_blocks_are_known_before_the_first_run(strip):
    assert strip.part("model") == "Wan · 5 blocks"
    assert strip.shares == NOTHING
    assert strip.status == ""


def test_a_drag_paints_the_sliders_that_it_crosses(strip):
    strip.drag((1, 1), (3, 1))
    assert strip.text == "1-3: 1"
    strip.drag((0, 0.8), (4, 0.4))
    assert strip.text == "0: 0.8, 1: 0.7, 2: 0.6, 3: 0.5, 4: 0.4"
    assert strip.shares == [(share, HIGH) for share in (0.8, 0.7, 0.6, 0.5, 0.4)]


def test_a_double_click_resets_one_slider(strip):
    strip.drag((0, 1), (4, 1))
    strip.double_click(2, 0.6)
    assert strip.text == "0-1: 1, 3-4: 1"


def test_shift_and_the_mark_below_switch_the_noise_end(strip):
    strip.drag((1, 0.5), (3, 0.5))
    strip.drag((1, 0.9), (2, 0.9), key=Keys.SHIFT)
    assert strip.text == "1-2: 0.5 low, 3: 0.5"
    strip.drag((3, -0.07))
    assert strip.text == "1-3: 0.5 low"
    strip.drag((2, -0.07))
    assert strip.shares[1:4] == [(0.5, LOW), (0.5, HIGH), (0.5, LOW)]


def test_the_wheel_turns_a_strip_that_was_clicked(strip):
    strip.drag((1, 0.5))
    strip.wheel(1, 3)
    strip.wheel(2, 1)
    assert strip.text == "1: 0.53, 2: 0.01"


def test_the_wheel_zooms_the_graph_where_the_strip_was_not_clicked(strip):
    strip.page.run("document.activeElement?.blur()")
    strip.wheel(1, 1)
    strip.page.wait("return app.canvas.ds.scale !== 1")
    assert strip.text == ""


def test_keys_move_and_adjust(strip):
    strip.drag((1, 0.5))
    strip.press(Keys.ARROW_UP, Keys.ARROW_RIGHT, Keys.PAGE_UP, Keys.END, Keys.ARROW_UP, "l", Keys.HOME, Keys.PAGE_UP)
    assert strip.text == "0: 0.25, 1: 0.55, 2: 0.25, 4: 0.05 low"
    strip.press(Keys.ARROW_RIGHT, Keys.DELETE)
    assert strip.text == "0: 0.25, 2: 0.25, 4: 0.05 low"
    assert strip.page.run(f"{NODE} return Boolean(node)"), "Delete removed the node"


def test_sliders_speak_to_assistive_technology(strip):
    strip.drag((3, 0.5))
    sliders = strip.element.find_elements(By.CSS_SELECTOR, "input[type=range]")
    focused = strip.driver.switch_to.active_element
    assert focused == sliders[3]
    assert focused.accessible_name == "block 3"
    assert focused.aria_role == "slider"
    assert focused.get_attribute("aria-valuetext") == "50 % FP16, high noise"
    assert [slider.get_attribute("tabindex") for slider in sliders] == ["-1", "-1", "-1", "0", "-1"]


def test_undo_takes_back_one_gesture_of_the_strip_and_nothing_else(strip):
    nodes = strip.page.run("return app.graph.nodes.length")
    strip.drag((0, 1), (2, 1))
    strip.drag((4, 0.5))
    strip.press_with_control("z")
    assert strip.text == "0-2: 1"
    strip.press_with_control("z")
    assert strip.text == ""
    strip.press_with_control("y")
    assert strip.text == "0-2: 1"
    strip.click_button("↷")
    assert strip.text == "0-2: 1, 4: 0.5"
    assert strip.page.run("return app.graph.nodes.length") == nodes


def test_a_change_in_the_strip_is_a_change_of_the_workflow(strip):
    steps = "return app.extensionManager.workflow.activeWorkflow.changeTracker.undoQueue.length"
    before = strip.page.run(steps)
    strip.drag((1, 0.5))
    strip.page.wait(steps.replace(".length", ".length > args[0]"), before)
    saved = strip.page.run("return app.extensionManager.workflow.activeWorkflow.changeTracker.activeState")
    node = next(node for node in saved["nodes"] if node["type"] == "Sage3Attention")
    assert node["widgets_values"][1] == "1: 0.5"


def test_presets(strip):
    strip.click_button("First")
    assert strip.text == "0-1: 1"
    count = strip.element.find_element(By.CSS_SELECTOR, "input[type=number]")
    count.clear()
    count.send_keys("1")
    strip.click_button("Last")
    assert strip.text == "0-1: 1, 4: 1"
    strip.click_button("All")
    assert strip.text == "0-4: 1"
    strip.click_button("None")
    assert strip.text == ""


def test_typed_text_moves_the_sliders(strip):
    strip.page.run(f"{TEXT} text.value = args[0]; text.callback?.(args[0])", "0: 0.25, 3-4: 1 low")
    assert strip.shares == [(0.25, HIGH), (0, HIGH), (0, HIGH), (1, LOW), (1, LOW)]


def test_text_that_nobody_announced_moves_the_sliders(strip):
    strip.page.run(f"{TEXT} text.value = args[0]", "2: 0.5")
    strip.page.wait("return document.querySelectorAll('.sage3-slot')[2].style.getPropertyValue('--share') === '0.5'")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3-1: 1", "block override 1, '3-1: 1': the range 3-1 runs backwards (write 1-3)"),
        ("9: 1", "block override '9: 1': the model has no block 9; its blocks are 0-4"),
    ],
)
def test_bad_text_is_explained_and_left_alone(strip, text, message):
    strip.page.run(f"{TEXT} text.value = args[0]; text.callback?.(args[0])", text)
    assert strip.status == message
    strip.drag((1, 1), (3, 1))
    strip.press(Keys.ARROW_UP)
    assert strip.text == text
    strip.click_button("None")
    assert (strip.text, strip.status) == ("", "")


def test_a_saved_workflow_shows_the_same_when_it_is_loaded_again(strip):
    strip.drag((0, 1), (1, 1))
    strip.drag((3, 0.4))
    strip.drag((3, 0.4), key=Keys.SHIFT)
    shown = strip.shares
    saved = strip.page.run("return JSON.parse(JSON.stringify(app.graph.serialize()))")
    node = next(node for node in saved["nodes"] if node["type"] == "Sage3Attention")
    assert node["widgets_values"][1] == "0-1: 1, 3: 0.4 low"
    expected = next(node for node in demo_workflow()["nodes"] if node["type"] == "Sage3Attention")
    assert len(node["widgets_values"]) == len(expected["widgets_values"]), "the strip has a value of its own"
    strip.load(demo_workflow(), sliders=BLOCKS)
    assert strip.shares == NOTHING
    strip.load(saved, sliders=BLOCKS)
    assert strip.shares == shown


def test_the_prompt_holds_the_text_and_nothing_of_the_strip(strip):
    strip.drag((0, 1), (1, 1))
    prompt = strip.page.run("return (await app.graphToPrompt()).output")
    inputs = next(node["inputs"] for node in prompt.values() if node["class_type"] == "Sage3Attention")
    assert inputs["fp16_blocks"] == "0-1: 1"
    assert "fp16_strip" not in inputs


def test_without_a_loader_the_entries_of_the_text_can_be_moved(strip):
    strip.load(demo_workflow("0-2: 1, single.4: 0.5", without=["UNETLoader"]), sliders=2)
    assert strip.part("model") == "unknown model"
    assert "blocks are known after the first run" in strip.status
    strip.drag((0, 0.5))
    strip.drag((1, 0))
    assert strip.text == "0-2: 0.5, single.4: 0"


def test_a_run_tells_the_blocks_and_their_sensitivity(strip):
    strip.report("Flux", {"double": 2, "single": 3}, [0, 0.1, 0.2, 0.1, 0.4])
    assert strip.part("model") == "Flux · 5 blocks"
    heat = strip.page.run(
        "return [...document.querySelectorAll('.sage3-slot')].map((slot) => slot.style.getPropertyValue('--heat'))"
    )
    assert heat[1] == heat[3]
    assert len(set(heat)) == 4
    strip.drag((1, 1), (3, 1))
    assert strip.text == "double.1: 1, single.0-1: 1"


def test_a_real_run_tells_the_blocks(strip):
    strip.page.run("""
        const fetchApi = app.api.fetchApi;
        app.api.fetchApi = function (path, options) {
            if (path.startsWith('/sage3/')) return Promise.reject(new Error('offline'));
            return fetchApi.call(this, path, options);
        };
        window.restoreFetchApi = () => { app.api.fetchApi = fetchApi; }""")
    # Another text in each rendering: ComfyUI would not run again what it has run.
    share = 0.5 if strip.page.run("return Boolean(LiteGraph.vueNodesMode)") else 1
    workflow = demo_workflow(f"0: {share}")
    node = next(node for node in workflow["nodes"] if node["type"] == "KSampler")
    node["widgets_values"][2] = 1  # step
    try:
        strip.load(workflow, sliders=1)
        assert strip.part("model") == "unknown model"
        assert "offline" in strip.status
        strip.page.run("await app.queuePrompt(0)")
        strip.wait_for_sliders(BLOCKS)
    finally:
        strip.page.run("window.restoreFetchApi()")
    assert strip.part("model") == "Wan · 5 blocks"
    assert strip.shares[:2] == [(share, HIGH), (0, HIGH)]


def test_another_model_further_up_gives_other_sliders(strip):
    strip.report("Wan", {"double": 7})
    strip.page.run(
        "app.graph.nodes.find(({type}) => type === 'UNETLoader').widgets[0].value = args[0]", "absent.safetensors"
    )
    strip.wait_for_sliders(0)
    assert "no loader lists a model of this name" in strip.status
    strip.page.errors()  # the request that failed


@pytest.mark.parametrize(
    ("counts", "width"),
    [
        ({"double": 1}, 320),
        ({"double": 5}, 320),
        ({"double": 60}, 320),
        ({"input": 24, "middle": 10, "output": 36}, 400),
    ],
    ids=str,
)
def test_nothing_sticks_out(strip, counts, width):
    strip.resize(width)
    strip.report("SD 1.5, SDXL, SVD", counts, [index / 10 for index in range(sum(counts.values()))])
    outside = strip.page.run("""
        const strip = document.querySelector('.sage3-strip');
        const box = (element) => element.getBoundingClientRect();
        const isInside = (inner, outer) => inner.left >= outer.left - 1 && inner.right <= outer.right + 1 &&
            inner.top >= outer.top - 1 && inner.bottom <= outer.bottom + 1;
        const parts = [...strip.querySelectorAll('.sage3-track, .sage3-readout, button, .sage3-foot input')];
        const tracks = [...strip.querySelectorAll('.sage3-track')];
        const place = strip.closest('.dom-widget') ?? strip.closest('[data-node-id]');
        return [
            ...parts.filter((part) => !isInside(box(part), box(strip))),
            ...tracks.filter((track) => box(track).width < 1.5 || box(track).height < 50),
            ...[strip].filter(() => !isInside(box(strip), box(place))),
        ].map((part) => `${part.className} ${part.textContent}`)""")
    assert not outside


def test_pictures_of_the_documentation(strip, opened, save_screenshot):
    strip.drag((0, 1), (1, 1))
    strip.drag((3, 0.45))
    strip.drag((4, 0.6))
    strip.drag((4, 0.6), key=Keys.SHIFT)
    if opened.run("return Boolean(LiteGraph.vueNodesMode)"):
        save_screenshot(strip.element.find_element(By.XPATH, "ancestor::*[@data-node-id][1]"), "node_nodes2")
        return
    save_screenshot(strip.element, "strip_demo")
    strip.resize(420)
    # Error at both ends and in a few blocks between, as calibrations of video models show it.
    heat = [math.exp(-index / 4) + 0.8 * math.exp(-(39 - index) / 2) + 0.4 * (index in {13, 26}) for index in range(40)]
    strip.report("Wan", {"double": 40}, heat)
    strip.page.run(f"{TEXT} text.value = args[0]; text.callback?.(args[0])", "")
    strip.drag((0, 1), (2, 1), (10, 0.1))
    strip.drag((36, 0.3), (39, 0.9))
    strip.drag((13, 0.5))
    strip.drag((13, 0.5), key=Keys.SHIFT)
    save_screenshot(strip.element, "strip_wan")
    strip.report("Flux", {"double": 19, "single": 38})
    strip.page.run(f"{TEXT} text.value = args[0]; text.callback?.(args[0])", "double.0-3: 1, single.0: 0.5")
    strip.drag((40, 0.35), (50, 0.35))
    save_screenshot(strip.element, "strip_flux")


def test_the_route_answers_errors_as_json(server):
    def ask(model):
        query = urllib.parse.urlencode({"model": model})
        try:
            with urllib.request.urlopen(f"{server.url}/sage3/layout?{query}") as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    status, answer = ask("wan_digits_fp16.safetensors")
    assert (status, answer["family"], len(answer["blocks"])) == (200, "Wan", BLOCKS)
    for model, expected in [("", 400), ("absent.safetensors", 404), ("../model/wan_digits_fp16.safetensors", 404)]:
        status, answer = ask(model)
        assert status == expected
        assert list(answer) == ["error"]
