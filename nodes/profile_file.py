"""Calibration profiles as safetensors files: float32 tensors and JSON metadata.

Files come from strangers. What the header claims is checked against the file's size before anything is allocated for
it, and nothing in a file is ever executed.
"""

import json
import os
import struct
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

from sage_kernels.block_overrides import BlockLayout

from .profile import (
    MAX_BLOCKS,
    MAX_STEPS,
    TENSORS,
    CalibrationProfile,
    ProfileError,
    check_integer,
)

FORMAT_VERSION = 1
SUFFIX = ".sage3.safetensors"
MAX_FILE_BYTES = 64 << 20
MAX_HEADER_BYTES = 1 << 20
_METADATA_KEY = "sage3_profile"
_FIELDS: dict[str, type] = {
    "version": int,
    "family": str,
    "fingerprint": str,
    "pack_version": str,
    "blocks": dict,
    "schedule": list,
    "steps": list,
    "precisions": list,
    "heads": list,
    "method": str,
    "settings": dict,
}
_LONGEST = {"blocks": MAX_BLOCKS, "schedule": MAX_STEPS + 1, "steps": MAX_STEPS, "heads": MAX_BLOCKS}


def write_profile(profile: CalibrationProfile, path: Path) -> None:
    """Write to a temporary file beside `path`, then put it in place."""
    metadata = {
        "version": FORMAT_VERSION,
        "family": profile.family,
        "fingerprint": profile.fingerprint,
        "pack_version": profile.pack_version,
        "blocks": dict(profile.layout.counts),
        "schedule": list(profile.schedule),
        "steps": list(profile.steps),
        "precisions": list(profile.precisions),
        "heads": list(profile.heads),
        "method": profile.method,
        "settings": dict(profile.settings),
    }
    tensors = {name: getattr(profile, name).detach().cpu().contiguous() for name in TENSORS}
    data = safetensors.torch.save(tensors, {_METADATA_KEY: json.dumps(metadata)})
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_profile(path: Path) -> CalibrationProfile:
    """Read and check a profile.

    Raises:
        ProfileError: the file is missing, damaged, no profile, or of another version.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe or a device might never end
            raise ProfileError(f"{path.name} can't be read: it is no file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(min(size, MAX_FILE_BYTES + 1))
    except OSError as error:
        raise ProfileError(f"{path.name} can't be read: {error.strerror}") from None
    try:
        return parse_profile(data)
    except ProfileError as error:
        raise ProfileError(f"{path.name} is no usable Sage3 profile: {error}") from None


def parse_profile(data: bytes) -> CalibrationProfile:
    """The profile in the bytes of a file.

    Raises:
        ProfileError: what is wrong with them.
    """
    if len(data) > MAX_FILE_BYTES:
        raise ProfileError(f"it is larger than {MAX_FILE_BYTES >> 20} MiB")
    header = _read_header(data)
    fields = _read_fields(header.pop("__metadata__", None))
    if header.keys() != set(TENSORS):
        raise ProfileError(f"it must hold the tensors {', '.join(TENSORS)} and no others")
    try:
        # Refuses shapes and offsets that don't fit the bytes that are there, so no tensor is larger than the file.
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError:
        raise ProfileError("its safetensors structure is damaged") from None
    return CalibrationProfile(
        layout=BlockLayout(fields.pop("blocks")),
        **{name: tuple(fields.pop(name)) for name in ("schedule", "steps", "precisions", "heads")},
        **fields,
        **tensors,
    )


def _read_header(data: bytes) -> dict[str, Any]:
    """The JSON header."""
    if len(data) < 8:
        raise ProfileError("it is shorter than a safetensors header")
    (length,) = struct.unpack("<Q", data[:8])
    if length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise ProfileError("its header is longer than the file, or than 1 MiB")
    return _parse_object(data[8 : 8 + length], "header")


def _read_fields(metadata: object) -> dict[str, Any]:
    text = metadata.get(_METADATA_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise ProfileError(f"its metadata has no {_METADATA_KEY}")
    fields = _parse_object(text.encode("utf-8", "replace"), "metadata")
    version = fields.get("version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise ProfileError(f"it has another format version than {FORMAT_VERSION}; update this pack or calibrate again")
    if fields.keys() != _FIELDS.keys():
        raise ProfileError("its metadata has missing or unknown fields")
    for name, type_ in _FIELDS.items():
        if not isinstance(fields[name], type_):
            raise ProfileError(f"{name} in its metadata must be a JSON {type_.__name__}")
        if name in _LONGEST and len(fields[name]) > _LONGEST[name]:
            raise ProfileError(f"{name} in its metadata is too long")
    del fields["version"]
    for count in fields["blocks"].values():
        check_integer("a number of blocks", count, 1, MAX_BLOCKS)
    if not all(isinstance(precision, str) for precision in fields["precisions"]):
        raise ProfileError("precisions must be strings")
    return fields


def _parse_object(text: bytes, name: str) -> dict[str, Any]:
    """A JSON object; a key that comes twice and numbers that JSON doesn't know are refused."""
    try:
        parsed = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except ProfileError:
        raise
    except (ValueError, RecursionError):  # RecursionError: brackets nested by the thousand
        raise ProfileError(f"its {name} is no readable JSON") from None
    if not isinstance(parsed, dict):
        raise ProfileError(f"its {name} is no JSON object")
    return parsed


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise ProfileError("its JSON has a key twice")
    return unique


def _no_constant(name: str) -> float:
    raise ProfileError(f"its JSON has the number {name}")
