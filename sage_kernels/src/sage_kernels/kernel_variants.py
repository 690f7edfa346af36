"""Every compiled form of the CUDA kernels. A kernel family adds one function to _FAMILIES."""

from collections.abc import Callable
from dataclasses import dataclass

_COMPILE_OPTIONS = ("--std=c++17", "--fmad=true", "--prec-div=true", "--prec-sqrt=true", "--ftz=false")
EMULATION_OPTION = "-DSAGE_EMULATE_FP4=1"


@dataclass(frozen=True)
class KernelVariant:
    """One compilation of a source.

    Attributes:
        family: of which kernel, such as "nvfp4_attention".
        source: file name in csrc/.
        entry: name of the extern "C" kernel.
        defines: preprocessor names and their values.
        head_dim: what it is compiled for.
        causal: whether it masks causally.
        mask: "none" or "tensor".
        dtype: of the inputs, "any" where the kernel takes both 16-bit types.
        threads: block size.
        shared_bytes: dynamic shared memory where the kernel fixes it, else 0.
        archs: compilation targets, such as "sm_120a".
    """

    family: str
    source: str
    entry: str
    defines: tuple[tuple[str, int], ...]
    head_dim: int
    causal: bool
    mask: str
    dtype: str
    threads: int
    shared_bytes: int
    archs: tuple[str, ...]

    @property
    def name(self) -> str:
        """Unique among VARIANTS, such as "nvfp4_attention_d128_causal"."""
        parts = [self.entry, f"d{self.head_dim}"]
        parts += ["causal"] if self.causal else []
        parts += [f"mask_{self.mask}"] if self.mask != "none" else []
        parts += [self.dtype] if self.dtype != "any" else []
        return "_".join(parts)

    def cubin_name(self, arch: str) -> str:
        """File name of its cubin for `arch`."""
        return f"{self.name}_{arch}.cubin"

    def compile_options(self, arch: str, emulate: bool = False) -> tuple[str, ...]:
        """Options of NVRTC: IEEE arithmetic, because every fast approximation is written out in the sources."""
        defines = tuple(f"-D{name}={value}" for name, value in self.defines)
        return (*_COMPILE_OPTIONS, f"-arch={arch}", *defines, *((EMULATION_OPTION,) if emulate else ()))


_FAMILIES: tuple[Callable[[], tuple[KernelVariant, ...]], ...] = ()

VARIANTS: tuple[KernelVariant, ...] = tuple(variant for family in _FAMILIES for variant in family())
