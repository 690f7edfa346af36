"""The CUDA driver by ctypes: load a cubin, launch a kernel. Nothing is loaded on import, no CUDA toolkit needed."""

import ctypes
import sys
import threading
from collections.abc import Iterable, Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute
_PARAMETER_ARRAY = c_void_p * 1
TENSOR_MAP = ctypes.c_uint64 * 16  # CUtensorMap
_TENSOR_MAP_ALIGNMENT = 64
# CUtensorMapDataType, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill
_16_BITS, _NOT_INTERLEAVED, _SWIZZLED_128_BYTES, _L2_128_BYTES, _ZEROS = 1, 0, 3, 2, 0

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxGetCurrent": (POINTER(c_void_p),),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuModuleLoadData": (POINTER(c_void_p), c_char_p),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuLaunchKernelEx": (c_void_p, c_void_p, c_void_p, c_void_p),
}
_ADVICE = {
    100: "no CUDA GPU is visible; check that the GPU shows up in nvidia-smi",
    200: "the compiled kernel is not readable by this driver; update the GPU driver",
    209: "the compiled kernel is for another GPU architecture",
    222: "the GPU driver is older than the compiler of this kernel; update the GPU driver",
    701: "the kernel wants more registers or shared memory than this GPU has",
    900: "the first use of a kernel can't be captured in a CUDA graph; make the same call once before the capture",
    803: "the driver in use and the one installed differ; restart the machine",
}


class KernelLoadError(RuntimeError):
    """A kernel can't be loaded here; the message says why and what to do."""


class DriverError(RuntimeError):
    """A call of the CUDA driver failed."""


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig: what cuLaunchKernelEx takes in one struct, which is cheaper to pass than eight arguments."""

    _fields_ = (
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared_bytes", c_uint),
        ("stream", c_void_p),
        ("attributes", c_void_p),
        ("attribute_count", c_uint),
    )


@dataclass(frozen=True, eq=False)
class ConfiguredLaunch:
    """A launch without its parameters, as the driver takes it; threads may share it, nothing changes it.

    Attributes:
        function: the kernel.
        config: where the driver finds the rest.
        address: of `config`; numbers are cheaper to pass than references.
    """

    function: int
    config: LaunchConfig
    address: int


class _CurrentContext(threading.local):
    """Where the driver writes a thread's current context."""

    def __init__(self) -> None:
        self.handle = c_void_p()
        self.reference = byref(self.handle)


def point_to(parameters: ctypes.Structure) -> "ctypes.Array[Any]":
    """What Driver.launch() takes of the parameter's struct, which must live until it returns."""
    return _PARAMETER_ARRAY(ctypes.addressof(parameters))


def configure_launch(
    function: int, grid: tuple[int, int, int], threads: int, shared_bytes: int, stream: int
) -> ConfiguredLaunch:
    """Grid in blocks, `threads` in each, dynamic shared memory in bytes."""
    config = LaunchConfig(grid, (threads, 1, 1), shared_bytes, stream, None, 0)
    return ConfiguredLaunch(function, config, ctypes.addressof(config))


