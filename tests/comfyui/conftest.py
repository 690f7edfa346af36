"""A real ComfyUI, given by --comfyui-root: a process that answers requests inside it, and its HTTP server."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parent
PACK_ROOT = HERE.parents[1]

RunScenario = Callable[..., Any]


@pytest.fixture(scope="session")
def comfyui_root(request: pytest.FixtureRequest) -> Path:
    root = request.config.getoption("--comfyui-root")
    if root is None:
        pytest.skip("needs a real ComfyUI: pass --comfyui-root=DIR (and --comfyui-python=FILE)")
    if not (Path(root) / "main.py").is_file():
        pytest.fail(f"--comfyui-root={root} is no ComfyUI checkout: it has no main.py", pytrace=False)
    return Path(root).resolve()


@pytest.fixture(scope="session")
def comfyui_python(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--comfyui-python") or sys.executable


@pytest.fixture(scope="session")
def comfyui_environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(HERE / "stub_site"), os.environ.get("PYTHONPATH")]))
    # The checkout may be read-only, and is not ours to write into.
    return {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture(scope="session")
def run_scenario(
    comfyui_root: Path,
    comfyui_python: str,
    comfyui_environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RunScenario]:
    """Call a function of scenarios.py, or "module.function", inside ComfyUI by its name, with keyword arguments."""
    folder = tmp_path_factory.mktemp("comfyui")
    command = [comfyui_python, HERE / "worker.py", comfyui_root, PACK_ROOT, folder]
    with (
        (folder / "log.txt").open("w+", encoding="utf-8") as log,
        subprocess.Popen(
            [str(part) for part in command],
            env={**os.environ, **comfyui_environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            encoding="utf-8",
        ) as worker,
    ):

        def run(scenario: str, **arguments: Any) -> Any:
            with_log = f"\nComfyUI's output is in {log.name}; its end:\n"
            try:
                print(json.dumps({"scenario": scenario, "arguments": arguments}), file=worker.stdin, flush=True)
            except BrokenPipeError:
                pytest.fail(f"ComfyUI is gone{with_log}{_tail(log.name)}")
            answer = worker.stdout.readline()
            if not answer:
                pytest.fail(f"ComfyUI ended in scenario {scenario}{with_log}{_tail(log.name)}")
            reply = json.loads(answer)
            if "error" in reply:
                pytest.fail(f"scenario {scenario} failed in ComfyUI:\n{reply['error']}")
            return reply["result"]

        yield run
        worker.stdin.close()  # the worker ends with its input


@pytest.fixture(scope="session")
def server(
    demo: Callable[[str], ModuleType], comfyui_root: Path, comfyui_python: str, comfyui_environment: dict[str, str]
) -> Iterator[Any]:
    """A running demo.comfyui_server.ComfyServer."""
    module = demo("comfyui_server")
    with module.ComfyServer(comfyui_root, python=comfyui_python, environment=comfyui_environment) as running:
        yield running


def _tail(path: str) -> str:
    return "\n".join(Path(path).read_text(encoding="utf-8").splitlines()[-25:])
