"""Which sage_kernels the pack uses. Each case in a Python of its own, which starts without one."""

import subprocess
import sys
from pathlib import Path

import pytest

MODULE = Path(__file__).resolve().parent.parent / "nodes" / "kernel_package.py"
PROGRAM = f"""
import importlib.util, sys, pathlib
spec = importlib.util.spec_from_file_location("kernel_package", {str(MODULE)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
{{before}}
try:
    package = module.import_sage_kernels(pathlib.Path(sys.argv[1]))
    import sage_kernels.extra
    print(package.__version__, pathlib.Path(sage_kernels.extra.__file__).parent.parent.name)
except module.KernelPackageError as error:
    print("error:", error)
"""


def write_package(folder, version, metadata=True):
    package = folder / "sage_kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f'__version__ = "{version}"')
    (package / "extra.py").write_text("")
    if metadata:
        info = folder / f"sage_kernels-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sage-kernels\nVersion: {version}\n")


@pytest.fixture
def find(tmp_path):
    """Version and place ("src": the pack's own, "site": installed) of what is found; None for absent."""

    def find(*, bundled, installed, metadata=True, before=""):
        (tmp_path / "pack" / "sage_kernels").mkdir(parents=True)  # a folder on the path is no package
        if bundled is not None:
            write_package(tmp_path / "pack" / "sage_kernels" / "src", bundled, metadata=False)
            project = f'[project]\nname = "sage-kernels"\nversion = "{bundled}"\n'
            (tmp_path / "pack" / "sage_kernels" / "pyproject.toml").write_text(project)
        if installed is not None:
            write_package(tmp_path / "site", installed, metadata)
        # -I and -S: no site-packages, where the developer's own sage_kernels is.
        paths = f"sys.path[:0] = [{str(tmp_path / 'pack')!r}, {str(tmp_path / 'site')!r}]\n"
        program = PROGRAM.format(before=paths + before)
        command = [sys.executable, "-I", "-S", "-c", program, str(tmp_path / "pack")]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    return find


@pytest.mark.parametrize(
    ("bundled", "installed", "used"),
    [
        ("0.2.0", None, "0.2.0 src"),
        ("0.2.0", "0.2.0", "0.2.0 site"),
        ("0.2.0", "0.10.0", "0.10.0 site"),
        ("0.10.0", "0.9.1", "0.10.0 src"),
        (None, "0.1.0", "0.1.0 site"),
    ],
)
def test_the_newer_is_used_and_the_installed_one_when_equal(find, bundled, installed, used):
    assert find(bundled=bundled, installed=installed) == used


def test_a_package_of_unknown_age_gives_way_to_the_bundled_one(find):
    assert find(bundled="0.2.0", installed="9.0.0", metadata=False) == "0.2.0 src"


def test_a_folder_of_that_name_that_was_imported_as_a_package_is_forgotten(find):
    assert find(bundled="0.2.0", installed=None, before="import sage_kernels") == "0.2.0 src"


def test_without_any_the_error_says_what_to_do(find):
    message = find(bundled=None, installed=None)
    assert message.startswith("error:")
    assert "pip install" in message
    assert "\n" not in message


def test_an_older_one_that_another_pack_has_loaded_is_an_error(find):
    message = find(bundled="0.2.0", installed="0.1.0", before="import sage_kernels")
    assert message.startswith("error: sage_kernels 0.1.0 is already loaded")
    assert "\n" not in message


def test_a_newer_one_that_another_pack_has_loaded_is_used(find):
    assert find(bundled="0.2.0", installed="0.3.0", before="import sage_kernels") == "0.3.0 site"
