"""The wheel as a file whose every byte follows from the sources: order, times, permissions and metadata are fixed.

Members are stored, not deflated: two versions of zlib compress the same bytes differently.
"""

import base64
import hashlib
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomllib

PROJECT = Path(__file__).resolve().parents[1]
_TIME = (2020, 1, 1, 0, 0, 0)
_PERMISSIONS = 0o100644 << 16
_DATA_SUFFIXES = {"csrc": (".cu", ".cuh"), "package": (".py", ".typed", ".json")}


def write_wheel(folder: Path, cubins: Mapping[str, bytes], project: Path = PROJECT) -> Path:
    """Write the wheel of the package with `cubins` (name in cubins/ -> content) into `folder`.

    Returns:
        Path of the wheel.
    """
    metadata = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    stem = f"{metadata['name'].replace('-', '_')}-{metadata['version']}"
    members = {
        **_files(project / "src" / "sage_kernels", "sage_kernels", _DATA_SUFFIXES["package"]),
        **_files(project / "csrc", "sage_kernels/csrc", _DATA_SUFFIXES["csrc"]),
        **{f"sage_kernels/cubins/{name}": content for name, content in cubins.items()},
        f"{stem}.dist-info/METADATA": _metadata(metadata).encode(),
        f"{stem}.dist-info/WHEEL": (
            b"Wheel-Version: 1.0\nGenerator: build_cubins\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
        f"{stem}.dist-info/entry_points.txt": _entry_points(metadata["scripts"]).encode(),
        f"{stem}.dist-info/licenses/LICENSE": (project.parent / "LICENSE").read_bytes(),
    }
    record = f"{stem}.dist-info/RECORD"
    lines = [f"{name},sha256={_record_digest(content)},{len(content)}" for name, content in sorted(members.items())]
    members[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    path = folder / f"{stem}-py3-none-any.whl"
    partial = path.with_name(f".{path.name}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members, key=lambda name: (".dist-info/" in name, name)):
            info = zipfile.ZipInfo(name, _TIME)
            info.create_system = 3  # Unix, on every system
            info.external_attr = _PERMISSIONS
            archive.writestr(info, members[name])
    os.replace(partial, path)
    return path


def _files(folder: Path, target: str, suffixes: tuple[str, ...]) -> dict[str, bytes]:
    return {
        f"{target}/{path.relative_to(folder).as_posix()}": path.read_bytes()
        for path in folder.rglob("*")
        if path.suffix in suffixes and path.is_file()
    }


def _metadata(project: Mapping[str, Any]) -> str:
    lines = [
        "Metadata-Version: 2.4",
        f"Name: {project['name']}",
        f"Version: {project['version']}",
        f"Summary: {project['description']}",
        f"License-Expression: {project['license']}",
        "License-File: LICENSE",
        f"Requires-Python: {project['requires-python']}",
        *(f"Requires-Dist: {requirement}" for requirement in project["dependencies"]),
    ]
    return "\n".join([*lines, ""])


def _entry_points(scripts: Mapping[str, str]) -> str:
    return "\n".join(["[console_scripts]", *(f"{name} = {target}" for name, target in scripts.items()), ""])


def _record_digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
