"""What a person does with the slider strip, through a real pointer and keyboard."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

WORKFLOW = json.loads((Path(__file__).parents[3] / "workflows" / "sage3_demo.json").read_text(encoding="utf-8"))
NODE = "const node = app.graph.nodes.find(({type}) => type === 'Sage3Attention');"
TEXT = f"{NODE} const text = node.widgets.find(({{name}}) => name === 'fp16_blocks');"


def demo_workflow(fp16_blocks: str = "", *, without: Sequence[str] = ()) -> dict[str, Any]:
    """The shipped workflow with this text, and without nodes of some types."""
    workflow = copy.deepcopy(WORKFLOW)
    gone = {node["id"] for node in workflow["nodes"] if node["type"] in without}
    workflow["nodes"] = [node for node in workflow["nodes"] if node["id"] not in gone]
    workflow["links"] = [link for link in workflow["links"] if not gone.intersection((link[1], link[3]))]
    for node in workflow["nodes"]:
        for slot in node["inputs"]:
            if slot.get("link") not in {link[0] for link in workflow["links"]}:
                slot["link"] = None
        if node["type"] == "Sage3Attention":
            node["widgets_values"][1] = fp16_blocks
    return workflow


def layout(counts: Mapping[str, int]) -> list[dict[str, Any]]:
    """Blocks as the server describes them."""
    single = len(counts) == 1
    return [
        {"name": str(index) if single else f"{type_}.{index}", "type": type_, "index": index}
        for type_, count in counts.items()
        for index in range(count)
    ]


class Strip:
    """The strip of the workflow's Sage3Attention node, the node at the left top of the view."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.driver = page.driver

    def load(self, workflow: Mapping[str, Any], sliders: int | None = None) -> None:
        """Load a workflow and wait for the strip to have this many sliders."""
        self.page.run("await app.loadGraphData(args[0])", workflow)
        self.page.run(
            f"{NODE} app.canvas.ds.scale = 1; app.canvas.ds.offset = [260 - node.pos[0], 120 - node.pos[1]];"
            "app.canvas.setDirty(true, true)"
        )
        # For a moment the strip of the workflow before may still be there.
        self.page.wait(
            f"{NODE} const strip = node.widgets.find(({{name}}) => name === 'fp16_strip').element;"
            "const shown = [...document.querySelectorAll('.sage3-strip')];"
            "return shown.length === 1 && shown[0] === strip && strip.getBoundingClientRect().top > 100"
        )
        if sliders is not None:
            self.wait_for_sliders(sliders)

    def wait_for_sliders(self, count: int) -> None:
        self.page.wait("return document.querySelectorAll('.sage3-slot').length === args[0]", count)

    def report(self, family: str, counts: Mapping[str, int], sensitivity: Sequence[float] | None = None) -> None:
        """What the server sends to the page after the node has run."""
        blocks = layout(counts)
        output = {"sage3": [{"family": family, "blocks": blocks, "sensitivity": sensitivity}]}
        self.page.run(
            f"{NODE} const id = String(node.id); const detail = {{node: id, display_node: id, output: args[0]}};"
            "app.api.dispatchEvent(new CustomEvent('executed', {detail}))",
            output,
        )
        self.wait_for_sliders(len(blocks))

    def resize(self, width: int) -> None:
        self.page.run(f"{NODE} node.setSize([args[0], node.size[1]]); app.canvas.setDirty(true, true)", width)

    @property
    def element(self) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, ".sage3-strip")

    @property
    def text(self) -> str:
        """Value of the widget fp16_blocks."""
        return str(self.page.run(f"{TEXT} return text.value"))

    @property
    def shares(self) -> list[tuple[float, str]]:
        """What the sliders show."""
        return [
            (float(share), end)
            for share, end in self.page.run(
                "return [...document.querySelectorAll('.sage3-slot')]"
                ".map((slot) => [slot.style.getPropertyValue('--share'), slot.dataset.end])"
            )
        ]

    @property
    def status(self) -> str:
        return self.part("status")

    def part(self, name: str) -> str:
        """Text of a part of the strip."""
        return str(self.page.run("return document.querySelector('.sage3-' + args[0]).textContent", name))

    def location(self, slider: int, share: float) -> tuple[int, int]:
        """Where on the page a slider stands for a share; below 0 is the mark under it."""
        box = self.page.run(
            "const {left, width, top, height} = document.querySelectorAll('.sage3-track')[args[0]]"
            ".getBoundingClientRect(); return [left + width / 2, top, height]",
            slider,
        )
        x, top, height = box
        return round(x), round(top + (1 - share) * height)

    def drag(self, *points: tuple[int, float], key: str | None = None) -> None:
        """Press on the first (slider, share), move over the others, release."""
        actions = ActionChains(self.driver, duration=30)
        pointer = actions.w3c_actions.pointer_action
        if key:
            actions.key_down(key)
            actions.w3c_actions.pointer_action.pause(0)
        pointer.move_to_location(*self.location(*points[0]))
        pointer.pointer_down()
        for point in points[1:]:
            pointer.move_to_location(*self.location(*point))
        pointer.pointer_up()
        actions.perform()
        if key:
            ActionChains(self.driver).key_up(key).perform()

    def double_click(self, slider: int, share: float) -> None:
        actions = ActionChains(self.driver, duration=10)
        pointer = actions.w3c_actions.pointer_action
        pointer.move_to_location(*self.location(slider, share))
        for _ in range(2):
            pointer.pointer_down()
            pointer.pointer_up()
        actions.perform()

    def wheel(self, slider: int, notches: int) -> None:
        """Turn the wheel over a slider, up if positive."""
        origin = ScrollOrigin.from_viewport(*self.location(slider, 0.5))
        for _ in range(abs(notches)):
            ActionChains(self.driver).scroll_from_origin(origin, 0, -100 if notches > 0 else 100).perform()

    def press(self, *keys: str) -> None:
        """Keys, one after the other, to what has the focus."""
        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def press_with_control(self, key: str) -> None:
        ActionChains(self.driver).key_down(Keys.CONTROL).send_keys(key).key_up(Keys.CONTROL).perform()

    def click_button(self, label: str) -> None:
        buttons = self.element.find_elements(By.CSS_SELECTOR, "button")
        next(button for button in buttons if button.text == label).click()
