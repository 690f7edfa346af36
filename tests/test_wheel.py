"""The wheel: the same bytes from every build, what is in wheels/, and installable where there is no GPU."""

import hashlib
import os
import platform
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import sage_kernels

pytest.importorskip("tomllib", reason="building needs Python 3.11")

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ROOT / "wheels"


@pytest.fixture(scope="module")
def wheel(tool, built_cubins, tmp_path_factory):
    return tool("wheel_file").write_wheel(tmp_path_factory.mktemp("wheel"), built_cubins[1])


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def checksums():
    return {name: digest for digest, name in map(str.split, (WHEELS / "SHA256SUMS").read_text().splitlines())}


def test_the_published_wheels_have_their_checksums():
    assert {path.name: sha256(path) for path in WHEELS.glob("*.whl")} == checksums()


@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="the published cubins are made on Linux x86_64"
)
def test_a_rebuild_gives_the_published_wheel_byte_for_byte(wheel):
    assert sha256(wheel) == checksums()[wheel.name], "run `python sage_kernels/tools/build_cubins.py`"


def test_the_bytes_depend_neither_on_time_nor_on_order(tool, tmp_path):
    write_wheel = tool("wheel_file").write_wheel
    files = {"b.cubin": b"b", "a.cubin": b"a"}
    first = write_wheel(tmp_path / "first", files)
    second = write_wheel(tmp_path / "second", dict(reversed(files.items())))
    assert sha256(first) == sha256(second)
    members = zipfile.ZipFile(first).infolist()
    assert {(member.date_time, member.external_attr, member.compress_type) for member in members} == {
        ((2020, 1, 1, 0, 0, 0), 0o100644 << 16, zipfile.ZIP_STORED)
    }


def test_the_wheel_has_package_sources_cubins_and_licence_and_nothing_else(wheel, built_cubins):
    package = ROOT / "sage_kernels" / "src"
    expected = {
        path.relative_to(package).as_posix() for pattern in ("*.py", "*.json") for path in package.rglob(pattern)
    }
    expected |= {"sage_kernels/py.typed"} | {f"sage_kernels/cubins/{name}" for name in built_cubins[1]}
    expected |= {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "sage_kernels" / "csrc").glob("*") if path.is_file()
    }
    info = f"sage_kernels-{sage_kernels.__version__}.dist-info"
    expected |= {f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")}
    assert set(zipfile.ZipFile(wheel).namelist()) == expected


def test_the_project_has_the_packages_version(tool):
    assert wheel_version(tool) == sage_kernels.__version__


def wheel_version(tool):
    module = tool("wheel_file")
    return module.tomllib.loads((module.PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def without_python_path():
    """The environment of a process that sees no package but what is installed; pip looks for it there too."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Folder of the programs of a clean environment that has the wheel, and sees torch."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    python = programs / ("python.exe" if os.name == "nt" else "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    command = [*pip, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(command, check=True, timeout=300, env=without_python_path())
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site_packages = subprocess.run([python, "-c", query], capture_output=True, text=True, check=True).stdout.strip()
    (Path(site_packages) / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    return programs


def test_the_installed_doctor_works_without_a_gpu(installed, tmp_path):
    done = subprocess.run(
        [installed / "sage-kernels", "doctor"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=tmp_path,
        env=without_python_path(),
    )
    assert done.returncode == 0, done.stderr
    assert f"sage_kernels {sage_kernels.__version__} from {installed.parent}" in done.stdout
    if not torch.cuda.is_available():
        assert "No CUDA GPU" in done.stdout


def test_the_installed_package_has_the_tables_that_it_reads(installed):
    python = installed / ("python.exe" if os.name == "nt" else "python")
    program = "from sage_kernels import router; print(len(router._load(router.TABLE)))"
    done = subprocess.run(
        [python, "-c", program], capture_output=True, text=True, check=False, env=without_python_path()
    )
    assert done.returncode == 0, done.stderr


def test_pip_finds_the_wheel_whole(installed):
    """`pip check` reads the metadata, RECORD is compared with the files."""
    python = installed / ("python.exe" if os.name == "nt" else "python")
    program = (
        "import base64, hashlib, importlib.metadata as m\n"
        "d = m.distribution('sage-kernels')\n"
        "assert any(r.startswith('torch') for r in d.requires), d.requires\n"
        "hashed = [f for f in d.files if f.hash]\n"
        "for f in hashed:\n"
        "    digest = base64.urlsafe_b64encode(hashlib.sha256(f.read_binary()).digest()).rstrip(b'=').decode()\n"
        "    assert digest == f.hash.value, f\n"
        "print(len(hashed))\n"
    )
    done = subprocess.run(
        [python, "-c", program], capture_output=True, text=True, check=True, env=without_python_path()
    )
    assert int(done.stdout) > 20
