"""What this machine has and lacks for the kernels, in plain words, as text to paste into an issue."""

import importlib.util
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

from sage_kernels import __version__
from sage_kernels.architectures import device_architecture
from sage_kernels.capabilities import DeviceCapabilities, capabilities
from sage_kernels.cubin_cache import cache_folder
from sage_kernels.cubin_loader import kernel_origin
from sage_kernels.cubin_manifest import CubinManifest
from sage_kernels.dispatch import NEVER_RUN
from sage_kernels.driver import DriverError, KernelLoadError, cuda_driver
from sage_kernels.kernel_variants import VARIANTS
from sage_kernels.nvrtc import Nvrtc, find_libraries, search_folders

_PACKAGE = Path(__file__).parent


def doctor() -> str:
    """Everything that bears on the kernels, and what to do about what is missing."""
    fixes: list[str] = []
    lines = [
        f"sage_kernels {__version__} from {_PACKAGE.parent}",
        f"Python {platform.python_version()}, {platform.platform()}, "
        f"torch {torch.__version__}, CUDA of torch {torch.version.cuda or 'none'}",
        f"GPU driver: {_driver()}",
        *_compilers(),
        f"Triton: {_triton_version() or 'not installed'}",
        *_cubins(fixes),
        *_cache(),
    ]
    for device in capabilities():
        lines.append(f"{device.device}: {device.name}" + (f" ({device.architecture})" if device.architecture else ""))
        lines.append(f"  runs: {', '.join(device.precisions)}")
        lines += [f"  not {refusal}" for refusal in device.refusals]
        lines += _never_run(torch.device(device.device))
        lines += _kernels(torch.device(device.device), fixes)
        if "int8" in device.precisions and _triton_version() is None:
            fixes.append(_triton_fix(device))
    fixes += _torch_fixes()
    return "\n".join([*lines, "What to do:", *(f"- {fix}" for fix in fixes or ["nothing: no problem was found"])])


def driver_version() -> str:
    """Version of the GPU driver as NVIDIA counts, or why it is unknown."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown (no nvidia-smi)"
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown (nvidia-smi: {type(error).__name__})"
    return ", ".join(dict.fromkeys(answer.split()))


def _driver() -> str:
    try:
        major, minor = cuda_driver().version()
    except (KernelLoadError, DriverError) as error:
        return str(error)
    return f"{driver_version()}, CUDA up to {major}.{minor}"


def _compilers() -> Iterator[str]:
    libraries = find_libraries(search_folders())
    if not libraries:
        yield "NVRTC: none found; only kernels that are in the package can run"
    for path in libraries:
        try:
            name = Nvrtc(path).name
        except (OSError, AttributeError, KernelLoadError) as error:
            yield f"NVRTC: {path} can't be used: {error}"
        else:
            yield f"{name}: {path}"


def _triton_version() -> str | None:
    """As installed, on Windows under another name."""
    if importlib.util.find_spec("triton") is None:
        return None
    for package in ("triton", "triton-windows"):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def _triton_fix(device: DeviceCapabilities) -> str:
    has_more = device.architecture == "sm_90"
    calls = "int8_fp16, and int8 with a mask tensor," if has_more else "int8 and int8_fp16"
    package = "triton-windows" if sys.platform == "win32" else "triton"
    return f"Triton is not installed: {calls} can't run on {device.name}; to get them, pip install {package}"


def _cubins(fixes: list[str]) -> Iterator[str]:
    try:
        manifest = CubinManifest(_PACKAGE / "cubins")
    except KernelLoadError as error:
        fixes.append(str(error))
        yield "kernels in the package: unknown"
        return
    damaged = []
    for cubin in manifest.cubins.values():
        try:
            cubin.read()
        except KernelLoadError as error:
            damaged.append(str(error))
    fixes += damaged
    if manifest.cubins:
        yield f"kernels in the package: {len(manifest.cubins)}, {len(damaged) or 'none'} damaged"
    else:
        yield "kernels in the package: none; NVRTC compiles each at first use"


def _cache() -> Iterator[str]:
    folder = cache_folder()
    if folder is None:
        yield "kernels compiled on this machine: none are kept, because this user has no home folder"
        return
    count = len(list(folder.glob("*.cubin")))
    if count:
        yield f"kernels compiled on this machine: {count}, in {folder}"


def _never_run(device: torch.device) -> Iterator[str]:
    """One line per precision that no GPU of this kind ever ran."""
    architecture = device_architecture(device)
    for precision in architecture.never_run if architecture else ():
        yield f"  {precision}: {NEVER_RUN}; `sage-kernels selftest` checks it"


def _kernels(device: torch.device, fixes: list[str]) -> Iterator[str]:
    """One line per kernel family that this GPU could run."""
    architecture = device_architecture(device)
    if architecture is None:
        return
    arch = architecture.target
    for family in dict.fromkeys(variant.family for variant in VARIANTS):
        origins: dict[str, None] = {}
        for variant in VARIANTS:
            if variant.family != family or arch not in variant.archs:
                continue
            try:
                origins[kernel_origin(variant, arch)] = None
            except (KernelLoadError, DriverError) as error:
                origins["can't be loaded"] = None
                if str(error) not in fixes:
                    fixes.append(str(error))
        if origins:
            yield f"  {family}: {'; '.join(origins)}"


def _torch_fixes() -> Iterator[str]:
    if torch.cuda.is_available():
        return
    if torch.version.cuda is None and torch.version.hip is None:
        yield "No CUDA GPU is visible: this torch is built without CUDA; to use a GPU, install a CUDA build of torch"
    else:
        yield (
            "No CUDA GPU is visible to torch: check that nvidia-smi shows it and that CUDA_VISIBLE_DEVICES doesn't "
            "hide it, and update its driver"
        )
