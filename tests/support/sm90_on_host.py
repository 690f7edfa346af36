"""csrc/training_sm90_*.cu compiled for this machine's CPU, with tests/kernels/sm90_on_host.h in place of sm90.cuh."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

from sage_kernels.kernel_sources import collect_sources, source_folder

HEADER = Path(__file__).resolve().parent.parent / "kernels" / "sm90_on_host.h"


def find_compiler():
    """A C++ compiler with _Float16, or None."""
    return shutil.which("g++") or shutil.which("clang++")


class HostKernel:
    """What cubin_loader.LoadedKernel does for GPUs, slowly."""

    def __init__(self, variant, folder):
        texts = collect_sources(source_folder(), variant.source)
        if "training_sm90.cuh" in texts:
            # Functions that are PTX are the host header's; they stand between these lines.
            texts["training_sm90.cuh"], cut = re.subn(
                r"(?s)DEVICE float load_shared_float.*?(?=// matrix_descriptor of)", "", texts["training_sm90.cuh"]
            )
            assert cut == 1
        source = self._with_headers(texts, variant.source)
        memory = "extern __shared__ __align__(1024) u8 memory[];"
        assert (memory in source) == (variant.shared_bytes > 0)
        parameters = re.search(r"__grid_constant__ (\w+) p\)", source)[1]
        source = source.replace(memory, "u8* memory = shared_memory;")
        has_producers = int("shrink_registers" in source)
        call = f"launch_on_host<{parameters}>({variant.entry}, *p, blocks, {variant.threads}, {has_producers});"
        source += f'extern "C" void launch(const {parameters}* p, int blocks) {{ {call} }}'
        path = Path(folder) / f"{variant.name}.cpp"
        path.write_text(source)
        defines = [f"-D{name}={value}" for name, value in variant.defines]
        options = ["-O2", "-std=c++17", "-w", "-fPIC", "-shared", "-pthread", *defines]
        subprocess.run(
            [find_compiler(), *options, str(path), "-o", str(path.with_suffix(".so"))], check=True, timeout=120
        )
        self._library = ctypes.CDLL(str(path.with_suffix(".so")))

    def _with_headers(self, texts, name):
        def read(match):
            included = match[1]
            return f'#include "{HEADER}"' if included == "sm90.cuh" else self._with_headers(texts, included)

        return re.sub(r'#include "([^"]+)"', read, texts[name].replace("#pragma once", ""))

    def launch(self, grid, parameters):
        self._library.launch(ctypes.byref(parameters), grid[0])
