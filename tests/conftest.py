"""Shared by all tests: the pack, loaded as ComfyUI loads it."""

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACK = "sage3_pack"


@pytest.fixture(scope="session")
def pack_module():
    """Function that imports a module of the pack by its name in nodes/."""
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules[PACK] = pack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    return lambda name: importlib.import_module(f"{PACK}.nodes.{name}")
