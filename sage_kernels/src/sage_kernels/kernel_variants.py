"""Every compiled form of the CUDA kernels. A kernel family adds one function to _FAMILIES."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from sage_kernels.int8_sm90_forms import FORMS, Int8Sm90Form

_COMPILE_OPTIONS = (
    "--std=c++17",
    "--device-as-default-execution-space",
    "--fmad=true",
    "--prec-div=true",
    "--prec-sqrt=true",
    "--ftz=false",
)
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
        form: what else distinguishes its name.
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
    form: str = ""

    @property
    def name(self) -> str:
        """Unique among VARIANTS, such as "nvfp4_attention_d128_causal"."""
        return "_".join([self.entry, *self._distinctions()])

    def cubin_name(self, arch: str) -> str:
        """File name of its cubin for `arch`; kernels of one source and the same defines share one."""
        return "_".join([self.source.partition(".")[0], *self._distinctions(), arch]) + ".cubin"

    def _distinctions(self) -> list[str]:
        parts = [f"d{self.head_dim}"]
        parts += ["causal"] if self.causal else []
        parts += [f"mask_{self.mask}"] if self.mask != "none" else []
        parts += [self.dtype] if self.dtype != "any" else []
        parts += [self.form] if self.form else []
        return parts

    def compile_options(self, arch: str, emulate: bool = False) -> tuple[str, ...]:
        """Options of NVRTC: IEEE arithmetic, because every fast approximation is written out in the sources."""
        defines = tuple(f"-D{name}={value}" for name, value in self.defines)
        return (*_COMPILE_OPTIONS, f"-arch={arch}", *defines, *((EMULATION_OPTION,) if emulate else ()))


_BLACKWELL = ("sm_120a", "sm_121a")
NVFP4_HEAD_DIMS = (64, 96, 128)
MXFP8_HEAD_DIMS = (64, 128)
_NVFP4_SHARED_BYTES = {64: 9 * 11040, 96: 5 * 16928, 128: 5 * 17952}  # stages times their size, in nvfp4_attention.cu
_MXFP8_STAGE_BYTES = {64: 7 * 13088, 128: 3 * 21792}
_MXFP8_PARKED_BYTES = {64: (0, 0), 128: (2 << 13, 3 << 13)}  # steps of Q that wait in shared memory; with a mask


@lru_cache
def nvfp4_attention_variant(head_dim: int, has_mask: bool, mxfp8: bool = False) -> KernelVariant:
    """FP4 attention; causality is a parameter of the kernel, a mask tensor another compilation, so is MXFP8 for QK."""
    shared_bytes = (
        _MXFP8_STAGE_BYTES[head_dim] + _MXFP8_PARKED_BYTES[head_dim][has_mask]
        if mxfp8
        else _NVFP4_SHARED_BYTES[head_dim]
    )
    return KernelVariant(
        family="mxfp8_nvfp4_attention" if mxfp8 else "nvfp4_attention",
        source="nvfp4_attention.cu",
        entry="nvfp4_attention",
        defines=(("HEAD_DIM", head_dim), ("MASK", int(has_mask)), *_qk_defines(mxfp8)),
        head_dim=head_dim,
        causal=False,
        mask="tensor" if has_mask else "none",
        dtype="any",
        threads=384,
        shared_bytes=shared_bytes,
        archs=_BLACKWELL,
        form="mxfp8" if mxfp8 else "",
    )


@lru_cache
def nvfp4_prepare_variant(entry: str, head_dim: int, mxfp8: bool = False) -> KernelVariant:
    """Smoothing and quantising for it: `entry` is nvfp4_prepare_queries or nvfp4_prepare_keys_values."""
    return KernelVariant(
        family="mxfp8_nvfp4_prepare" if mxfp8 else "nvfp4_prepare",
        source="nvfp4_prepare.cu",
        entry=entry,
        defines=(("HEAD_DIM", head_dim), *_qk_defines(mxfp8)),
        head_dim=head_dim,
        causal=False,
        mask="none",
        dtype="any",
        threads=256,
        shared_bytes=0,
        archs=_BLACKWELL,
        form="mxfp8" if mxfp8 else "",
    )


def _qk_defines(mxfp8: bool) -> tuple[tuple[str, int], ...]:
    return (("QK_FP8", 1),) if mxfp8 else ()


def _nvfp4_forms() -> tuple[tuple[int, bool], ...]:
    """Head dims, and whether Q and K are in MXFP8."""
    return *((dim, False) for dim in NVFP4_HEAD_DIMS), *((dim, True) for dim in MXFP8_HEAD_DIMS)


def _nvfp4_attention() -> tuple[KernelVariant, ...]:
    return tuple(nvfp4_attention_variant(dim, mask, mxfp8) for dim, mxfp8 in _nvfp4_forms() for mask in (False, True))


def _nvfp4_prepare() -> tuple[KernelVariant, ...]:
    entries = ("nvfp4_prepare_queries", "nvfp4_prepare_keys_values")
    return tuple(nvfp4_prepare_variant(entry, dim, mxfp8) for dim, mxfp8 in _nvfp4_forms() for entry in entries)


def int8_sm90_attention_variant(form: Int8Sm90Form) -> KernelVariant:
    """INT8 attention on wgmma; causality and the output's dtype are parameters of the kernel."""
    return KernelVariant(
        family="int8_sm90_attention",
        source="int8_sm90_attention.cu",
        entry="int8_sm90_attention",
        defines=(
            ("HEAD_DIM", form.head_dim),
            ("KEYS", form.keys),
            ("WARPGROUPS", form.warpgroups),
            ("STAGES", form.stages),
            ("PINGPONG", int(form.pingpong)),
            ("PROMOTE", form.promote),
            ("HEADROOM", form.headroom),
            ("ONES", int(form.ones)),
            ("LINE", form.line),
            ("SPLIT", form.split),
            ("PARK", int(form.park)),
            ("SHARE", int(form.share)),
        ),
        head_dim=form.head_dim,
        causal=False,
        mask="none",
        dtype="any",
        threads=128 * (form.warpgroups + 1),
        shared_bytes=form.shared_bytes,
        archs=("sm_90a",),
        form=form.name,
    )


