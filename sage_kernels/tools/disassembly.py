"""Machine code of a cubin, by NVIDIA's nvdisasm from PyPI (part of the test extra)."""

import re
import subprocess
import tempfile
from collections import Counter
from importlib import metadata
from pathlib import Path

_OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)


def find_nvdisasm() -> Path | None:
    """The program, or None where the package is not installed (it exists for Linux and Windows)."""
    try:
        files = metadata.files("nvidia-cuda-nvdisasm") or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(file.locate()) for file in files if file.stem == "nvdisasm"), None)


def disassemble(cubin: bytes, nvdisasm: Path) -> str:
    """SASS of all kernels of a cubin.

    Raises:
        ValueError: nvdisasm can't read it.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        done = subprocess.run([nvdisasm, "-c", file], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"nvdisasm can't read this cubin: {done.stderr.strip()}")
    return done.stdout


def count_opcodes(sass: str) -> Counter[str]:
    """How often each opcode stands in the listing, without its modifiers: OMMA, not OMMA.16864.F32."""
    return Counter(_OPCODE.findall(sass))
