"""Records of tests that ran on a GPU: which cases, which errors, on which sources; of other sources they are stale."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sage_kernels.cubin_loader import kernel_origin
from sage_kernels.doctor import driver_version
from sage_kernels.driver import DriverError, KernelLoadError
from sage_kernels.kernel_sources import collect_sources, source_folder, source_hashes
from sage_kernels.kernel_variants import VARIANTS
from sage_kernels.nvrtc import find_nvrtc

_PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class FamilySources:
    """What generates the kernels of a family, as patterns.

    Attributes:
        cuda: in csrc/; the headers that they include follow from them.
        python: in the package; files with Triton kernels and what decides their shape.
    """

    cuda: tuple[str, ...] = ()
    python: tuple[str, ...] = ()


FAMILIES: dict[str, FamilySources] = {
    "nvfp4": FamilySources(("nvfp4_*.cu",), ("kernels/triton_nvfp4.py",)),
    "mxfp8_nvfp4": FamilySources(("nvfp4_*.cu",)),
    "int8": FamilySources(
        ("int8_*.cu",), ("kernels/triton_int8/*.py", "kernels/int8_configs.py", "kernels/int8_operands.py")
    ),
    "training": FamilySources(
        ("training_*.cu",),
        ("training/triton_kernels/*.py", "training/*_backend.py", "training/configs.py", "training/recipe.py"),
    ),
    "kv_cache": FamilySources(("kv_cache_*.cu",), ("kv_cache/*.py",)),
}


@dataclass(frozen=True)
class Case:
    """One thing that was computed on the GPU and compared.

    Attributes:
        name: unique within the family.
        passed: whether the error is within the bound, and everything else the test asks for holds.
        max_error: the largest error; None where the test ended before it was known.
        bound: what it may be; None likewise.
    """

    name: str
    passed: bool
    max_error: float | None
    bound: float | None


def family_source_hashes(family: str) -> dict[str, str]:
    """SHA-256 of every file that generates a kernel of `family`, by its path in the repository."""
    hashes: dict[str, str] = {}
    for source in _cuda_sources(family):
        hashes |= source_hashes(collect_sources(source_folder(), source))
    for pattern in FAMILIES[family].python:
        for path in _PACKAGE.glob(pattern):
            digest = hashlib.sha256(path.read_text(encoding="utf-8").encode()).hexdigest()
            hashes[f"sage_kernels/src/sage_kernels/{path.relative_to(_PACKAGE).as_posix()}"] = digest
    return dict(sorted(hashes.items()))


def build_flags_hash(family: str) -> str:
    """SHA-256 of the compiler's options of all variants of `family`."""
    sources = set(_cuda_sources(family))
    flags = [(variant.name, variant.compile_options("")) for variant in VARIANTS if variant.source in sources]
    return hashlib.sha256(json.dumps(sorted(flags)).encode()).hexdigest()


def make_record(families: Sequence[str], cases: Sequence[Case], arch: str, commit: str) -> dict[str, Any]:
    """What tests/gpu/evidence/FAMILY.json holds.

    Args:
        families: whose kernels were tested.
        cases: what was tested.
        arch: what the CUDA kernels were compiled for, such as "sm_90a".
        commit: of the repository.
    """
    sources: dict[str, str] = {}
    for family in families:
        sources |= family_source_hashes(family)
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver_version(),
        "torch": torch.__version__,
        "compiler": ", ".join(sorted({compiler for family in families for compiler in _compilers(family, arch)})),
        "commit": commit,
        "date": date.today().isoformat(),
        "sources": sources,
        "build_flags": {family: build_flags_hash(family) for family in families},
        "cases": [asdict(case) for case in cases],
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1) + "\n")
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def _cuda_sources(family: str) -> list[str]:
    folder = source_folder()
    return sorted(path.name for pattern in FAMILIES[family].cuda for path in folder.glob(pattern))


def _compilers(family: str, arch: str) -> Iterator[str]:
    """What compiled the kernels that run on `arch`; for other kernels, which tests build with emulation, NVRTC."""
    sources = set(_cuda_sources(family))
    for variant in VARIANTS:
        if variant.source in sources:
            try:
                yield kernel_origin(variant, arch) if arch in variant.archs else find_nvrtc(arch).name
            except (KernelLoadError, DriverError):
                yield "no compiler for some kernels"
    if any(path.endswith(".py") for path in family_source_hashes(family)):
        try:
            yield f"triton {metadata.version('triton')}"
        except metadata.PackageNotFoundError:
            yield "no triton"
