"""NVRTC by ctypes: CUDA C++ to cubin, with the compiler that torch ships. Compiles without a GPU."""

import ctypes
import glob
import re
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_void_p
from functools import lru_cache
from pathlib import Path

import torch

from sage_kernels.driver import KernelLoadError

_PROGRAM = c_void_p
_SIGNATURES = {
    "nvrtcVersion": (POINTER(c_int), POINTER(c_int)),
    "nvrtcGetNumSupportedArchs": (POINTER(c_int),),
    "nvrtcGetSupportedArchs": (POINTER(c_int),),
    "nvrtcCreateProgram": (
        *(POINTER(_PROGRAM), c_char_p, c_char_p),
        *(c_int, POINTER(c_char_p), POINTER(c_char_p)),
    ),
    "nvrtcCompileProgram": (_PROGRAM, c_int, POINTER(c_char_p)),
    "nvrtcGetProgramLogSize": (_PROGRAM, POINTER(c_size_t)),
    "nvrtcGetProgramLog": (_PROGRAM, c_char_p),
    "nvrtcGetCUBINSize": (_PROGRAM, POINTER(c_size_t)),
    "nvrtcGetCUBIN": (_PROGRAM, c_char_p),
    "nvrtcDestroyProgram": (POINTER(_PROGRAM),),
}
# "alt" is a second build of the same compiler that NVIDIA ships beside it; "builtins" is a part of it.
_FILE_NAMES = re.compile(r"libnvrtc\.so(\.\d+)*|nvrtc64_\d+_\d+\.dll")
_SEARCHED_IN_SITE_PACKAGES = ("torch/lib", "nvidia/cu*/lib", "nvidia/cu*/bin/**", "nvidia/cuda_nvrtc/*")
_SEARCHED_IN_SYSTEM = (
    *("/usr/local/cuda/lib64", "/usr/local/cuda-*/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu"),
    *("/usr/lib64", "/opt/cuda/lib64"),
)


