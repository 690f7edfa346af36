"""GET /sage3/layout?model=FILE: the blocks of a model file, for the slider strip before the first run.

Answers {"family", "blocks": [{"name", "type", "index"}, ...]}, or {"error"} with status 400, 404 or 422. Reads nothing
but the header of a safetensors file that ComfyUI's own loaders list.
"""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from .checkpoint_families import checkpoint_layout

MODEL_FOLDERS = ("diffusion_models", "checkpoints")
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_LENGTH_BYTES = 8


class LayoutError(Exception):
    """The blocks of a file can't be told; the message is one line, `status` the HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def register_layout_route() -> None:
    """Add the route to ComfyUI's server; nothing where none was started, as in scripts that load nodes on their own."""
    # Not imported: ComfyUI has done so before it loads nodes, and doing so without it has effects of its own.
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    instance = getattr(server, "instance", None)
    if instance is not None:
        instance.routes.get("/sage3/layout")(answer)


async def answer(request: Any) -> Any:
    """aiohttp handler."""
    from aiohttp import web  # noqa: PLC0415

    try:
        # In a thread: reading and parsing may take seconds on a slow disk, and the server has one event loop.
        return web.json_response(await asyncio.to_thread(model_layout, request.query.get("model", "")))
    except LayoutError as error:
        return web.json_response({"error": str(error)}, status=error.status)


def model_layout(model: str) -> dict[str, Any]:
    """What the route answers for a file, named as in ComfyUI's loaders.

    Raises:
        LayoutError: no such model, no safetensors file, a broken one, or a family that isn't known.
    """
    found = checkpoint_layout(read_tensor_names(find_model(model)))
    if found is None:
        raise LayoutError(422, f"{model} is of a family whose blocks can't be told from the file")
    family, layout = found
    blocks = [{"name": layout.name(block), "type": block.type, "index": block.index} for block in layout]
    return {"family": family.name, "blocks": blocks}


def find_model(model: str) -> Path:
    """Where a model lies, by the name that ComfyUI's loaders list.

    Raises:
        LayoutError: they don't list it: only what they list is ever opened.
    """
    import folder_paths  # noqa: PLC0415  (ComfyUI's)

    if not model:
        raise LayoutError(400, "model is missing: write /sage3/layout?model=FILE, as the loader names it")
    for folder in MODEL_FOLDERS:
        if model in folder_paths.get_filename_list(folder):
            path = folder_paths.get_full_path(folder, model)
            if path is not None:
                return Path(path)
    raise LayoutError(404, f"no loader lists a model of this name in {' or '.join(MODEL_FOLDERS)}")


def read_tensor_names(path: Path) -> list[str]:
    """The names of the tensors in a safetensors file, from its header alone.

    Raises:
        LayoutError: no safetensors file, or a broken one.
    """
    if path.suffix != ".safetensors":
        raise LayoutError(422, f"the blocks of {path.suffix or 'such'} files can't be told, only those of .safetensors")
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            available = os.fstat(file.fileno()).st_size - _LENGTH_BYTES
            if not 2 <= length <= min(available, MAX_HEADER_BYTES):
                raise LayoutError(422, f"{path.name} is no whole safetensors file: its header would be {length} bytes")
            header = json.loads(file.read(length))
    except OSError as error:
        raise LayoutError(422, f"{path.name} can't be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise LayoutError(422, f"{path.name} is no safetensors file: its header is no JSON") from None
    if not isinstance(header, dict):
        raise LayoutError(422, f"{path.name} is no safetensors file: its header is no JSON object")
    return [name for name in header if name != "__metadata__"]
