#!/usr/bin/env python3
"""Launcher for a fresh clone: `python dev.py demo` and `python dev.py test`.

Needs Python 3.10 or newer and nothing else: makes .venv beside this file, installs what the command needs and runs it.
Works on Linux, Windows and macOS. Options after the command go to it: `python dev.py test -k formats`.
"""

import argparse
import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
KERNEL_PROJECT = ROOT / "sage_kernels"
MINIMUM_PYTHON = (3, 10)
# What --no-venv checks for; ensure_environment() installs them by sage_kernels/pyproject.toml.
MODULES = {
    "demo": (
        DEMO := ["torch", "diffusers", "safetensors", "PIL", "tqdm", "skimage", "matplotlib", "jinja2", "websocket"]
    ),
    "train": [*DEMO, "sklearn"],
    "test": [*DEMO, "pytest", "ml_dtypes", "hypothesis", "ruff", "mypy", "clang_format"],
}
COMFYUI_OPTIONS = {
    "--comfyui-root": "demo and test: a ComfyUI checkout to run in as well",
    "--comfyui-python": "demo and test: the Python that has ComfyUI's requirements",
}


def main() -> int:
    """Parse the command line, prepare the environment, run the command."""
    if sys.version_info < MINIMUM_PYTHON:
        print(f"dev.py needs Python 3.10 or newer; this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--no-venv", action="store_true", help="use this Python as it is, for one that has a CUDA build of torch"
    )
    parser.add_argument(
        "command", choices=COMMANDS, help="demo: videos side by side; test: all checks; train: the model"
    )
    for name, help_text in COMFYUI_OPTIONS.items():
        parser.add_argument(name, type=os.path.abspath, help=help_text)
    arguments, rest = parser.parse_known_args()
    # With an equals sign: pytest would take a separate DIR for a folder of tests.
    rest += [f"{name}={value}" for name in COMFYUI_OPTIONS if (value := getattr(arguments, name[2:].replace("-", "_")))]
    python = Path(sys.executable)
    try:
        if arguments.no_venv:
            require_modules(arguments.command)
        else:
            python = ensure_environment(arguments.command)
        return COMMANDS[arguments.command](python, rest)
    except subprocess.CalledProcessError as error:
        print(f"dev.py: {' '.join(map(str, error.cmd))} failed with exit code {error.returncode}", file=sys.stderr)
        return error.returncode
    except KeyboardInterrupt:
        return 130


def ensure_environment(extra: str) -> Path:
    """Make .venv and install the extra of sage_kernels that has the command's name, once per project file."""
    python = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = hashlib.sha256((KERNEL_PROJECT / "pyproject.toml").read_bytes() + sys.version.encode()).hexdigest()
    stamp = VENV / f"installed-{extra}.txt"
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return python
    if not python.exists():
        print(f"Making {VENV}")
        try:
            venv.create(VENV, with_pip=True)
        except subprocess.CalledProcessError:
            raise SystemExit(
                "dev.py: this Python can't make virtual environments; on Debian or Ubuntu: apt install python3-venv"
            ) from None
    print(f"Installing what `{extra}` needs (torch is large: this takes a while the first time)")
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-e", f"{KERNEL_PROJECT}[{extra}]")
    stamp.write_text(wanted)
    return python


def require_modules(extra: str) -> None:
    """End with a clear message where this Python lacks what a command imports."""
    missing = [name for name in MODULES[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"dev.py: this Python ({sys.executable}) lacks {', '.join(missing)}; install what `{extra}` needs with: "
            f'{sys.executable} -m pip install -e "{KERNEL_PROJECT}[{extra}]"'
        )


def demo(python: Path, rest: list[str]) -> int:
    """Videos with 16-bit and FP4 attention side by side, into demo_output/."""
    return hand_over(python, "demo", rest, demo_environment())


def train(python: Path, rest: list[str]) -> int:
    """Train the demo model again."""
    return hand_over(python, "demo.train", rest, demo_environment())


def test(python: Path, rest: list[str]) -> int:
    """Lint, types, format of the CUDA sources, then every test that this machine can run."""
    run(python, "-m", "ruff", "check", ".")
    run(python, "-m", "ruff", "format", "--check", ".")
    run(python, "-m", "mypy")
    folders = (KERNEL_PROJECT / "csrc", ROOT / "tests" / "kernels")
    sources = [path for folder in folders for pattern in ("*.cu", "*.cuh") for path in folder.rglob(pattern)]
    # The package has no __main__.
    run(python, "-c", "import clang_format; clang_format.clang_format()", "--dry-run", "--Werror", *sources)
    os.chdir(ROOT)
    return hand_over(python, "pytest", rest, environment())


def demo_environment() -> dict[str, str]:
    """The demo is no installed package: it is found through the path."""
    paths = [str(KERNEL_PROJECT), str(KERNEL_PROJECT / "src"), os.environ.get("PYTHONPATH", "")]
    # PYTHONSAFEPATH: a `demo` in the user's own folder is not taken for ours.
    return {**environment(), "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1"}


def environment() -> dict[str, str]:
    """Threads that wait asleep: spinning ones make a CPU that is also used otherwise ten times slower."""
    return {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}


def hand_over(python: Path, module: str, rest: list[str], environ: dict[str, str]) -> int:
    """Become `python -m module`, so that an interruption reaches it and nobody else; Windows can't, and waits."""
    command = [str(python), "-m", module, *rest]
    if os.name == "nt":
        return wait_for(command, environ)
    sys.stdout.flush()
    os.execve(command[0], command, environ)


def wait_for(command: list[str], environ: dict[str, str]) -> int:
    """Run to the end, whatever time it takes to end after Ctrl+C, which reaches it too."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return subprocess.call(command, env=environ)
    finally:
        signal.signal(signal.SIGINT, before)


def run(*command: object) -> None:
    """Run and raise when it fails."""
    subprocess.run([str(part) for part in command], cwd=ROOT, check=True)


COMMANDS = {"demo": demo, "test": test, "train": train}

if __name__ == "__main__":
    raise SystemExit(main())
