"""Kernel variants to launchable kernels: the wheel's cubin first, else NVRTC at first use and a cache on disk."""

import ctypes
import logging
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

from sage_kernels.architectures import device_architecture
from sage_kernels.cubin_cache import CubinCache, cache_folder
from sage_kernels.cubin_manifest import Cubin, CubinManifest
from sage_kernels.driver import (
    ConfiguredLaunch,
    Driver,
    DriverError,
    KernelLoadError,
    configure_launch,
    cuda_driver,
    point_to,
)
from sage_kernels.kernel_sources import build_key, collect_sources, source_folder, source_hashes
from sage_kernels.kernel_variants import KernelVariant
from sage_kernels.nvrtc import Nvrtc, find_nvrtc

_LOG = logging.getLogger("sage_kernels")
_DEFAULT_SHARED_BYTES = 48 << 10  # more than this a kernel must be allowed explicitly
# The CUDA version whose driver is the first to know an architecture, and the driver that came with a CUDA version.
_FIRST_CUDA = {"sm_120a": (12, 8), "sm_121a": (12, 9), "sm_100a": (12, 8), "sm_103a": (12, 9), "sm_110a": (13, 0)}
_DRIVERS = {(12, 0): "525", (12, 8): "570", (12, 9): "575", (13, 0): "580"}


class LoadedKernel:
    """A kernel on one device. Made by load_kernel(); safe to launch from several threads."""

    def __init__(self, driver: Driver, variant: KernelVariant, index: int, cubin: bytes) -> None:
        self.variant = variant
        self.device_index = index
        self.driver = driver
        self.context = driver.primary_context(index)
        self._function = driver.load_function(self.context, cubin, variant.entry)
        self._parameter_bytes = driver.parameter_bytes(self._function)
        self._allowed_shared_bytes = _DEFAULT_SHARED_BYTES
        self._allow_shared_memory(variant.shared_bytes)

    def launch(self, grid: tuple[int, int, int], parameters: ctypes.Structure, shared_bytes: int | None = None) -> None:
        """Launch on torch's current stream of the kernel's device; does not wait.

        Args:
            grid: blocks in x, y and z.
            parameters: the kernel's only parameter, copied before this returns.
            shared_bytes: dynamic shared memory; the variant's own when None.

        Raises:
            TypeError: `parameters` has another size than the kernel's parameter.
            DriverError: the launch failed.
        """
        self.check_parameters(type(parameters))
        launch = self.configure(grid, current_stream(self.device_index), shared_bytes)
        self.driver.launch(self.context, ((launch, point_to(parameters)),))

    def configure(self, grid: tuple[int, int, int], stream: int, shared_bytes: int | None = None) -> ConfiguredLaunch:
        """A launch that is complete but for its parameters; arguments as of launch(), `stream` as the driver has it."""
        if shared_bytes is None:
            shared_bytes = self.variant.shared_bytes
        elif shared_bytes > self._allowed_shared_bytes:
            self._allow_shared_memory(shared_bytes)
        return configure_launch(self._function, grid, self.variant.threads, shared_bytes, stream)

    def check_parameters(self, parameters: type[ctypes.Structure]) -> None:
        """Refuse a struct of another size than the kernel's parameter.

        Raises:
            TypeError: it has another size.
        """
        if self._parameter_bytes is not None and ctypes.sizeof(parameters) != self._parameter_bytes:
            raise TypeError(
                f"{parameters.__name__} has {ctypes.sizeof(parameters)} bytes, "
                f"{self.variant.entry} takes {self._parameter_bytes}"
            )

    def _allow_shared_memory(self, size: int) -> None:
        if size > self._allowed_shared_bytes:
            self.driver.allow_shared_memory(self.context, self._function, size)
            self._allowed_shared_bytes = size


def current_stream(index: int) -> int:
    """torch's current stream of a device, as the driver has it."""
    # The public torch.cuda.current_stream() makes a Python object for each call.
    return int(torch._C._cuda_getCurrentRawStream(index))