class Nvrtc:
    """One NVRTC library.

    Args:
        path: the shared library.

    Raises:
        OSError: it can't be loaded.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if sys.platform == "win32":  # NVRTC finds this part of itself only on PATH or where it is loaded already
            for builtins in path.parent.glob("nvrtc-builtins*.dll"):
                ctypes.CDLL(str(builtins))
        self._library = ctypes.CDLL(str(path))
        for name, argument_types in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes = argument_types
            function.restype = c_int
        self._library.nvrtcGetErrorString.argtypes = (c_int,)
        self._library.nvrtcGetErrorString.restype = c_char_p

    @property
    def version(self) -> tuple[int, int]:
        """Such as (12, 8)."""
        major, minor = c_int(), c_int()
        self._check("nvrtcVersion", self._library.nvrtcVersion(byref(major), byref(minor)))
        return major.value, minor.value

    @property
    def name(self) -> str:
        """Such as "NVRTC 12.8"."""
        return f"NVRTC {self.version[0]}.{self.version[1]}"

    def supports(self, arch: str) -> bool:
        """Whether it can compile for `arch`, such as "sm_120a"."""
        count = c_int()
        self._check("nvrtcGetNumSupportedArchs", self._library.nvrtcGetNumSupportedArchs(byref(count)))
        archs = (c_int * count.value)()
        self._check("nvrtcGetSupportedArchs", self._library.nvrtcGetSupportedArchs(archs))
        return int(arch.removeprefix("sm_").rstrip("af")) in archs

    def compile(self, name: str, source: str, headers: Mapping[str, str], options: Sequence[str]) -> bytes:
        """Compile to a cubin.

        Args:
            name: what the compiler calls the source in its messages.
            source: CUDA C++.
            headers: text of every file that it includes, by the name it is included by.
            options: command-line options; one of them is "-arch=sm_...".

        Raises:
            KernelLoadError: it does not compile; carries the compiler's messages.
        """
        program = _PROGRAM()
        texts, names = _c_strings(headers.values()), _c_strings(headers)
        self._check(
            "nvrtcCreateProgram",
            self._library.nvrtcCreateProgram(
                byref(program), source.encode(), name.encode(), len(headers), texts, names
            ),
        )
        try:
            if self._library.nvrtcCompileProgram(program, len(options), _c_strings(options)):
                raise KernelLoadError(
                    f"{name} does not compile with {self.name} ({self.path}) and "
                    f"{' '.join(options)}:\n{self._log(program)}"
                )
            size = c_size_t()
            self._check("nvrtcGetCUBINSize", self._library.nvrtcGetCUBINSize(program, byref(size)))
            cubin = ctypes.create_string_buffer(size.value)
            self._check("nvrtcGetCUBIN", self._library.nvrtcGetCUBIN(program, cubin))
            return cubin.raw
        finally:
            self._library.nvrtcDestroyProgram(byref(program))

    def _log(self, program: c_void_p) -> str:
        size = c_size_t()
        self._check("nvrtcGetProgramLogSize", self._library.nvrtcGetProgramLogSize(program, byref(size)))
        log = ctypes.create_string_buffer(size.value)
        self._check("nvrtcGetProgramLog", self._library.nvrtcGetProgramLog(program, log))
        return log.value.decode(errors="replace").strip()

    def _check(self, call: str, result: int) -> None:
        if result:
            reason = self._library.nvrtcGetErrorString(result).decode()
            raise KernelLoadError(f"{call} of {self.path} failed: {reason} ({result})")


def _c_strings(texts: Iterable[str]) -> "ctypes.Array[c_char_p]":
    encoded = [text.encode() for text in texts]
    return (c_char_p * len(encoded))(*encoded)


def search_folders() -> list[str]:
    """Where NVRTC is looked for, best first; patterns as in Path.glob."""
    site_packages = dict.fromkeys([Path(torch.__file__).parents[1], Path(sysconfig.get_path("purelib"))])
    # Escaped, because folders of users may be called "ComfyUI [portable]".
    roots = [glob.escape(root.as_posix()) for root in site_packages]
    folders = [f"{root}/{pattern}" for root in roots for pattern in _SEARCHED_IN_SITE_PACKAGES]
    conda = "Library/bin" if sys.platform == "win32" else "lib"
    folders.append(f"{glob.escape(Path(sys.prefix).as_posix())}/{conda}")
    if sys.platform == "win32":
        folders.append("C:/Program Files/NVIDIA GPU Computing Toolkit/CUDA/*/bin/**")
    else:
        folders += _SEARCHED_IN_SYSTEM
    return folders


def find_libraries(folders: Sequence[str]) -> list[Path]:
    """NVRTC libraries in `folders`, in their order; of several in one folder the newest first."""
    found: dict[Path, Path] = {}
    for pattern in folders:
        anchor = Path(pattern).anchor
        for folder in sorted(Path(anchor).glob(pattern[len(anchor) :]), reverse=True):
            if not folder.is_dir():
                continue
            for file in sorted(folder.iterdir(), reverse=True):
                if _FILE_NAMES.fullmatch(file.name):
                    found.setdefault(file.resolve(), file)
    return list(found.values())


@lru_cache
def find_nvrtc(arch: str) -> Nvrtc:
    """The first NVRTC of this machine that can compile for `arch`.

    Raises:
        KernelLoadError: none can; names what was searched and found, and what to do.
    """
    folders = search_folders()
    found = []
    for path in find_libraries(folders):
        try:
            nvrtc = Nvrtc(path)
            supported = nvrtc.supports(arch)
        except (OSError, AttributeError, KernelLoadError) as error:
            found.append(f"{path} can't be used: {error}")
            continue
        if supported:
            return nvrtc
        found.append(f"{path} is {nvrtc.name}, which doesn't know {arch}")
    raise KernelLoadError(
        f"no NVRTC that compiles for {arch}: {'; '.join(found) or 'searched ' + ', '.join(folders)}. Install the "
        "sage_kernels wheel, which needs no compiler, or a CUDA build of torch (CUDA 12.8 or newer for RTX 50)"
    )
