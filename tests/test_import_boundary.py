"""Who imports whom, and that importing does nothing else."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "sage_kernels" / "src" / "sage_kernels"
PURE = {"precision", "block_overrides", "precision_policy", "coverage"}


def imported_modules(path):
    """Absolute names of everything that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


def files(folder):
    return sorted(folder.rglob("*.py"))


@pytest.mark.parametrize("path", files(KERNELS), ids=lambda path: path.relative_to(KERNELS).as_posix())
def test_the_kernel_package_knows_nothing_of_comfyui(path):
    top_level = {name.partition(".")[0] for name in imported_modules(path)}
    assert not top_level & {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "nodes", "server", "folder_paths"}


@pytest.mark.parametrize("name", sorted(PURE))
def test_the_policy_is_pure_python(name):
    allowed = {f"sage_kernels.{other}" for other in PURE}
    for module in imported_modules(KERNELS / f"{name}.py"):
        assert module in allowed or module.partition(".")[0] in sys.stdlib_module_names


@pytest.mark.parametrize("path", files(ROOT / "nodes"), ids=lambda path: path.name)
def test_nodes_import_each_other_relatively(path):
    """ComfyUI has a module called nodes."""
    assert not [name for name in imported_modules(path) if name.partition(".")[0] == "nodes"]


def in_fresh_python(program):
    command = [sys.executable, "-c", program, str(ROOT), str(KERNELS.parent)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_importing_the_pack_imports_nothing_else():
    program = """
import importlib.util, os, sys
root = sys.argv[1]
spec = importlib.util.spec_from_file_location("pack", root + "/__init__.py", submodule_search_locations=[root])
module = importlib.util.module_from_spec(spec)
before = set(sys.modules), list(sys.path), dict(os.environ)
spec.loader.exec_module(module)
assert (set(sys.modules), list(sys.path), dict(os.environ)) == before, set(sys.modules) - before[0]
"""
    in_fresh_python(program)


def test_importing_the_kernel_package_changes_nothing():
    program = """
import sys, os, threading, logging, warnings
import torch
sys.path.insert(0, sys.argv[2])
def state():
    return (
        list(sys.path), dict(os.environ), os.getcwd(), threading.active_count(), logging.root.handlers[:],
        warnings.filters[:], torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed(),
        torch.get_num_threads(), torch.cuda.is_initialized(), torch.nn.functional.scaled_dot_product_attention,
    )
before = state()
import sage_kernels, sage_kernels.precision_policy
assert state() == before
assert "torch._dynamo" not in sys.modules, "an import that every start of ComfyUI would wait for"
"""
    in_fresh_python(program)
