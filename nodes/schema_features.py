"""What node definitions can say in newer versions of ComfyUI, left out in older ones."""

import inspect
from typing import Any

from comfy_api.latest import io


def advanced(input_type: type) -> dict[str, Any]:
    """Keyword that hides a widget behind "advanced"."""
    return {"advanced": True} if "advanced" in inspect.signature(input_type.__init__).parameters else {}


def search_aliases(*names: str) -> dict[str, Any]:
    """Keyword for other names under which a node is found."""
    return {"search_aliases": list(names)} if "search_aliases" in inspect.signature(io.Schema).parameters else {}
