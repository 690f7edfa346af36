"""Shared by all tests: the pack loaded as ComfyUI loads it, the demo package, and where a real ComfyUI is."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACK = "sage3_pack"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where a real ComfyUI is: no package registry carries one."""
    parser.addoption("--comfyui-root", metavar="DIR", help="ComfyUI checkout (0.3.64 or newer) to run tests against")
    parser.addoption(
        "--comfyui-python", metavar="FILE", help="interpreter that has ComfyUI's requirements; default: this one"
    )
    parser.addoption("--screenshots", metavar="DIR", help="where browser tests save the pictures of the documentation")
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
