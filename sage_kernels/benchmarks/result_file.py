"""What every result file says of where its numbers come from."""

import argparse
import platform
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def add_commit_option(parser: argparse.ArgumentParser) -> None:
    """--commit, for describe()."""
    parser.add_argument("--commit", help="of the sources, where this is no git checkout")


def describe(command: str, device: torch.device | str | None = None, commit: str | None = None) -> dict[str, Any]:
    """Machine, GPU, versions, commit and date of a result file.

    Args:
        command: script in this folder with its arguments.
        device: what computed; None: the GPU where there is one.
        commit: of the sources; None: of the git checkout.

    Raises:
        SystemExit: no commit is given and there is no checkout: a result must say what it is a result of.
    """
    on_gpu = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    if commit is None:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
        commit = head.stdout.strip()
    if not commit:
        raise SystemExit("no git checkout here: say with --commit of which commit these sources are")
    return {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "torch": torch.__version__,
        "commit": commit,
        "date": date.today().isoformat(),
        "command": f"python sage_kernels/benchmarks/{command}",
    }
