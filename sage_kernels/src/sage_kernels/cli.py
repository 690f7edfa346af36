"""Command line: sage-kernels doctor."""

import argparse
from collections.abc import Sequence

from sage_kernels.doctor import doctor


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the sage-kernels command."""
    parser = argparse.ArgumentParser(prog="sage-kernels", description="Low-bit attention for diffusion models")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="say what each device can run, why not the rest, and what to do")
    parser.parse_args(arguments)
    print(doctor())
    return 0
