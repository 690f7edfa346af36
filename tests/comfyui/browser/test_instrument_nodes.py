"""Calibrate, the profile nodes, Compare and Doctor in the browser, run for real; their pictures for the help pages."""

import re
from pathlib import Path

import pytest

pytest.importorskip("selenium", reason="needs selenium: pip install selenium")

from selenium.webdriver.common.by import By

from .graph_page import GraphPage, shipped
from .strip import Strip

pytestmark = pytest.mark.comfyui

ROOT = Path(__file__).resolve().parents[3]
BLOCKS = 5
CALIBRATE = {2: 2, 9: 1, 10: 128}  # steps, calibration_steps, rows
COMPARE = {2: 2}  # steps


@pytest.fixture
def graph(opened):
    yield GraphPage(opened)
    assert not opened.errors()


@pytest.fixture
def save_node(graph, nodes_2, save_screenshot):
    """Pictures of nodes are taken where nodes are elements of the page."""

    def save(type_, name, size=None):
        if nodes_2:
            graph.take_aside(type_, size)
            save_screenshot(graph.node_element(type_), name)

    return save


def test_calibrate_save_and_compare(graph, nodes_2, save_node):
    seed = 21 + nodes_2
    workflow = shipped(
        "sage3_calibrate_compare", Sage3Calibrate={**CALIBRATE, 0: seed}, Sage3Compare={**COMPARE, 0: seed}
    )
    graph.load(workflow)
    graph.press_run()
    graph.wait_for_end()
    report = graph.widget("Sage3Compare", "report_text")
    assert "A: " in report
    assert "without Sage3 Attention" in report
    assert "latents, B against A: relative L1" in report
    assert "kept in FP16: " in graph.widget("Sage3Calibrate", "report_text")
    save_node("Sage3Compare", "compare_node", [460, 560])
    save_node("Sage3Calibrate", "calibrate_node", [460, 560])
    save_node("Sage3ProfileSave", "profile_save_node")


def test_a_saved_profile_colours_the_sliders(graph, opened, nodes_2, save_node):
    """After the test above, whose profile it loads."""
    graph.load(shipped("sage3_demo"))
    opened.run("await app.refreshComboInNodes()")
    opened.run("""
        const [unet, ours] = ['UNETLoader', 'Sage3Attention'].map(
            (wanted) => app.graph.nodes.find(({type}) => type === wanted));
        for (const node of [...app.graph.nodes])
            if (!['UNETLoader', 'ModelSamplingSD3', 'Sage3Attention'].includes(node.type)) app.graph.remove(node);
        const load = LiteGraph.createNode('Sage3ProfileLoad'), doctor = LiteGraph.createNode('Sage3Doctor');
        load.pos = [40, 260]; doctor.pos = [1160, 60];
        app.graph.add(load); app.graph.add(doctor);
        unet.connect(0, load, load.inputs.findIndex(({name}) => name === 'model'));
        load.connect(0, ours, ours.inputs.findIndex(({name}) => name === 'profile'));
        ours.connect(0, doctor, 0);
        const files = load.widgets[0].options.values;
        load.widgets[0].value = (typeof files === 'function' ? files() : files).at(-1);
    """)
    assert ".sage3.safetensors" in graph.widget("Sage3ProfileLoad", "file")
    graph.press_run()
    graph.wait_for_end()
    Strip(opened).wait_for_sliders(BLOCKS)
    heat = opened.run(
        "return [...document.querySelectorAll('.sage3-slot')].map((slot) => slot.style.getPropertyValue('--heat'))"
    )
    assert len(set(heat)) > 1
    save_node("Sage3ProfileLoad", "profile_load_node")


def test_the_doctors_report_is_on_the_node_and_can_be_copied(graph, opened, nodes_2, save_node):
    graph.load(shipped("sage3_demo"))
    opened.run("""
        for (const node of [...app.graph.nodes])
            if (!['UNETLoader', 'Sage3Attention'].includes(node.type)) app.graph.remove(node);
        const [unet, ours] = ['UNETLoader', 'Sage3Attention'].map(
            (wanted) => app.graph.nodes.find(({type}) => type === wanted));
        const doctor = LiteGraph.createNode('Sage3Doctor');
        doctor.pos = [1160, 60]; doctor.size = [620, 640];
        app.graph.add(doctor);
        unet.connect(0, ours, 0); ours.connect(0, doctor, 0);
    """)
    graph.press_run()
    graph.wait_for_end()
    opened.wait(
        "return app.graph.nodes.find(({type}) => type === 'Sage3Doctor').widgets?.some("
        "({name, value}) => name === 'report_text' && value)"
    )
    text = graph.widget("Sage3Doctor", "report_text")
    for part in ("== Versions", "== This model's attention", "== ComfyUI's options", "cpu fp4_emulated: ok"):
        assert part in text
    allow_clipboard(opened)
    if nodes_2:
        graph.show("Sage3Doctor")
        buttons = graph.node_element("Sage3Doctor").find_elements(By.CSS_SELECTOR, "button")
        next(button for button in buttons if "Copy report" in button.text).click()
    else:
        opened.run(
            "const {widgets} = app.graph.nodes.find(({type}) => type === 'Sage3Doctor');"
            "widgets.find(({name}) => name === 'Copy report').callback()"
        )
    opened.wait("return (await navigator.clipboard.readText()) === args[0]", text)
    # The picture is not of the machine that it was taken on.
    text = re.sub(r"Linux-\S+", "Linux", text.replace(str(ROOT), "ComfyUI/custom_nodes/sage3-attention"))
    opened.run(
        "const {widgets} = app.graph.nodes.find(({type}) => type === 'Sage3Doctor');"
        "widgets.find(({name}) => name === 'report_text').value = args[0]",
        text,
    )
    save_node("Sage3Doctor", "doctor_node", [620, 700])


def allow_clipboard(opened):
    permissions = {"origin": opened.url, "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    opened.driver.execute_cdp_cmd("Browser.grantPermissions", permissions)
