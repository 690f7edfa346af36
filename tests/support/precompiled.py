"""Stands for an NVRTC that is not on this machine, but whose cubins are."""

from sage_kernels.driver import KernelLoadError


class Precompiled:
    """Has a version, by which a CubinCache finds what was compiled beforehand; compiles nothing.

    Args:
        version: of the NVRTC, such as (12, 8).
    """

    def __init__(self, version: tuple[int, int]) -> None:
        self.version = version
        self.name = f"NVRTC {version[0]}.{version[1]}, compiled beforehand"

    def compile(self, name: str, source: str, headers: dict[str, str], options: tuple[str, ...]) -> bytes:
        """Refuse.

        Raises:
            KernelLoadError: always.
        """
        raise KernelLoadError(
            f"{name} with {' '.join(options)} was not compiled beforehand from these sources: "
            "run tools/build_cubins.py, and tools/build_cubins.py --emulated"
        )