def int8_sm90_prepare_variant(head_dim: int, keys: int, is_bfloat16: bool) -> KernelVariant:
    """Smoothing and quantising for it."""
    return KernelVariant(
        family="int8_sm90_prepare",
        source="int8_sm90_prepare.cu",
        entry="int8_sm90_prepare",
        defines=(("HEAD_DIM", head_dim), ("KEYS", keys), ("BFLOAT16", int(is_bfloat16))),
        head_dim=head_dim,
        causal=False,
        mask="none",
        dtype="bfloat16" if is_bfloat16 else "float16",
        threads=256,
        shared_bytes=0,
        archs=("sm_90a",),
    )


def _int8_sm90() -> tuple[KernelVariant, ...]:
    images = sorted({(form.head_dim, form.keys) for form in FORMS})
    preparations = (
        int8_sm90_prepare_variant(head_dim, keys, is_bfloat16)
        for head_dim, keys in images
        for is_bfloat16 in (False, True)
    )
    return (*(int8_sm90_attention_variant(form) for form in FORMS), *preparations)


KV_CACHE_HEAD_DIMS = (64, 128)
KV_CACHE_ROWS = (8, 16)


@lru_cache
def kv_cache_variant(head_dim: int, rows: int) -> KernelVariant:
    """Decoding from the FP4 cache; `rows` of queries share a block."""
    return KernelVariant(
        family="kv_cache",
        source="kv_cache_decode.cu",
        entry="kv_cache_decode",
        defines=(("HEAD_DIM", head_dim), ("ROW_TILES", rows // 8)),
        head_dim=head_dim,
        causal=False,
        mask="none",
        dtype="any",
        threads=128,
        shared_bytes=0,
        archs=("sm_90a", *_BLACKWELL),
        form=f"rows{rows}",
    )


def _kv_cache() -> tuple[KernelVariant, ...]:
    return tuple(kv_cache_variant(head_dim, rows) for head_dim in KV_CACHE_HEAD_DIMS for rows in KV_CACHE_ROWS)


TRAINING_SM90_HEAD_DIMS = (64, 128)
TRAINING_SM90_PREPARATIONS = ("training_sm90_quantize", "training_sm90_rows")
TRAINING_SM90_ENTRIES = (
    "training_sm90_forward",
    "training_sm90_gradients",
    "training_sm90_query",
    *TRAINING_SM90_PREPARATIONS,
)
TRAINING_SM90_KEYS = {64: 192, 128: 128}  # of a thread block of dK and dV, 64 for each warpgroup


@lru_cache
def training_sm90_variant(entry: str, head_dim: int, is_bfloat16: bool) -> KernelVariant:
    """Trainable attention on wgmma: the forward pass, gradients, or what prepares or finishes them, as `entry` says."""
    # Warpgroups that multiply, stages of their ring, shared memory; the last is barriers.
    warpgroups, stages, shared_bytes = 0, 0, 0
    if entry == "training_sm90_forward":  # Q; K and V transposed
        warpgroups, stages = 2, {64: 8, 128: 5}[head_dim]
        shared_bytes = 128 * head_dim + stages * 2 * 128 * head_dim + 8 * (2 * stages + 1)
    elif entry == "training_sm90_gradients":  # K's codes, V, K, dS thrice; Q's codes, Q, dO, rows
        warpgroups, stages = TRAINING_SM90_KEYS[head_dim] // 64, {64: 4, 128: 2}[head_dim]
        shared_bytes = 64 * (5 * head_dim + 3 * 128) * warpgroups
        shared_bytes += stages * (5 * 64 * head_dim + 4 * 324) + 8 * (2 * stages + 7)
    elif entry == "training_sm90_quantize":  # a transposed tile; means of channels; maxima of warps
        shared_bytes = 132 * head_dim + 4 * head_dim + 2 * 32
    elif entry == "training_sm90_rows":  # delta and norms by sets of channels; maxima of warps
        shared_bytes = 2 * head_dim // 32 * 512 + 2 * 32
    ring = (("STAGES", stages), ("WARPGROUPS", warpgroups)) if stages else ()
    threads = 256 if entry in TRAINING_SM90_PREPARATIONS else 128 * (warpgroups + 1)
    return KernelVariant(
        family=entry,
        source=f"{entry}.cu",
        entry=entry,
        defines=(("HEAD_DIM", head_dim), ("BFLOAT16", int(is_bfloat16)), *ring),
        head_dim=head_dim,
        causal=False,
        mask="none",
        dtype="bfloat16" if is_bfloat16 else "float16",
        threads=threads,
        shared_bytes=shared_bytes,
        archs=("sm_90a",),
    )


def _training_sm90() -> tuple[KernelVariant, ...]:
    return tuple(
        training_sm90_variant(entry, head_dim, is_bfloat16)
        for entry in TRAINING_SM90_ENTRIES
        for head_dim in TRAINING_SM90_HEAD_DIMS
        for is_bfloat16 in (False, True)
    )


_FAMILIES: tuple[Callable[[], tuple[KernelVariant, ...]], ...] = (
    _nvfp4_attention,
    _nvfp4_prepare,
    _int8_sm90,
    _kv_cache,
    _training_sm90,
)

VARIANTS: tuple[KernelVariant, ...] = tuple(variant for family in _FAMILIES for variant in family())
