"""The CUDA sources: where they are, what includes what, and a hash that changes with any of it."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from sage_kernels.driver import KernelLoadError

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)


def source_folder() -> Path:
    """csrc/: inside the package where it is installed, beside src/ in a checkout."""
    package = Path(__file__).parent
    installed = package / "csrc"
    return installed if installed.is_dir() else package.parents[1] / "csrc"


def collect_sources(folder: Path, source: str) -> dict[str, str]:
    """Text of `source` and of all that it includes, by their names in `folder`, `source` first.

    Raises:
        KernelLoadError: a file is missing.
    """
    texts: dict[str, str] = {}
    waiting = [source]
    while waiting:
        name = waiting.pop()
        if name in texts:
            continue
        try:
            texts[name] = (folder / name).read_text(encoding="utf-8")
        except OSError as error:
            raise KernelLoadError(f"the kernel source {name} is missing: {error}; install the package again") from error
        waiting += reversed(_INCLUDE.findall(texts[name]))
    return texts


def source_hashes(texts: dict[str, str]) -> dict[str, str]:
    """SHA-256 of each source, by its path in the repository, which is also its path in the wheel."""
    return {f"sage_kernels/csrc/{name}": hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


def build_key(texts: dict[str, str], options: Sequence[str], compiler: str) -> str:
    """Hex digest of everything that a cubin depends on."""
    return hashlib.sha256(json.dumps([sorted(texts.items()), list(options), compiler]).encode()).hexdigest()
