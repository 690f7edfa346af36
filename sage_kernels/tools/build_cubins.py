"""Compile every kernel variant with the pinned compilers, then write the wheel and its SHA256SUMS.

    python sage_kernels/tools/build_cubins.py
    python sage_kernels/tools/build_cubins.py --emulated FOLDER    # for pytest tests/gpu --emulated-cubins=FOLDER

Needs Linux x86_64, Python 3.11, torch (any build) and tqdm; no GPU, no CUDA toolkit. The compilers (NVRTC, from PyPI,
pinned by hash) are downloaded once. Two runs give the same bytes.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import cubin_elf
import pinned_compilers
import wheel_file
from sage_kernels.cubin_cache import CubinCache
from sage_kernels.kernel_sources import build_key, collect_sources, source_folder, source_hashes
from sage_kernels.kernel_variants import VARIANTS, KernelVariant
from sage_kernels.nvrtc import Nvrtc, find_libraries

PROJECT = Path(__file__).resolve().parents[1]
CUBINS = PROJECT / "src" / "sage_kernels" / "cubins"  # git-ignored: the wheel is what is kept
WHEELS = PROJECT.parent / "wheels"
CACHE = PROJECT / "build" / "cubins"
PROCESSES = 2
EMULATED_ARCH, EMULATION_ARCH = "sm_120a", "sm_90a"  # whose instructions, and on what


@dataclass(frozen=True)
class Job:
    """One variant for one target."""

    variant: KernelVariant
    arch: str
    sources: Path
    libraries: Path
    emulate: bool = False

    @property
    def file(self) -> str:
        """Name of the cubin."""
        return self.variant.cubin_name(self.arch)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build into the package and into wheels/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, default=WHEELS, help="where the wheel goes (default: wheels/)")
    parser.add_argument("--from-scratch", action="store_true", help="compile again what was compiled before")
    parser.add_argument("--emulated", type=Path, metavar="FOLDER", help="instead: builds that a Hopper GPU can run")
    options = parser.parse_args(arguments)
    if options.from_scratch:
        shutil.rmtree(CACHE, ignore_errors=True)
    if options.emulated is not None:
        print(f"{emulate(VARIANTS, source_folder(), options.emulated)} emulated cubins in {options.emulated}")
        return 0
    files = build(VARIANTS, source_folder(), CubinCache(CACHE))
    replace_folder(CUBINS, files)
    wheel = wheel_file.write_wheel(options.wheels, files)
    write_checksums(options.wheels)
    print(f"{len(files) - 1} cubins; {wheel.name}: {wheel.stat().st_size / 2**20:.2f} MiB, SHA-256 {sha256(wheel)}")
    return 0


def build(variants: Sequence[KernelVariant], sources: Path, cache: CubinCache) -> dict[str, bytes]:
    """Compile all variants for all their targets, in processes: NVRTC compiles one thing at a time in each.

    Returns:
        Content of every file of cubins/ by name, manifest.json included.

    Raises:
        SystemExit: two variants that differ want one name.
        KernelLoadError: a source does not compile.
    """
    jobs = [
        Job(variant, arch, sources, pinned_compilers.install(pinned_compilers.compiler_for(arch)))
        for variant in variants
        for arch in variant.archs
    ]
    keys = _keys_by_file(jobs)
    files = {name: cubin for name, key in keys.items() if (cubin := cache.read(key)) is not None}
    todo = {job.file: job for job in jobs if job.file not in files}
    for name, cubin in _compile_all(todo):
        files[name] = cubin
        cache.write(keys[name], cubin)
    files["manifest.json"] = (json.dumps(_manifest(jobs, files), indent=1) + "\n").encode()
    return files


def emulate(variants: Sequence[KernelVariant], sources: Path, folder: Path) -> int:
    """Compile what emulates, for EMULATION_ARCH, by the compiler of most of the shipped cubins.

    Args:
        variants: those for a target that the oldest compiler knows are taken.
        sources: folder of the CUDA sources.
        folder: a CubinCache, as if NVRTC of that version had been found on the machine.

    Returns:
        How many it holds.
    """
    compiler = pinned_compilers.NVRTC_12_8
    libraries = pinned_compilers.install(compiler)
    jobs = {}
    for variant in variants:
        if EMULATED_ARCH in variant.archs:
            texts = collect_sources(sources, variant.source)
            key = build_key(texts, variant.compile_options(EMULATION_ARCH, emulate=True), str(compiler.release))
            jobs[key] = Job(variant, EMULATION_ARCH, sources, libraries, emulate=True)
    cache = CubinCache(folder)
    todo = {key: job for key, job in jobs.items() if cache.read(key) is None}
    for key, cubin in _compile_all(todo):
        cache.write(key, cubin)
    return len(jobs)


def _compile_all(jobs: Mapping[str, Job]) -> Iterator[tuple[str, bytes]]:
    # spawn: forking a process that has threads, as torch does, can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        running = {pool.submit(compile_job, job): name for name, job in jobs.items()}
        for done in tqdm(as_completed(running), total=len(running), desc="cubins", disable=not running):
            yield running[done], done.result()


def _keys_by_file(jobs: Sequence[Job]) -> dict[str, str]:
    """Cache key of each cubin by its file name."""
    keys: dict[str, str] = {}
    names: set[tuple[str, str]] = set()
    for job in jobs:
        texts = collect_sources(job.sources, job.variant.source)
        compiler = pinned_compilers.compiler_for(job.arch).version
        key = build_key(texts, job.variant.compile_options(job.arch), compiler)
        if keys.setdefault(job.file, key) != key or (job.variant.name, job.arch) in names:
            raise SystemExit(f"two variants are called the same: {job.variant.name}, {job.file}")
        names.add((job.variant.name, job.arch))
    return keys


def compile_job(job: Job) -> bytes:
    """Compile one variant; runs in a process of its own."""
    (library,) = find_libraries([job.libraries.as_posix()])
    texts = collect_sources(job.sources, job.variant.source)
    source = texts.pop(job.variant.source)
    options = job.variant.compile_options(job.arch, job.emulate)
    return Nvrtc(library).compile(job.variant.source, source, texts, options)


def _manifest(jobs: Sequence[Job], cubins: dict[str, bytes]) -> dict[str, object]:
    sources: dict[str, str] = {}
    for job in jobs:
        sources |= source_hashes(collect_sources(job.sources, job.variant.source))
    compilers = sorted({pinned_compilers.compiler_for(job.arch).version for job in jobs})
    return {
        "compiler": "NVRTC " + ", ".join(compilers),
        "sources": dict(sorted(sources.items())),
        "kernels": [_manifest_entry(job, cubins) for job in jobs],
    }


def _manifest_entry(job: Job, cubins: dict[str, bytes]) -> dict[str, object]:
    variant, name = job.variant, job.file
    resources = cubin_elf.read_resources(cubins[name], variant.entry)
    return {
        "file": name,
        "entry": variant.entry,
        "family": variant.family,
        "arch": job.arch,
        "head_dim": variant.head_dim,
        "causal": variant.causal,
        "mask": variant.mask,
        "dtype": variant.dtype,
        "registers": resources.registers,
        "shared_bytes": resources.static_shared_bytes + variant.shared_bytes,
        "sha256": hashlib.sha256(cubins[name]).hexdigest(),
        "compiler": pinned_compilers.compiler_for(job.arch).version,
    }


def replace_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Make `folder` hold exactly `files`; written beside it first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as partial:
        made = Path(partial) / "made"
        made.mkdir()
        for name, content in files.items():
            (made / name).write_bytes(content)
        if folder.exists():
            os.replace(folder, Path(partial) / "old")
        os.replace(made, folder)


def write_checksums(folder: Path) -> None:
    """SHA256SUMS of the wheels in `folder`, as sha256sum writes it."""
    lines = [f"{sha256(wheel)}  {wheel.name}\n" for wheel in sorted(folder.glob("*.whl"))]
    partial = folder / ".SHA256SUMS.partial"
    partial.write_text("".join(lines), encoding="utf-8", newline="\n")
    os.replace(partial, folder / "SHA256SUMS")


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())
