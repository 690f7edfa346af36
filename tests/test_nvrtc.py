"""NVRTC: found where torch ships it, compiles without a GPU, and says what is wrong."""

from pathlib import Path

import pytest

from sage_kernels import nvrtc
from sage_kernels.driver import KernelLoadError
from sage_kernels.nvrtc import Nvrtc, find_libraries


def test_source_and_headers_become_a_cubin(nvrtc_12_8):
    source = '#include "other.cuh"\nextern "C" __global__ void kernel(int *p) { *p = NUMBER; }'
    options = ["-arch=sm_120a"]
    cubin = nvrtc_12_8.compile("a.cu", source, {"other.cuh": "#define NUMBER 7"}, options)
    assert cubin.startswith(b"\x7fELF")
    assert cubin == nvrtc_12_8.compile("a.cu", source, {"other.cuh": "#define NUMBER 7"}, options)
    assert cubin != nvrtc_12_8.compile("a.cu", source, {"other.cuh": "#define NUMBER 8"}, options)


def test_an_error_in_the_source_is_shown_with_file_and_line(nvrtc_12_8):
    with pytest.raises(KernelLoadError, match=r"(?s)a\.cu does not compile with NVRTC 12\.8.*a\.cu\(2\).*oops"):
        nvrtc_12_8.compile("a.cu", "\noops", {}, ["-arch=sm_90a"])


def test_the_compiler_knows_what_it_can_compile_for(nvrtc_12_8):
    assert nvrtc_12_8.version == (12, 8)
    assert [arch for arch in ("sm_90a", "sm_120a", "sm_121a") if nvrtc_12_8.supports(arch)] == ["sm_90a", "sm_120a"]


@pytest.mark.parametrize(
    ("folder", "file"),
    [
        ("torch/lib", "nvrtc64_120_0.dll"),
        ("nvidia/cuda_nvrtc/lib", "libnvrtc.so.12"),
        ("nvidia/cuda_nvrtc/bin", "nvrtc64_120_0.dll"),
        ("nvidia/cu13/lib", "libnvrtc.so.13"),
        ("nvidia/cu13/bin/x86_64", "nvrtc64_130_0.dll"),
    ],
)
@pytest.mark.parametrize("home", ["plain", "ComfyUI [portable] *ü"])
def test_the_compiler_is_found_where_torch_puts_it(tmp_path, monkeypatch, home, folder, file):
    tmp_path = tmp_path / home
    (tmp_path / folder).mkdir(parents=True)
    for name in (file, "libnvrtc.alt.so.12", "nvrtc64_120_0.alt.dll", "libnvrtc-builtins.so.12.8"):
        (tmp_path / folder / name).touch()
    monkeypatch.setattr(nvrtc.torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    assert find_libraries(nvrtc.search_folders())[0] == tmp_path / folder / file


@pytest.fixture
def windows(tmp_path, monkeypatch):
    """Libraries that Windows would load, in order."""
    loaded = []

    class Library:
        def __getattr__(self, name):
            function = lambda *arguments: 0  # noqa: E731
            setattr(self, name, function)
            return function

    def load(path):
        loaded.append(Path(path).name)
        if "broken" in Path(path).read_text():
            raise OSError("[WinError 126] The specified module could not be found")
        return Library()

    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", load)
    for name in ("nvrtc64_120_0.dll", "nvrtc64_120_0.alt.dll", "nvrtc-builtins64_128.dll", "cudart64_12.dll"):
        (tmp_path / name).write_text("fine")
    return loaded


def test_on_windows_the_compilers_other_half_is_loaded_first(windows, tmp_path):
    (path,) = find_libraries([tmp_path.as_posix()])
    Nvrtc(path)
    assert windows == ["nvrtc-builtins64_128.dll", "nvrtc64_120_0.dll"]


def test_on_windows_a_dll_that_does_not_load_is_named(windows, tmp_path, monkeypatch):
    (tmp_path / "nvrtc-builtins64_128.dll").write_text("broken")
    monkeypatch.setattr(nvrtc, "search_folders", lambda: [tmp_path.as_posix()])
    with pytest.raises(KernelLoadError, match=r"nvrtc64_120_0\.dll can't be used: \[WinError 126\]"):
        nvrtc.find_nvrtc.__wrapped__("sm_120a")


def test_on_windows_the_toolkit_is_searched_too(windows):
    assert any(folder.startswith("C:/Program Files/NVIDIA GPU") for folder in nvrtc.search_folders())
    assert not any(folder.startswith("/usr") for folder in nvrtc.search_folders())


def test_nothing_found_names_what_was_searched_and_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(nvrtc, "search_folders", lambda: [f"{tmp_path.as_posix()}/nothing"])
    with pytest.raises(KernelLoadError, match=rf"searched {tmp_path.as_posix()}/nothing.*wheel.*CUDA 12\.8"):
        nvrtc.find_nvrtc.__wrapped__("sm_120a")


def test_a_compiler_that_is_too_old_or_broken_is_named(tmp_path, monkeypatch, nvrtc_12_8):
    (tmp_path / "libnvrtc.so.11").write_text("no library")
    folders = [tmp_path.as_posix(), nvrtc_12_8.path.parent.as_posix()]
    monkeypatch.setattr(nvrtc, "search_folders", lambda: folders)
    with pytest.raises(KernelLoadError, match=r"libnvrtc\.so\.11 can't be used.*is NVRTC 12\.8, which doesn't know"):
        nvrtc.find_nvrtc.__wrapped__("sm_121a")
    assert isinstance(nvrtc.find_nvrtc.__wrapped__("sm_120a"), Nvrtc)
