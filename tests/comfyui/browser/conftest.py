"""ComfyUI's own frontend in headless Chromium."""

import io
import json
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

WINDOW = (1500, 1000)
TIMEOUT_S = 30
NODES_2_FINISHED = (1, 41)
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# What a first start would put in front of the graph, and animations that a pointer would have to wait for.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.ShowMissingModelsWarning": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasMenu": False,
}


class Page:
    """A ComfyUI page: scripts inside it and real pointers on it."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver = driver
        self.url = url

    def open(self, *, nodes_2: bool = False) -> None:
        """Load the page in one of the two renderings of nodes, with an empty graph."""
        body = json.dumps({**SETTINGS, "Comfy.VueNodes.Enabled": nodes_2}).encode()
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/settings", body, method="POST")).close()
        self.driver.get("about:blank")
        self.driver.get(self.url)
        self.wait("return Boolean(window.app?.graph && window.LiteGraph?.registered_node_types?.Sage3Attention)")
        self.wait("return Boolean(app.extensionManager?.workflow?.activeWorkflow?.changeTracker)")
        self.run("app.graph.clear()")

    def run(self, script: str, *arguments: Any) -> Any:
        """Result of a function body; it may await."""
        wrapped = f"""
            const done = arguments[arguments.length - 1];
            (async (...arguments_) => {{ const args = arguments_; {script} }})(...[...arguments].slice(0, -1))
                .then((result) => done({{result}}), (error) => done({{error: String(error?.stack ?? error)}}));"""
        answer = self.driver.execute_async_script(wrapped, *arguments)
        assert "error" not in answer, answer["error"]
        return answer.get("result")

    def wait(self, script: str, *arguments: Any) -> Any:
        """Wait until a function body returns something true, and return that."""
        from selenium.webdriver.support.ui import WebDriverWait  # noqa: PLC0415

        waiting = WebDriverWait(self.driver, TIMEOUT_S, poll_frequency=0.05)
        return waiting.until(lambda _: self.run(script, *arguments), f"never true: {script}")

    @property
    def frontend_version(self) -> tuple[int, ...]:
        """Of comfyui-frontend-package."""
        return tuple(int(part) for part in self.run("return window.__COMFYUI_FRONTEND_VERSION__").split("."))

    def errors(self) -> list[str]:
        """Uncaught errors and failed requests of the pack's own files since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser") if "sage3-attention" in entry["message"]]


@pytest.fixture(scope="session")
def driver() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
    browser = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    chromedriver = shutil.which("chromedriver")
    if browser is None or chromedriver is None:
        pytest.skip("needs chromium and chromedriver, such as Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # --no-sandbox: containers run as root. --disable-dev-shm-usage: their /dev/shm is small.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.add_argument(f"--window-size={WINDOW[0]},{WINDOW[1]}")
    running = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    try:
        running.set_script_timeout(TIMEOUT_S)
        yield running
    finally:
        running.quit()


@pytest.fixture(scope="session")
def page(server: Any, driver: Any) -> Page:
    """Not opened yet. The server first: without a ComfyUI no browser is started."""
    return Page(driver, server.url)


@pytest.fixture(scope="session", params=["canvas", "nodes_2"])
def opened(request: pytest.FixtureRequest, page: Page) -> Page:
    """Opened in the current rendering and in Nodes 2.0."""
    page.open()
    if request.param == "nodes_2":
        if page.frontend_version < NODES_2_FINISHED:
            pytest.skip(f"frontend {page.frontend_version} is older than {NODES_2_FINISHED}: no finished Nodes 2.0")
        page.open(nodes_2=True)
    return page


@pytest.fixture
def nodes_2(opened: Page) -> bool:
    """Whether the page is opened in Nodes 2.0."""
    return bool(opened.run("return Boolean(LiteGraph.vueNodesMode)"))


@pytest.fixture
def save_window(request: pytest.FixtureRequest, opened: Page, nodes_2: bool) -> Callable[[str], None]:
    """Save a small picture of the whole page into the folder of --screenshots, in Nodes 2.0 only."""
    folder = request.config.getoption("--screenshots")

    def save(name: str) -> None:
        picture = Image.open(io.BytesIO(opened.driver.get_screenshot_as_png())).convert("RGB")
        assert len(picture.getcolors(1 << 24) or ()) > 100, "the page is empty"
        if folder and nodes_2:
            picture.quantize(64).save(Path(folder) / f"{name}.png", optimize=True)

    return save


@pytest.fixture
def save_screenshot(request: pytest.FixtureRequest) -> Callable[[Any, str], None]:
    """Save an element's picture into the folder of --screenshots, where one is given."""
    folder = request.config.getoption("--screenshots")

    def save(element: Any, name: str) -> None:
        picture = element.screenshot_as_png
        assert picture.startswith(b"\x89PNG")
        if folder:
            (Path(folder) / f"{name}.png").write_bytes(picture)

    return save
