"""Finds the kernel package: an installed wheel that is new enough, else the source that came with the pack."""

import importlib
import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

PACK_ROOT = Path(__file__).resolve().parent.parent
INSTALL_HINT = (
    "`pip install --no-deps` the wheel in the pack's folder wheels/ into ComfyUI's Python, or clone the pack again"
)


class KernelPackageError(ImportError):
    """sage_kernels can't be used; the message says what to do."""


def import_sage_kernels(pack_root: Path = PACK_ROOT) -> ModuleType:
    """Import sage_kernels. An installed one wins if it is at least as new as the pack's own source.

    Raises:
        KernelPackageError: there is neither, or another node pack has already loaded one that is too old.
    """
    project = pack_root / "sage_kernels"
    bundled = _bundled_version(project)
    loaded = _loaded_version()
    if loaded is not None:
        if bundled is not None and _order(loaded) < _order(bundled):
            raise KernelPackageError(
                f"sage_kernels {loaded} is already loaded from {sys.modules['sage_kernels'].__file__}, "
                f"but this pack needs {bundled} or newer: {INSTALL_HINT}"
            )
        return sys.modules["sage_kernels"]
    # A folder called sage_kernels on sys.path (the pack's own, for one) leaves an empty namespace package behind.
    sys.modules.pop("sage_kernels", None)
    installed = _installed_version()
    if bundled is not None and (installed is None or _order(installed) < _order(bundled)):
        sys.path.insert(0, str(project / "src"))
        importlib.invalidate_caches()
    elif installed is None:
        raise KernelPackageError(f"sage_kernels is neither installed nor in {project / 'src'}: {INSTALL_HINT}")
    return importlib.import_module("sage_kernels")


def _bundled_version(project: Path) -> str | None:
    if not (project / "src" / "sage_kernels" / "__init__.py").is_file():
        return None
    # tomllib came with Python 3.11; the pack runs on 3.10.
    match = re.search(r'^version = "([^"]+)"', (project / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise KernelPackageError(f"{project / 'pyproject.toml'} names no version: {INSTALL_HINT}")
    return match[1]


def _installed_version() -> str | None:
    spec = importlib.util.find_spec("sage_kernels")
    if spec is None or spec.origin is None:  # no origin: a namespace package, that is, a mere folder
        return None
    try:
        return importlib.metadata.version("sage-kernels")
    except importlib.metadata.PackageNotFoundError:
        return "0"  # importable but not installed: of unknown age


def _loaded_version() -> str | None:
    module = sys.modules.get("sage_kernels")
    if module is None or getattr(module, "__file__", None) is None:
        return None
    return str(getattr(module, "__version__", "0"))


def _order(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])
