"""Shared by all tests: the pack loaded as ComfyUI loads it, the demo package, and where a real ComfyUI is."""

import ast
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sage_kernels.cubin_cache import CubinCache
from sage_kernels.kernel_sources import source_folder
from sage_kernels.kernel_variants import VARIANTS
from sage_kernels.nvrtc import Nvrtc, find_libraries
from sage_kernels.precision import PRECISIONS

ROOT = Path(__file__).resolve().parent.parent
PACK = "sage3_pack"
WIDGET_TYPES = {"Combo", "String", "Float", "Int", "Boolean"}


@dataclass(frozen=True)
class InputSchema:
    """An input as a node's source says; what is computed there is None."""

    id: str
    type: str
    tooltip: str | None
    options: list[Any] | None
    minimum: float | None
    maximum: float | None
    control_after_generate: bool

    @property
    def widget(self) -> bool:
        """Whether its value is typed in rather than linked."""
        return self.type in WIDGET_TYPES


@dataclass(frozen=True)
class NodeSchema:
    """A node as its source says."""

    display_name: str
    description: str
    inputs: tuple[InputSchema, ...]
    source: Path


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where a real ComfyUI is: no package registry carries one."""
    parser.addoption("--comfyui-root", metavar="DIR", help="ComfyUI checkout (0.3.64 or newer) to run tests against")
    parser.addoption(
        "--comfyui-python", metavar="FILE", help="interpreter that has ComfyUI's requirements; default: this one"
    )
    parser.addoption("--screenshots", metavar="DIR", help="where browser tests save the pictures of the documentation")
    parser.addoption("--write-evidence", metavar="DIR", help="where tests/gpu writes FAMILY.json")
    parser.addoption(
        "--emulated-cubins",
        metavar="DIR",
        help="of tools/build_cubins.py --emulated; then nothing is compiled at first use",
    )
    parser.addoption("--evidence-commit", metavar="HASH", default="", help="the commit, where there is no git checkout")
    if "--comfyui-root" in sys.argv:
        # pytest reads paths before it knows this option, and would load the tests of the checkout.
        raise pytest.UsageError("write --comfyui-root=DIR, with an equals sign")


@pytest.fixture(scope="session")
def pack_module():
    """Function that imports a module of the pack by its name in nodes/."""
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules[PACK] = pack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    return lambda name: importlib.import_module(f"{PACK}.nodes.{name}")


@pytest.fixture(scope="session")
def demo() -> Iterator[Callable[[str], ModuleType]]:
    """Import a module of the demo package, which is not installed, by its short name."""
    folder = str(ROOT / "sage_kernels")
    sys.path.insert(0, folder)
    yield lambda name: importlib.import_module(f"demo.{name}")
    sys.path.remove(folder)


@pytest.fixture(scope="session")
def tool() -> Callable[[str], ModuleType]:
    """Import a script of sage_kernels/tools by its name."""
    folder = str(ROOT / "sage_kernels" / "tools")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module


@pytest.fixture(scope="session")
def nvrtc_12_8(tool: Callable[[str], ModuleType]) -> Nvrtc:
    """The pinned compiler of most shipped cubins; it needs no GPU."""
    compilers = tool("pinned_compilers")
    if not compilers.available():
        pytest.skip(f"NVIDIA publishes no NVRTC for {sys.platform}")
    (library,) = find_libraries([compilers.install(compilers.NVRTC_12_8).as_posix()])
    return Nvrtc(library)


@pytest.fixture(scope="session")
def built_cubins(tool: Callable[[str], ModuleType]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Manifest and files of one build of all variants, for every test that looks at cubins."""
    pytest.importorskip("tomllib", reason="building needs Python 3.11")
    if not tool("pinned_compilers").available():
        pytest.skip(f"NVIDIA publishes no NVRTC for {sys.platform}")
    builder = tool("build_cubins")
    files = builder.build(VARIANTS, source_folder(), CubinCache(builder.CACHE))
    return json.loads(files["manifest.json"]), files


@pytest.fixture(scope="session")
def node_schemas() -> dict[str, NodeSchema]:
    """Every node of the pack by its id, read from the source: without ComfyUI the nodes can't be imported."""
    schemas = {}
    for path in sorted((ROOT / "nodes").glob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and _called(call).endswith("Schema"):
                options = _keywords(call)
                items = [item for item in ast.walk(call) if isinstance(item, ast.Call)]
                inputs = tuple(_input(item) for item in items if _called(item).endswith(".Input"))
                schemas[options["node_id"]] = NodeSchema(options["display_name"], options["description"], inputs, path)
    return schemas


def _input(call: ast.Call) -> InputSchema:
    options = _keywords(call)
    kind = _called(call).split(".")[-2]
    return InputSchema(
        call.args[0].value,
        kind,
        options.get("tooltip"),
        options.get("options"),
        options.get("min"),
        options.get("max"),
        bool(options.get("control_after_generate")),
    )


def _keywords(call: ast.Call) -> dict[str, Any]:
    return {keyword.arg: _constant(keyword.value) for keyword in call.keywords if keyword.arg is not None}


def _constant(node: ast.expr) -> Any:
    known = {"list(PRECISIONS)": PRECISIONS, "list(MEASURABLE)": PRECISIONS[1:-1]}.get(ast.unparse(node))
    if known is not None:
        return list(known)
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def _called(call: ast.Call) -> str:
    return ast.unparse(call.func)
