"""What every result file says of where its numbers come from."""

import platform
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def describe(command: str, device: torch.device | str | None = None, commit: str | None = None) -> dict[str, Any]:
    """Machine, GPU, versions, commit and date of a result file.

    Args:
        command: script in this folder with its arguments.
        device: what computed; None: the GPU where there is one.
        commit: of the sources where they are no git checkout.
    """
    on_gpu = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    if commit is None:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
        commit = head.stdout.strip()
    return {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "torch": torch.__version__,
        "commit": commit,
        "date": date.today().isoformat(),
        "command": f"python sage_kernels/benchmarks/{command}",
    }
