"""What pyproject.toml can't say: the CUDA sources lie outside src/ and are installed as sage_kernels/csrc."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SOURCES = Path(__file__).parent / "csrc"


class BuildWithSources(build_py):
    """Adds csrc/ to what is installed; an editable install finds it in the checkout."""

    def run(self) -> None:
        """Copy after the Python files."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "sage_kernels" / "csrc"
            target.mkdir(parents=True, exist_ok=True)
            for file in sorted([*SOURCES.glob("*.cu"), *SOURCES.glob("*.cuh")]):
                self.copy_file(str(file), str(target / file.name))


setup(cmdclass={"build_py": BuildWithSources})
