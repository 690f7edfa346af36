"""Command line: sage-kernels doctor."""

import argparse
import platform
from collections.abc import Sequence

import torch

from sage_kernels import __version__, capabilities


def doctor() -> str:
    """What this machine can run and why not the rest, as text to paste into a report."""
    lines = [
        f"sage_kernels {__version__}, torch {torch.__version__}, CUDA of torch {torch.version.cuda or 'none'}, "
        f"Python {platform.python_version()}, {platform.system()}"
    ]
    for device in capabilities():
        lines.append(f"{device.device}: {device.name}" + (f" ({device.architecture})" if device.architecture else ""))
        lines.append(f"  runs: {', '.join(device.precisions)}")
        lines += [f"  not {refusal}" for refusal in device.refusals]
    if not torch.cuda.is_available():
        lines.append("No CUDA GPU is visible to torch: install a CUDA build of torch and the GPU's driver to use one.")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the sage-kernels command."""
    parser = argparse.ArgumentParser(prog="sage-kernels", description="Low-bit attention for diffusion models")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="say what each device can run, and why not the rest")
    parser.parse_args(arguments)
    print(doctor())
    return 0
