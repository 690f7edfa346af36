"""What Sage3Doctor finds out about this ComfyUI: who replaces attention where, and what was asked for at its start."""

import functools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .attention_override import AttentionOverride
from .model_patching import OVERRIDE_KEY, WRAPPER_KEY

_CORE_ATTENTION = "comfy.ldm.modules.attention"
_ATTENTION_NAMES = ("optimized_attention", "optimized_attention_masked", "attention_pytorch", "attention_basic")
# Options of ComfyUI's command line, as attributes of its args, and what they mean to this pack.
_FLAGS = {
    "use_sage_attention": "the calls that this pack leaves alone run in SageAttention, not in 16 bit",
    "use_flash_attention": "the calls that this pack leaves alone run in FlashAttention",
    "use_ck_attention": "the calls that this pack leaves alone run in Comfy Kitchen's INT8 attention, not in 16 bit",
    "use_split_cross_attention": "the calls that this pack leaves alone run in a slow attention",
    "use_quad_cross_attention": "the calls that this pack leaves alone run in a slow attention",
    "force_upcast_attention": "models that ask for float32 attention are left alone",
    "cpu": "ComfyUI runs on the CPU: no kernel for a GPU can be used",
}


def launch_flags(args: Any) -> list[str]:
    """Lines about the options of ComfyUI's command line that touch attention."""
    return [
        f"--{name.replace('_', '-')}: {meaning}"
        for name, meaning in _FLAGS.items()
        if getattr(args, name, False) is True
    ]


def model_overrides(model: Any) -> tuple[list[str], list[str]]:
    """Who holds the attention of a MODEL, outermost first; and what to do about it."""
    holder = model.model_options.get("transformer_options", {}).get(OVERRIDE_KEY)
    patched_by_us = any(WRAPPER_KEY in keys for keys in model.wrappers.values())
    lines: list[str] = []
    fixes: list[str] = []
    if holder is None:
        lines.append("no attention override: the model runs ComfyUI's own attention")
        fixes.append("This model is not patched: connect Sage3 Attention before it reaches this node.")
    elif isinstance(holder, AttentionOverride):
        lines.append(f"Sage3 Attention; its last sampling: {holder.coverage}")
        lines += [f"it leaves to: {origin(holder.previous)}"] if holder.previous is not None else []
        lines += [f"{block} gave non-finite numbers and stays in FP16" for block in sorted(holder.bad_blocks)]
    else:
        lines.append(f"an attention override of {origin(holder)}")
        if patched_by_us:
            fixes.append(
                f"A node after Sage3 Attention has replaced it by {origin(holder)}: remove or bypass that node, or "
                "put it before Sage3 Attention."
            )
    return lines, fixes


def global_patches() -> list[str]:
    """Lines about functions of torch and core that something has replaced for every model at once."""
    lines = []
    sdpa = torch.nn.functional.scaled_dot_product_attention
    if not isinstance(sdpa, type(torch.relu)) and not _is_torch(sdpa):
        lines.append(f"torch's scaled_dot_product_attention is replaced by {origin(sdpa)}")
    for name, module in sorted(sys.modules.items()):
        if not name.startswith("comfy.ldm.") or not isinstance(module, ModuleType):
            continue
        for attribute in _ATTENTION_NAMES:
            function = vars(module).get(attribute)
            if callable(function) and not _is_core(function):
                lines.append(f"{name}.{attribute} is replaced by {origin(function)}")
    return lines


def origin(function: Any) -> str:
    """Where a function comes from, as a user would name it: "KJNodes (patch.<locals>.override)", "ComfyUI itself"."""
    function = _innermost(function)
    label = getattr(function, "__qualname__", type(function).__qualname__)
    file = _file(function)
    parts = Path(file).parts if file else ()
    if "custom_nodes" in parts:
        return f"{parts[parts.index('custom_nodes') + 1]} ({label})"
    if _is_core(function):
        return f"ComfyUI itself ({label})"
    return f"{getattr(function, '__module__', None) or type(function).__module__} ({label})"


def _innermost(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__func__", function)


def _file(function: Any) -> str | None:
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return None if code is None else code.co_filename


def _is_core(function: Any) -> bool:
    """Whether the code itself is core's: functools.wraps() lets a replacement carry the name of what it replaces."""
    function = _innermost(function)
    core = Path(sys.modules[_CORE_ATTENTION].__file__ or "").parents[3] if _CORE_ATTENTION in sys.modules else None
    file = _file(function)
    if file is None or core is None:
        return str(getattr(function, "__module__", "")).startswith("comfy.")
    return core in Path(file).parents and "custom_nodes" not in Path(file).parts


def _is_torch(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith("torch")
