"""Start a ComfyUI checkout with this node pack in it, in a temporary folder of its own, and stop it again."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

PACK_ROOT = Path(__file__).resolve().parents[2]
PACK_FOLDER = "sage3-attention"

_STOP_TIMEOUT_S = 10.0
_LOG_LINES_SHOWN = 25


class ComfyServerError(RuntimeError):
    """ComfyUI could not be started."""


class ComfyServer:
    """A ComfyUI server as a context manager; `url` is where it answers.

    Models, outputs, settings and the database live in a temporary folder, so the checkout and the user's files stay as
    they are. The pack is linked into it as its only custom node, but for those that are asked for.
    """

    def __init__(
        self,
        root: Path,
        *,
        python: str | None = None,
        environment: Mapping[str, str] | None = None,
        cpu: bool = True,
        start_timeout_s: float = 180.0,
        further_packs: Sequence[Path] = (),
    ) -> None:
        """Only remember; `with` starts the server.

        Args:
            root: a ComfyUI checkout, the folder with main.py.
            python: an interpreter that has ComfyUI's requirements; by default the one that belongs to the checkout,
                see `checkout_python`.
            environment: added to this process's environment variables.
            cpu: run the models on the CPU.
            start_timeout_s: how long to wait for the first answer.
            further_packs: folders of other node packs to link beside this one.

        Raises:
            ComfyServerError: no main.py in root.
        """
        self._root = Path(root).resolve()
        if not (self._root / "main.py").is_file():
            raise ComfyServerError(f"{root} is no ComfyUI checkout: it has no main.py")
        self._python = python or checkout_python(self._root)
        self._environment = {**os.environ, **(environment or {})}
        # main.py imports what lies beside it, which the demo's own setting would forbid.
        self._environment.pop("PYTHONSAFEPATH", None)
        self._cpu = cpu
        self._start_timeout_s = start_timeout_s
        self._further_packs = further_packs
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    @property
    def base(self) -> Path:
        """The temporary folder; it exists while the server runs."""
        if self._folder is None:
            raise RuntimeError("the server is not running")
        return Path(self._folder.name)

    def log(self) -> str:
        """What ComfyUI printed so far."""
        return (self.base / "comfyui.log").read_text(encoding="utf-8", errors="replace")

    def __enter__(self) -> ComfyServer:
        self._folder = tempfile.TemporaryDirectory(prefix="comfyui-", ignore_cleanup_errors=True)
        try:
            (self.base / "custom_nodes").mkdir()
            _link_folder(PACK_ROOT, self.base / "custom_nodes" / PACK_FOLDER)
            for pack in self._further_packs:
                _link_folder(pack, self.base / "custom_nodes" / pack.name)
            self._start()
            self._wait_until_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        options = ["--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(self.base)]
        options += ["--database-url", "sqlite:///:memory:", "--disable-auto-launch", "--disable-api-nodes"]
        options += ["--cpu"] if self._cpu else []
        with (self.base / "comfyui.log").open("wb") as log:
            self._process = subprocess.Popen(
                [self._python, str(self._root / "main.py"), *options],
                cwd=self.base,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _wait_until_up(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self._start_timeout_s
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise self._failure(f"ended with exit code {self._process.returncode}")
            try:
                with urllib.request.urlopen(f"{self.url}/system_stats", timeout=5):
                    return
            except (urllib.error.URLError, TimeoutError):
                time.sleep(0.2)
        raise self._failure(f"did not answer within {self._start_timeout_s:.0f} s")

    def _failure(self, what: str) -> ComfyServerError:
        tail = "\n".join(self.log().splitlines()[-_LOG_LINES_SHOWN:])
        return ComfyServerError(f"ComfyUI in {self._root}, run by {self._python}, {what}; its last lines:\n{tail}")


def checkout_python(root: Path) -> str:
    """The interpreter of a checkout: its virtual environment, the portable build's, or else the running one."""
    candidates = (
        root / ".venv/bin/python",
        root / "venv/bin/python",
        root / ".venv/Scripts/python.exe",
        root / "venv/Scripts/python.exe",
        root.parent / "python_embeded/python.exe",
    )
    return str(next((python for python in candidates if python.exists()), sys.executable))


def _link_folder(target: Path, link: Path) -> None:
    if sys.platform == "win32":
        import _winapi  # noqa: PLC0415  (a junction, unlike a symbolic link, needs no special rights)

        _winapi.CreateJunction(str(target), str(link))
    else:
        link.symlink_to(target, target_is_directory=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
