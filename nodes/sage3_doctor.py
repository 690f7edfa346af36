"""The node Sage3Doctor."""

import re
import time
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from comfy_api.latest import io, ui

from .doctor_findings import global_patches, launch_flags, model_overrides
from .kernel_check import check_kernels
from .kernel_package import PACK_ROOT, import_sage_kernels
from .schema_options import search_aliases

_NEIGHBOURS = ("sageattention", "sageattn3", "flash-attn", "xformers", "triton", "triton-windows", "comfy-kitchen")


class Sage3Doctor(io.ComfyNode):
    """Says what runs here, what doesn't, and what to do about it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """An optional model in, a text out."""
        return io.Schema(
            node_id="Sage3Doctor",  # permanent: saved in workflows
            display_name="Sage3 Doctor",
            category="model/attention/Sage3",
            **search_aliases("sage attention problem", "attention report", "debug attention", "diagnose", "doctor"),
            description="Says which attention kernels run on this machine and why others don't, tests each against "
            "torch's attention in a process of its own, and names other nodes and packs that replace attention.",
            inputs=[
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model as it goes into the sampler: says who holds its attention.",
                )
            ],
            outputs=[io.String.Output(display_name="report")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **kwargs: Any) -> float:
        """Never the same: what it looks at is not among its inputs."""
        return time.monotonic()

    @classmethod
    def execute(cls, model: Any = None) -> io.NodeOutput:
        """Look at everything; takes some seconds."""
        text = report(model, import_sage_kernels())
        return io.NodeOutput(text, ui=ui.PreviewText(text))


def report(model: Any, kernels: ModuleType) -> str:
    """The whole text, to be read and to be pasted into a bug report."""
    from comfy.cli_args import args  # noqa: PLC0415  (tests import this file without core)

    from sage_kernels.cli import doctor  # noqa: PLC0415  (found once import_sage_kernels has run)

    package_folder = Path(kernels.__file__ or "").parents[1]
    fixes: list[str] = []
    sections = {
        "Versions": [
            f"ComfyUI {_comfyui_version()}, Sage3 pack {_pack_version()}, "
            f"sage_kernels {kernels.__version__} from {package_folder}",
            *_neighbours(),
        ],
        "What this machine runs": doctor().splitlines(),
    }
    if model is not None:
        lines, model_fixes = model_overrides(model)
        sections["This model's attention"] = lines
        fixes += model_fixes
    patches = global_patches()
    sections["Attention replaced for all models"] = patches or ["nothing"]
    if patches:
        fixes.append("A pack replaces attention for all models, text encoders and VAEs too: switch that off in it.")
    sections["ComfyUI's options"] = launch_flags(args) or ["none that touch attention"]
    checks = check_kernels(package_folder)
    sections["Kernels against torch's attention"] = [f"{c['case']}: {c['state']}: {c['detail']}" for c in checks]
    fixes += kernel_fixes(checks)
    sections["What to do"] = fixes or ["nothing: no problem was found"]
    return "\n".join(line for title, lines in sections.items() for line in (f"== {title}", *lines, "")).strip()


def kernel_fixes(checks: list[dict[str, str]]) -> list[str]:
    """What to do about kernels that fail their test."""
    bad = [check["case"] for check in checks if check["state"] in {"wrong", "crashed"}]
    if not bad:
        return []
    return [
        f"These kernels fail here: {', '.join(bad)}. Set precision to one that is ok above, update the GPU driver, and "
        "report this text."
    ]


def _comfyui_version() -> str:
    try:
        from comfyui_version import __version__  # noqa: PLC0415
    except ImportError:
        return "of unknown version"
    return str(__version__)


def _pack_version() -> str:
    match = re.search(r'^version = "([^"]+)"', (PACK_ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    return match[1] if match else "of unknown version"


def _neighbours() -> list[str]:
    found = []
    for name in _NEIGHBOURS:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return [f"also installed: {', '.join(found)}"] if found else []
