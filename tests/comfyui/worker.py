"""Runs scenarios inside ComfyUI for tests in another process: importing ComfyUI has effects on the whole process.

Usage: worker.py COMFYUI_ROOT PACK_ROOT BASE_FOLDER. Reads one JSON request {"scenario", "arguments"} a line, answers
each with one line, {"result"} or {"error"}. Whatever ComfyUI prints goes to stderr.
"""

import asyncio
import importlib
import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType

# As ComfyUI's main.py does, so that ComfyUI's own `nodes` and `utils` are found.
COMFYUI_ROOT, PACK_ROOT, BASE_FOLDER = sys.argv[1:4]
PACK_NAME = "sage3_pack"


def start_comfyui() -> None:
    """Import ComfyUI with the options of a server on the CPU."""
    sys.path.insert(0, COMFYUI_ROOT)
    # On the CPU core's default is an attention that GPUs don't use, and that fails on the masks of LTX-Video.
    sys.argv = ["main.py", "--cpu", "--use-pytorch-cross-attention", "--base-directory", BASE_FOLDER]
    import comfy.options  # noqa: PLC0415

    comfy.options.enable_args_parsing()
    import utils.extra_config  # noqa: F401, PLC0415  (early, as main.py: core's `nodes` puts comfy/utils.py before it)


def load_pack() -> ModuleType:
    """Import the pack by its path, as ComfyUI does, and ask it for its nodes."""
    spec = importlib.util.spec_from_file_location(PACK_NAME, Path(PACK_ROOT) / "__init__.py")
    pack = importlib.util.module_from_spec(spec)
    sys.modules[PACK_NAME] = pack
    spec.loader.exec_module(pack)
    extension = asyncio.run(pack.comfy_entrypoint())
    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    start_comfyui()
    nodes = load_pack()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            module, _, scenario = request["scenario"].rpartition(".")
            run = getattr(importlib.import_module(module or "scenarios"), scenario)
            reply = {"result": run(nodes, **request["arguments"])}
        except Exception:
            reply = {"error": traceback.format_exc()}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
