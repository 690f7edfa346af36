"""What a person does with whole workflows on a ComfyUI page: load one, look at a part of it, run it, read its nodes."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

WORKFLOWS = Path(__file__).parents[3] / "workflows"
RUN_TIMEOUT_S = 420
# What the server says meanwhile, in window.heard.
LISTEN = """
    if (window.heard) return;
    const start = () => { window.heard = {texts: {}, step: 0, end: null}; };
    start();
    app.api.addEventListener('execution_start', start);
    app.api.addEventListener('progress', ({detail}) => { window.heard.step = detail.value; });
    app.api.addEventListener('progress_text', ({detail}) => { window.heard.texts[detail.nodeId] = detail.text; });
    app.api.addEventListener('execution_success', () => { window.heard.end = 'success'; });
    app.api.addEventListener('execution_error', ({detail}) => { window.heard.end = detail.exception_message; });
"""


def shipped(name: str, **values: Mapping[int, Any]) -> dict[str, Any]:
    """A workflow of the pack with other widget values: node type -> place among its saved values -> value."""
    workflow = copy.deepcopy(json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8")))
    for node in workflow["nodes"]:
        for place, value in values.get(node["type"], {}).items():
            node["widgets_values"][place] = value
    return dict(workflow)


class GraphPage:
    """A Page with a workflow in it."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.driver = page.driver

    def load(self, workflow: Mapping[str, Any]) -> None:
        self.page.run("await app.loadGraphData(args[0])", workflow)
        self.page.run(LISTEN)

    def show(self, *types: str, scale: float = 1.0) -> None:
        """Move the first node of each of these types into view, the first at the left top."""
        self.page.run(
            "const node = app.graph.nodes.find(({type}) => type === args[0]);"
            "app.canvas.ds.scale = args[1];"
            "app.canvas.ds.offset = [90 / args[1] - node.pos[0], 110 / args[1] - node.pos[1]];"
            "app.canvas.setDirty(true, true); await new Promise((done) => setTimeout(done, 400))",
            types[0],
            scale,
        )

    def take_aside(self, type_: str, size: Sequence[int] | None = None) -> None:
        """Move the first node of a type away from the others, give it a size, and show it."""
        self.page.run(
            "const node = app.graph.nodes.find(({type}) => type === args[0]);"
            "node.pos = [-3000 * (1 + node.id), -4000]; if (args[1]) node.setSize(args[1])",
            type_,
            size,
        )
        self.show(type_)

    def press_run(self) -> None:
        """With ComfyUI's shortcut, and wait until the server begins."""
        self.page.run("window.heard.end = 'not begun'")
        ActionChains(self.driver).key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()
        self._wait("return window.heard.end !== 'not begun'")

    def wait_for_step(self, step: int) -> None:
        self._wait("return window.heard.step >= args[0] || window.heard.end", step)

    def wait_for_end(self) -> None:
        end = self._wait("return window.heard.end")
        assert end == "success", end

    def _wait(self, script: str, *arguments: Any) -> Any:
        """A run takes longer than anything else on the page."""
        waiting = WebDriverWait(self.driver, RUN_TIMEOUT_S, poll_frequency=0.2)
        return waiting.until(lambda _: self.page.run(script, *arguments), f"never true: {script}")

    def text_on(self, type_: str) -> str:
        """The text that the server showed on the first node of a type."""
        return str(
            self.page.run(
                "const node = app.graph.nodes.find(({type}) => type === args[0]);"
                "return window.heard.texts[String(node.id)] ?? ''",
                type_,
            )
        )

    def widget(self, type_: str, name: str) -> Any:
        """Value of a widget of the first node of a type."""
        return self.page.run(
            "const node = app.graph.nodes.find(({type}) => type === args[0]);"
            "return node.widgets.find(({name}) => name === args[1])?.value ?? null",
            type_,
            name,
        )

    def node_element(self, type_: str) -> Any:
        """The node in the page, where nodes are elements."""
        id_ = self.page.run("return String(app.graph.nodes.find(({type}) => type === args[0]).id)", type_)
        return self.driver.find_element(By.CSS_SELECTOR, f"[data-node-id='{id_}']")
