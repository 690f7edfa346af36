"""The demo workflow from the browser, from the loaded template to the finished clip, in pictures."""

import re

import pytest

pytest.importorskip("selenium", reason="needs selenium: pip install selenium")

from .graph_page import GraphPage, shipped
from .strip import Strip

pytestmark = pytest.mark.comfyui

STEPS, BLOCKS, CALLS_A_BLOCK = 8, 5, 2
SEED, COUNT = 0, 2  # places among KSampler's saved values


@pytest.fixture
def graph(opened):
    yield GraphPage(opened)
    assert not opened.errors()


def test_the_demo_from_template_to_clip(graph, opened, nodes_2, save_window):
    # Another seed in each rendering: ComfyUI would not run again what it has run.
    graph.load(shipped("sage3_demo", KSampler={SEED: 11 + nodes_2, COUNT: STEPS}))
    strip = Strip(opened)
    graph.show("Sage3Attention", scale=0.8)
    strip.wait_for_sliders(BLOCKS)
    save_window("run_1_template")
    strip.drag((1, 1))
    strip.drag((3, 1))
    assert strip.text == "1: 1, 3: 1"
    graph.press_run()
    graph.wait_for_step(STEPS // 2)
    save_window("run_2_sampling")
    graph.wait_for_end()
    opened.wait(
        "return app.graph.nodes.find(({type}) => type === 'SaveAnimatedWEBP').imgs?.length > 0 || args[0]", nodes_2
    )
    save_window("run_3_done")
    text = graph.text_on("Sage3Attention")
    calls = {kernel: int(count) for kernel, count in re.findall(r"^(\w+) (\d+) \(", text, re.MULTILINE)}
    assert calls == {"fp4_emulated": 3 * CALLS_A_BLOCK * STEPS, "fp16": 2 * CALLS_A_BLOCK * STEPS}
    assert text.splitlines()[-1].endswith("no prediction: emulation")
    assert "fp4_emulated" in opened.run("return document.body.innerText"), "the text is not on the page"
