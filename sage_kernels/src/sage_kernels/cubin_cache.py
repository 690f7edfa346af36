"""Cubins compiled on this machine, kept on disk. A damaged entry counts as missing; processes may share the folder."""

import contextlib
import hashlib
import logging
import os
import sys
import tempfile
from pathlib import Path

_LOG = logging.getLogger("sage_kernels")
_DIGEST_BYTES = hashlib.sha256().digest_size


def cache_folder() -> Path | None:
    """Where the platform keeps what can be made again; None for users without a home folder."""
    try:
        home = Path.home()
    except RuntimeError:
        return None
    if sys.platform == "win32":
        return home / "AppData" / "Local" / "sage_kernels" / "cache"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "sage_kernels"
    return home / ".cache" / "sage_kernels"


class CubinCache:
    """Files KEY.cubin in one folder, each led by the SHA-256 of the rest.

    Args:
        folder: made when it is needed; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def read(self, key: str) -> bytes | None:
        """The cubin, or None where there is none or it is damaged."""
        if self.folder is None:
            return None
        path = self.folder / f"{key}.cubin"
        try:
            cubin = _intact(path.read_bytes())
        except OSError:
            return None
        if cubin is None:
            _LOG.warning("the cached kernel %s is damaged and will be compiled again", path)
        return cubin

    def write(self, key: str, cubin: bytes) -> None:
        """Keep a cubin; where the folder can't be written, the next process compiles again."""
        if self.folder is None:
            _LOG.warning("the compiled kernel can't be kept for the next start: there is no home folder")
            return
        path = self.folder / f"{key}.cubin"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor, partial = tempfile.mkstemp(dir=self.folder, suffix=".partial")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(hashlib.sha256(cubin).digest() + cubin)
                os.replace(partial, path)
            except BaseException:
                with contextlib.suppress(OSError):  # Windows: a virus scanner may have it open
                    os.unlink(partial)
                raise
        except OSError as error:
            if not _holds(path, cubin):
                _LOG.warning("the compiled kernel can't be kept for the next start: %s", error)


def _holds(path: Path, cubin: bytes) -> bool:
    """Whether another process was first: Windows doesn't replace a file that somebody reads."""
    try:
        return _intact(path.read_bytes()) == cubin
    except OSError:
        return False


def _intact(content: bytes) -> bytes | None:
    """The cubin in a file, or None where it is damaged."""
    digest, cubin = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return cubin if hashlib.sha256(cubin).digest() == digest else None
