"""Compiled kernels on disk: damage and other processes do no harm."""

import subprocess
import sys
from pathlib import Path

import pytest

import sage_kernels
from sage_kernels.cubin_cache import CubinCache

KEY = "0" * 64


@pytest.fixture
def cache(tmp_path):
    return CubinCache(tmp_path / "made" / "when needed")


def test_what_is_written_is_read(cache):
    assert cache.read(KEY) is None
    cache.write(KEY, b"cubin")
    assert cache.read(KEY) == b"cubin"
    assert [file.name for file in cache.folder.iterdir()] == [f"{KEY}.cubin"]


@pytest.mark.parametrize("damage", [lambda c: c[:-1], lambda c: c[:20], lambda c: b"", lambda c: c[:-1] + b"?"])
def test_a_damaged_entry_counts_as_missing_and_is_replaced(cache, damage, caplog):
    cache.write(KEY, b"cubin")
    file = cache.folder / f"{KEY}.cubin"
    file.write_bytes(damage(file.read_bytes()))
    assert cache.read(KEY) is None
    assert "damaged" in caplog.text
    cache.write(KEY, b"cubin")
    assert cache.read(KEY) == b"cubin"


def test_a_folder_that_cannot_be_written_is_said_and_no_error(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    CubinCache(tmp_path / "file").write(KEY, b"cubin")
    assert "can't be kept" in caplog.text


def test_processes_that_write_the_same_entry_never_see_half_of_it(cache):
    program = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from sage_kernels.cubin_cache import CubinCache
cache, cubin = CubinCache(Path(sys.argv[1])), bytes(range(256)) * 4096
for _ in range(100):
    cache.write("0" * 64, cubin)
    assert cache.read("0" * 64) == cubin
"""
    command = [sys.executable, "-c", program, str(cache.folder), str(Path(sage_kernels.__file__).parents[1])]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    assert [file.name for file in cache.folder.iterdir()] == [f"{KEY}.cubin"]
