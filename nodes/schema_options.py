"""Options of V3 schemas that not every supported version of ComfyUI knows."""

import inspect
from typing import Any

from comfy_api.latest import io


def advanced(input_type: type) -> dict[str, Any]:
    """Hide a widget behind "advanced", in versions of ComfyUI that can."""
    return {"advanced": True} if "advanced" in inspect.signature(input_type.__init__).parameters else {}


def search_aliases(*aliases: str) -> dict[str, Any]:
    """Other words that find a node, in versions of ComfyUI that have them."""
    return {"search_aliases": list(aliases)} if "search_aliases" in inspect.signature(io.Schema).parameters else {}