class KernelLoader:
    """Loads each kernel once per device.

    Args:
        driver: the CUDA driver.
        sources: folder of the CUDA sources.
        manifest: cubins that come with the package.
        cache: cubins compiled here.
        find_compiler: gives the compiler for a target.
    """

    def __init__(
        self,
        driver: Driver,
        sources: Path,
        manifest: CubinManifest,
        cache: CubinCache,
        find_compiler: Callable[[str], Nvrtc] = find_nvrtc,
    ) -> None:
        self._driver = driver
        self._sources = sources
        self._manifest = manifest
        self._cache = cache
        self._find_compiler = find_compiler
        self._lock = threading.Lock()
        self._loaded: dict[tuple[KernelVariant, int, bool], LoadedKernel] = {}

    def load(self, variant: KernelVariant, index: int, arch: str, emulate: bool) -> LoadedKernel:
        """As load_kernel(), with the device's index and compilation target."""
        key = (variant, index, emulate)
        loaded = self._loaded.get(key)
        if loaded is not None:
            return loaded
        with self._lock:
            if key not in self._loaded:
                cubin = self._cubin(variant, arch, emulate)
                self._loaded[key] = LoadedKernel(self._driver, variant, index, cubin)
            return self._loaded[key]

    def origin(self, variant: KernelVariant, arch: str) -> str:
        """Where the kernel would come from; compiles nothing.

        Raises:
            KernelLoadError, DriverError: it can't be loaded; the message says what to do.
        """
        ready = self._ready_cubin(variant, arch, collect_sources(self._sources, variant.source))
        if ready is not None:
            ready.read()
            return f"ready in the package, by NVRTC {ready.compiler[0]}.{ready.compiler[1]}"
        compiler = self._compiler(arch)
        return f"compiled at first use, by {compiler.name}"

    def _cubin(self, variant: KernelVariant, arch: str, emulate: bool) -> bytes:
        texts = collect_sources(self._sources, variant.source)
        ready = None if emulate else self._ready_cubin(variant, arch, texts)
        if ready is not None:
            return ready.read()
        compiler = self._compiler(arch)
        options = variant.compile_options(arch, emulate)
        key = build_key(texts, options, str(compiler.version))
        cubin = self._cache.read(key)
        if cubin is None:
            cubin = _compile(compiler, variant, texts, options, arch)
            self._cache.write(key, cubin)
        return cubin

    def _ready_cubin(self, variant: KernelVariant, arch: str, texts: dict[str, str]) -> Cubin | None:
        if arch not in variant.archs:
            raise KernelLoadError(f"{variant.name} is made for {', '.join(variant.archs)}, not for {arch}")
        ready = self._manifest.find(variant, arch, source_hashes(texts))
        if ready is not None:
            check_driver(self._driver.version(), ready.compiler, arch)
        return ready

    def _compiler(self, arch: str) -> Nvrtc:
        compiler = self._find_compiler(arch)
        check_driver(self._driver.version(), compiler.version, arch)
        return compiler


def _compile(
    compiler: Nvrtc, variant: KernelVariant, texts: dict[str, str], options: tuple[str, ...], arch: str
) -> bytes:
    # A warning, so that Python shows it without any setting: without it the first call seems to hang.
    _LOG.warning("compiling %s for %s: once on this machine, some seconds to a minute", variant.name, arch)
    start = time.perf_counter()
    headers = {name: text for name, text in texts.items() if name != variant.source}
    cubin = compiler.compile(variant.source, texts[variant.source], headers, options)
    _LOG.info("compiled %s in %.1f s", variant.name, time.perf_counter() - start)
    return cubin


def check_driver(driver: tuple[int, int], compiler: tuple[int, int], arch: str) -> None:
    """Refuse a driver that can't load what `compiler` makes for `arch`.

    Cubins load on drivers of the compiler's own major CUDA version, older minor ones included, and on newer ones.

    Raises:
        KernelLoadError: it is too old; names the version that is needed.
    """
    needed = max((compiler[0], 0), _FIRST_CUDA.get(arch, (0, 0)))
    if driver < needed:
        product = f" (version {_DRIVERS[needed]} or newer)" if needed in _DRIVERS else ""
        raise KernelLoadError(
            f"the GPU driver supports CUDA up to {driver[0]}.{driver[1]}; kernels for {arch} need a driver for CUDA "
            f"{needed[0]}.{needed[1]}{product}: update the GPU driver"
        )


@lru_cache(maxsize=1)
def _default_loader() -> KernelLoader:
    manifest = CubinManifest(Path(__file__).parent / "cubins")
    return KernelLoader(cuda_driver(), source_folder(), manifest, CubinCache(cache_folder()))


def load_kernel(variant: KernelVariant, device: torch.device, emulate: bool = False) -> LoadedKernel:
    """The kernel of `variant` on `device`; later calls return the same object.

    Args:
        variant: what to load.
        device: a CUDA device; the current one where it has no index.
        emulate: compile with EMULATION_OPTION, for GPUs without the instructions (tests only).

    Raises:
        ValueError: not a CUDA device of NVIDIA.
        KernelLoadError, DriverError: it can't be compiled or loaded here; the message says what to do.
    """
    architecture = device_architecture(device)
    if architecture is None:
        raise ValueError(f"kernels load on NVIDIA GPUs, got device {device}")
    index = torch.cuda.current_device() if device.index is None else device.index
    return _default_loader().load(variant, index, architecture.target, emulate)


@lru_cache
def loading_obstacle(variant: KernelVariant, arch: str) -> str | None:
    """Why the kernel can't be loaded on an architecture of this machine, or None; compiles nothing.

    Args:
        variant: the kernel.
        arch: compilation target of the GPU, such as "sm_120a".
    """
    try:
        _default_loader().origin(variant, arch)
    except (KernelLoadError, DriverError) as error:
        return str(error)
    return None


def kernel_origin(variant: KernelVariant, arch: str) -> str:
    """Where a kernel comes from on this machine, in words.

    Raises:
        KernelLoadError, DriverError: it can't be loaded here.
    """
    return _default_loader().origin(variant, arch)
