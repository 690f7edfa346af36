"""The cubins that come with the wheel: manifest.json, and files that must match it."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sage_kernels.driver import KernelLoadError
from sage_kernels.kernel_variants import KernelVariant

_REINSTALL = "install the wheel again: pip install --force-reinstall --no-deps sage_kernels-....whl"


@dataclass(frozen=True)
class Cubin:
    """One file of the manifest.

    Attributes:
        path: where it is.
        sha256: what it must hash to.
        compiler: (major, minor) of the compiler.
    """

    path: Path
    sha256: str
    compiler: tuple[int, int]

    def read(self) -> bytes:
        """The cubin.

        Raises:
            KernelLoadError: it is missing, or not the file that the manifest describes.
        """
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise KernelLoadError(f"{self.path} can't be read: {error}; {_REINSTALL}") from error
        found = hashlib.sha256(content).hexdigest()
        if found != self.sha256:
            raise KernelLoadError(
                f"{self.path} is refused: its SHA-256 is {found}, the manifest says {self.sha256}; {_REINSTALL}"
            )
        return content


class CubinManifest:
    """The folder cubins/ of the package; empty where the package was not installed from a wheel that has it.

    Raises:
        KernelLoadError: the manifest is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sources: dict[str, str] = {}
        self.cubins: dict[str, Cubin] = {}
        path = folder / "manifest.json"
        if not path.is_file():
            return
        try:
            manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            self.sources = manifest["sources"]
            for kernel in manifest["kernels"]:
                major, minor = (int(number) for number in kernel["compiler"].split(".")[:2])
                self.cubins[kernel["file"]] = Cubin(folder / kernel["file"], kernel["sha256"], (major, minor))
        except (ValueError, KeyError, TypeError) as error:
            raise KernelLoadError(f"{path} is damaged ({type(error).__name__}: {error}); {_REINSTALL}") from error

    def find(self, variant: KernelVariant, arch: str, source_hashes: dict[str, str]) -> Cubin | None:
        """The cubin of a variant; None where there is none, or where it was made from other sources than these."""
        cubin = self.cubins.get(variant.cubin_name(arch))
        if cubin is None or any(self.sources.get(path) != digest for path, digest in source_hashes.items()):
            return None
        return cubin
