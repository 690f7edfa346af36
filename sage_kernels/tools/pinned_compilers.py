"""The compilers of the shipped cubins: pinned NVRTC packages, each in a folder of its own.

For each target the oldest compiler that knows it, so that the cubins load on the oldest driver that knows the GPU; for
sm_90a, whose oldest drivers load all of CUDA 12, the one that keeps several wgmma in flight at head_dim 128.
Two versions of one package can't share an environment, so pip unpacks each into a folder that is kept.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
FOLDER = PROJECT / "build" / "compilers"  # git-ignored


@dataclass(frozen=True)
class PinnedCompiler:
    """One version of NVRTC.

    Attributes:
        version: of the package.
        sha256: of its files for Linux x86_64, Linux aarch64 and Windows.
    """

    version: str
    sha256: tuple[str, ...]

    @property
    def release(self) -> tuple[int, int]:
        """Version of CUDA, such as (12, 8)."""
        major, minor, _ = self.version.split(".")
        return int(major), int(minor)

    @property
    def requirement(self) -> str:
        """A line of a requirements file."""
        hashes = " ".join(f"--hash=sha256:{digest}" for digest in self.sha256)
        return f"nvidia-cuda-nvrtc-cu12=={self.version} {hashes}"


NVRTC_12_8 = PinnedCompiler(
    "12.8.93",
    (
        "a7756528852ef889772a84c6cd89d41dfa74667e24cca16bb31f8f061e3e9994",
        "fc1fec1e1637854b4c0a65fb9a8346b51dd9ee69e61ebaccc82058441f15bce8",
        "7a4b6b2904850fe78e0bd179c4b655c404d4bb799ef03ddc60804247099ae909",
    ),
)
NVRTC_12_9 = PinnedCompiler(
    "12.9.86",
    (
        "210cf05005a447e29214e9ce50851e83fc5f4358df8b453155d5e1918094dcb4",
        "096d4de6bda726415dfaf3198d4f5c522b8e70139c97feef5cd2ca6d4cd9cead",
        "72972ebdcf504d69462d3bcd67e7b81edd25d0fb85a2c46d3ea3517666636349",
    ),
)


def compiler_for(arch: str) -> PinnedCompiler:
    """The compiler of a target: the older one wherever it knows the target, but for sm_90a."""
    return NVRTC_12_9 if arch in ("sm_90a", "sm_103a", "sm_121a") else NVRTC_12_8


def available() -> bool:
    """Whether this platform has them."""
    return sys.platform in ("linux", "win32")


def install(compiler: PinnedCompiler, folder: Path = FOLDER) -> Path:
    """Folder with the compiler's libraries; downloaded (90 MB) where it is not there yet.

    Raises:
        SystemExit: pip can't download it, or the file has another hash.
    """
    target = folder / f"nvrtc-{compiler.version}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            requirements = Path(partial) / "requirements.txt"
            requirements.write_text(compiler.requirement + "\n", encoding="utf-8")
            unpacked = Path(partial) / "unpacked"
            options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
            command = [sys.executable, "-m", "pip", "install", *options, "--target", unpacked, "-r", requirements]
            if subprocess.run(command, check=False).returncode:
                raise SystemExit(f"NVRTC {compiler.version} can't be installed by pip; see above")
            try:
                unpacked.rename(target)
            except OSError:
                if not target.exists():  # else another process was faster
                    raise
    return target / "nvidia" / "cuda_nvrtc" / ("bin" if sys.platform == "win32" else "lib")