class Driver:
    """The few functions of the CUDA driver that launching takes.

    Args:
        library: the loaded driver library.

    Raises:
        DriverError: the driver can't start.
        KernelLoadError: the library lacks a function: it is too old.
    """

    def __init__(self, library: Any) -> None:
        for name, argument_types in _SIGNATURES.items():
            function = getattr(library, name, None)
            if function is None:
                raise KernelLoadError(f"the GPU driver has no {name}: it is too old; update the GPU driver")
            function.argtypes = argument_types
            function.restype = c_int
        self._library = library
        self._get_context, self._launch = library.cuCtxGetCurrent, library.cuLaunchKernelEx
        self._push, self._pop = library.cuCtxPushCurrent_v2, library.cuCtxPopCurrent_v2
        self._current = _CurrentContext()
        self._check("cuInit", library.cuInit(0))

    def version(self) -> tuple[int, int]:
        """The newest CUDA version that the driver supports, such as (12, 8)."""
        number = c_int()
        self._check("cuDriverGetVersion", self._library.cuDriverGetVersion(byref(number)))
        return number.value // 1000, number.value % 1000 // 10

    def primary_context(self, index: int) -> int:
        """The context that torch uses on device `index`; kept alive until the process ends."""
        device, context = c_int(), c_void_p()
        self._check("cuDeviceGet", self._library.cuDeviceGet(byref(device), index))
        retain = self._library.cuDevicePrimaryCtxRetain
        self._check("cuDevicePrimaryCtxRetain", retain(byref(context), device))
        return _handle(context)

    def load_function(self, context: int, cubin: bytes, entry: str) -> int:
        """Load `cubin` into `context` and find the kernel `entry`; the module stays until the process ends."""
        module, function = c_void_p(), c_void_p()
        self._check("cuCtxPushCurrent", self._push(context))
        try:
            self._check("cuModuleLoadData", self._library.cuModuleLoadData(byref(module), cubin))
            get_function = self._library.cuModuleGetFunction
            self._check(f"cuModuleGetFunction({entry})", get_function(byref(function), module, entry.encode()))
        finally:
            self._pop(byref(c_void_p()))
        return _handle(function)

    def parameter_bytes(self, function: int) -> int | None:
        """Size of the kernel's first parameter; None where the driver is too old (before 12.4) to tell."""
        get_info = getattr(self._library, "cuFuncGetParamInfo", None)
        if get_info is None:
            return None
        get_info.argtypes = (c_void_p, c_size_t, POINTER(c_size_t), POINTER(c_size_t))
        get_info.restype = c_int
        offset, size = c_size_t(), c_size_t()
        self._check("cuFuncGetParamInfo", get_info(function, 0, byref(offset), byref(size)))
        return size.value

    def tensor_map(
        self, address: int, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]
    ) -> "ctypes.Array[ctypes.c_uint64]":
        """How bulk copies find boxes of a matrix of 16-bit numbers, with rows of 128 bytes swizzled, zeros beyond it.

        Args:
            address: a multiple of 16.
            sizes: of its axes, the fastest first.
            strides: of all but the first axis, in bytes; multiples of 16.
            box: size in each axis.
        """
        rank = len(sizes)
        place = (ctypes.c_uint64 * (16 + _TENSOR_MAP_ALIGNMENT // 8))()
        start = ctypes.addressof(place)
        aligned = start + -start % _TENSOR_MAP_ALIGNMENT
        encode = self._library.cuTensorMapEncodeTiled
        encode.restype = c_int
        result = encode(
            c_void_p(aligned), c_int(_16_BITS), c_uint(rank), c_void_p(address), (ctypes.c_uint64 * rank)(*sizes),
            (ctypes.c_uint64 * (rank - 1))(*strides), (c_uint * rank)(*box), (c_uint * rank)(*[1] * rank),
            c_int(_NOT_INTERLEAVED), c_int(_SWIZZLED_128_BYTES), c_int(_L2_128_BYTES), c_int(_ZEROS),
        )  # fmt: skip
        self._check("cuTensorMapEncodeTiled", result)
        return TENSOR_MAP.from_buffer_copy(place, aligned - start)

    def allow_shared_memory(self, context: int, function: int, size: int) -> None:
        """Let launches of `function` use up to `size` bytes of dynamic shared memory."""
        self._check("cuCtxPushCurrent", self._push(context))
        try:
            result = self._library.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_SIZE_BYTES, size)
            self._check(f"cuFuncSetAttribute({size} bytes of shared memory)", result)
        finally:
            self._pop(byref(c_void_p()))

    def launch(self, context: int, launches: Iterable[tuple[ConfiguredLaunch, "ctypes.Array[Any]"]]) -> None:
        """Launch in a row, whatever context the calling thread has current.

        A thread that has not used CUDA yet has none, and the caller's device may be another one.

        Args:
            context: of the kernels.
            launches: each with an array that begins with the address of its only parameter, a struct.
        """
        current = self._current
        result = self._get_context(current.reference)
        if result:
            self._check("cuCtxGetCurrent", result)
        is_current = current.handle.value == context
        if not is_current:
            self._check("cuCtxPushCurrent", self._push(context))
        try:
            for launch, arguments in launches:
                result = self._launch(launch.address, launch.function, arguments, None)
                if result:
                    break
        finally:
            if not is_current:
                self._pop(byref(c_void_p()))
        if result:
            self._check("cuLaunchKernel", result)

    def _check(self, call: str, result: int) -> None:
        if result == 0:
            return
        name, text = c_char_p(), c_char_p()
        self._library.cuGetErrorName(result, byref(name))
        self._library.cuGetErrorString(result, byref(text))
        message = f"{call} failed: {(name.value or b'unknown error').decode()} ({result})"
        details = [part for part in ((text.value or b"").decode(), _ADVICE.get(result)) if part]
        raise DriverError(": ".join([message, "; ".join(details)]) if details else message)


def _handle(pointer: c_void_p) -> int:
    assert pointer.value is not None
    return pointer.value


@lru_cache(maxsize=1)
def cuda_driver() -> Driver:
    """The driver of this machine, loaded on the first call.

    Raises:
        KernelLoadError: there is none, or it is too old.
        DriverError: it can't start.
    """
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise KernelLoadError(f"no CUDA driver: {error}; install the driver of the GPU") from error
    return Driver(library)
