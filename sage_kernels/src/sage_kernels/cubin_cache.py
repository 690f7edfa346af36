"""Cubins compiled on this machine, kept on disk. A damaged entry counts as missing; processes may share the folder."""

import hashlib
import logging
import os
import sys
import tempfile
from pathlib import Path

_LOG = logging.getLogger("sage_kernels")
_DIGEST_BYTES = hashlib.sha256().digest_size


def cache_folder() -> Path:
    """Where the platform keeps what can be made again."""
    if sys.platform == "win32":
        return Path.home() / "AppData" / "Local" / "sage_kernels" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "sage_kernels"
    return Path.home() / ".cache" / "sage_kernels"


class CubinCache:
    """Files KEY.cubin in one folder, each led by the SHA-256 of the rest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, key: str) -> bytes | None:
        """The cubin, or None where there is none or it is damaged."""
        try:
            content = self._path(key).read_bytes()
        except OSError:
            return None
        digest, cubin = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if hashlib.sha256(cubin).digest() == digest:
            return cubin
        _LOG.warning("the cached kernel %s is damaged and will be compiled again", self._path(key))
        return None

    def write(self, key: str, cubin: bytes) -> None:
        """Keep a cubin; where the folder can't be written, the next process compiles again."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor, partial = tempfile.mkstemp(dir=self.folder, suffix=".partial")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(hashlib.sha256(cubin).digest() + cubin)
                os.replace(partial, self._path(key))
            except BaseException:
                os.unlink(partial)
                raise
        except OSError as error:
            _LOG.warning("the compiled kernel can't be kept for the next start: %s", error)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.cubin"
