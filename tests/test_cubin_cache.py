"""Compiled kernels on disk: damage and other processes do no harm."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

import sage_kernels
from sage_kernels.cubin_cache import CubinCache, cache_folder

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


@pytest.fixture
def busy_file(monkeypatch):
    """As on Windows, where a file that somebody reads can be neither replaced nor, while it is scanned, deleted."""

    def refuse(*paths):
        raise PermissionError(13, "The process cannot access the file because it is being used by another process")

    monkeypatch.setattr("os.replace", refuse)
    return lambda: monkeypatch.setattr("os.unlink", refuse)


def test_an_entry_that_another_process_wrote_and_reads_is_as_good(cache, busy_file, caplog):
    cache.folder.mkdir(parents=True)
    (cache.folder / f"{KEY}.cubin").write_bytes(hashlib.sha256(b"cubin").digest() + b"cubin")
    cache.write(KEY, b"cubin")
    assert caplog.text == ""
    assert cache.read(KEY) == b"cubin"
    assert len(list(cache.folder.iterdir())) == 1


def test_a_file_that_can_be_neither_replaced_nor_deleted_is_said_and_no_error(cache, busy_file, caplog):
    busy_file()
    cache.write(KEY, b"cubin")
    assert "can't be kept for the next start: [Errno 13] The process cannot access" in caplog.text
    assert cache.read(KEY) is None


def test_an_interruption_is_not_hidden_by_a_busy_file(cache, busy_file, monkeypatch):
    busy_file()

    def interrupt(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.write(KEY, b"cubin")


def test_users_without_a_home_folder_compile_each_time(monkeypatch, caplog):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert cache_folder() is None
    cache = CubinCache(cache_folder())
    cache.write(KEY, b"cubin")
    assert "there is no home folder" in caplog.text
    assert cache.read(KEY) is None


@pytest.mark.parametrize(
    ("platform", "folder"),
    [
        ("win32", "AppData/Local/sage_kernels/cache"),
        ("darwin", "Library/Caches/sage_kernels"),
        ("linux", ".cache/sage_kernels"),
    ],
)
def test_each_platform_has_its_folder_with_short_enough_paths(monkeypatch, platform, folder):
    monkeypatch.setattr("sys.platform", platform)
    assert cache_folder() == Path.home() / folder
    # Windows allows 260 characters in all; names of users may have 20.
    longest = len("C:/Users/") + 20 + 1 + len(folder) + 1 + max(len(f"{KEY}.cubin"), len("tmpabcdefgh.partial"))
    assert longest < 260


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
