"""Command line: sage-kernels doctor, selftest and bench."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from sage_kernels.architectures import device_architecture
from sage_kernels.doctor import doctor
from sage_kernels.selftest import bench, selftest


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the sage-kernels command."""
    parser = argparse.ArgumentParser(prog="sage-kernels", description="Low-bit attention for diffusion models")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="say what each device can run, why not the rest, and what to do")
    test = commands.add_parser("selftest", help="test and time the kernels on this machine's GPU, for a report")
    test.add_argument("--output", type=Path, default=Path("sage_kernels_selftest.json"), help="file to write")
    test.add_argument("--no-timings", action="store_true", help="only test; a minute or two where kernels must compile")
    speed = commands.add_parser("bench", help="time the kernels on this machine's GPU beside torch's own attention")
    speed.add_argument("--output", type=Path, help="JSON file to write too")
    for command in (test, speed):
        command.add_argument("--device", type=_gpu_number, default=0, help="number of the GPU (default: 0)")
    options = parser.parse_args(arguments)
    if options.command == "doctor":
        print(doctor())
        return 0
    device = torch.device("cuda", options.device)
    if options.device >= torch.cuda.device_count() or device_architecture(device) is None:
        print(
            f"{options.command}: there is no NVIDIA GPU {options.device}; torch sees {torch.cuda.device_count()} GPUs. "
            "In detail:"
        )
        print(doctor())
        return 1
    try:
        if options.command == "bench":
            bench(options.output, device)
            return 0
        passed = selftest(options.output, device, not options.no_timings)
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written", file=sys.stderr)
        return 130
    return 0 if passed else 1


def _gpu_number(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError
    return number
