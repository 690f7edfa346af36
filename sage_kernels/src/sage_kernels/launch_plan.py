"""Everything about the launches of a call that its form decides, worked out once; a call then only adds addresses.

Preparing one launch in Python takes longer than the launch itself. A plan holds no tensors, and nothing in it changes
once it is made, so that threads and streams share it.
"""

import ctypes
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sage_kernels.attention_call import AttentionCall
from sage_kernels.call_form import FormCache, form_of_call
from sage_kernels.cubin_loader import LoadedKernel, current_stream
from sage_kernels.driver import ConfiguredLaunch

_ALIGNMENT = 256  # bytes; each buffer of a workspace starts at a multiple
_MAX_STREAMS = 64  # whose launches a plan keeps; torch has 32 of each priority in turn
_ADDRESS_BYTES = 8


class WorkspaceLayout:
    """Named buffers in one allocation.

    Args:
        buffers: shape and dtype by name; None leaves a buffer out.
    """

    def __init__(self, buffers: Mapping[str, tuple[tuple[int, ...], torch.dtype] | None]) -> None:
        self._buffers: dict[str, tuple[int, tuple[int, ...], torch.dtype]] = {}
        end = 0
        for name, form in buffers.items():
            if form is not None:
                shape, dtype = form
                self._buffers[name] = (end, shape, dtype)
                size = math.prod(shape) * dtype.itemsize
                end += -(-size // _ALIGNMENT) * _ALIGNMENT
        self.size = end

    def offsets(self) -> dict[str, int]:
        """Where each buffer starts, in bytes."""
        return {name: start for name, (start, _, _) in self._buffers.items()}

    def view(self, workspace: Tensor, name: str) -> Tensor | None:
        """A buffer as a tensor; None where it was left out."""
        if name not in self._buffers:
            return None
        start, shape, dtype = self._buffers[name]
        return workspace[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


class ParameterTemplate:
    """A kernel's parameter struct that lacks nothing but addresses.

    Args:
        parameters: with everything filled in that is no address; its size is a multiple of 8.
        buffers: fields that point into the workspace, and their offsets in it.
        tensors: fields that point at tensors, in the order in which filled() takes their addresses; None for one that
            the kernel has no field for. A field that is a struct stands for the address it begins with.
    """

    def __init__(self, parameters: ctypes.Structure, buffers: Mapping[str, int], tensors: Sequence[str | None]) -> None:
        self.type = type(parameters)
        self._bytes = bytes(parameters)
        self._array = ctypes.c_uint64 * (len(self._bytes) // _ADDRESS_BYTES)
        self._buffers = [(self._index(name), offset) for name, offset in buffers.items()]
        self._tensors = [None if name is None else self._index(name) for name in tensors]

    def filled(self, workspace: int, *addresses: int) -> "ctypes.Array[Any]":
        """The struct of one call, as an array of words."""
        words = self._array.from_buffer_copy(self._bytes)
        for index, offset in self._buffers:
            words[index] = workspace + offset
        for field, address in zip(self._tensors, addresses, strict=True):
            if field is not None:
                words[field] = address
        return words

    def _index(self, name: str) -> int:
        return int(getattr(self.type, name).offset) // _ADDRESS_BYTES


class LaunchSequence:
    """Launches in a row, on one device, that take the same parameters.

    Args:
        launches: kernels and their grids, at least one; all on one device.
        template: of their parameters.

    Raises:
        TypeError: the struct has another size than a kernel's parameter.
    """

    def __init__(self, launches: Sequence[tuple[LoadedKernel, int]], template: ParameterTemplate) -> None:
        for kernel, _ in launches:
            kernel.check_parameters(template.type)
        self._launches = tuple(launches)
        self._template = template
        first = launches[0][0]
        self._driver, self._context, self._index = first.driver, first.context, first.device_index
        self._configured: dict[int, tuple[ConfiguredLaunch, ...]] = {}

    def start(self, workspace: int, *addresses: int) -> None:
        """Launch on torch's current stream; arguments as of ParameterTemplate.filled()."""
        stream = current_stream(self._index)
        launches = self._configured.get(stream) or self._configure(stream)
        self._driver.launch(self._context, launches, self._template.filled(workspace, *addresses))

    def _configure(self, stream: int) -> tuple[ConfiguredLaunch, ...]:
        launches = tuple(kernel.configure((blocks, 1, 1), stream) for kernel, blocks in self._launches)
        if len(self._configured) >= _MAX_STREAMS:
            self._configured.clear()
        self._configured[stream] = launches
        return launches


@dataclass(frozen=True)
class OutputForm:
    """What run() returns.

    Attributes:
        shape: [B, H, Nq, D].
        layout: the caller's, in which the memory is contiguous.
        dtype: the query's; the kernels write float32 as bfloat16, which is then converted.
        return_lse: whether LSE is wanted too.
        device: a CUDA device.
    """

    shape: tuple[int, int, int, int]
    layout: str
    dtype: torch.dtype
    return_lse: bool
    device: torch.device

    @classmethod
    def of(cls, call: AttentionCall) -> "OutputForm":
        """What `call` is to return."""
        shape = (call.batch, call.heads, call.query_length, call.head_dim)
        return cls(shape, call.layout, call.query.dtype, call.return_lse, call.device)

    @property
    def kernel_dtype(self) -> torch.dtype:
        """What the kernels write."""
        return torch.bfloat16 if self.dtype == torch.float32 else self.dtype

    @property
    def strides(self) -> tuple[int, int, int]:
        """Elements from one batch, head and row to the next."""
        _, heads, rows, head_dim = self.shape
        if self.layout == "BNHD":
            return rows * heads * head_dim, head_dim, heads * head_dim
        return heads * rows * head_dim, rows * head_dim, head_dim


@dataclass(frozen=True, eq=False)
class PreparedLaunch:
    """A call without its floating-point operands.

    Attributes:
        plan: what it was prepared by.
        workspace: uint8, holds the quantised operands; None where there is nothing to compute.
        attn_mask, key_lengths: the caller's, which run() reads.
    """

    plan: "LaunchPlan"
    workspace: Tensor | None
    attn_mask: Tensor | None
    key_lengths: Tensor | None


class LaunchingKernel(Hashable, Protocol):
    """A kernel whose launches are planned."""

    def plan(self, call: AttentionCall) -> "LaunchPlan":
        """The launches of all calls of `call`'s form; loads what they need."""


class LaunchPlan:
    """The launches of all calls of one form.

    Args:
        output: what run() returns.
        workspace: what prepare() allocates.
        prepare: whose parameters' addresses are query, key, value, key_lengths and attn_mask; None for calls without
            queries.
        run: whose parameters' addresses are output, lse, key_lengths and attn_mask.
        copied: whether query, key and value must be copied first: to 16 bits, or to rows that the kernels can load.
    """

    def __init__(
        self,
        output: OutputForm,
        workspace: WorkspaceLayout,
        prepare: LaunchSequence | None,
        run: LaunchSequence | None,
        copied: tuple[bool, bool, bool] = (False, False, False),
    ) -> None:
        self.output = output
        self.workspace = workspace
        self._prepare, self._run = prepare, run
        self._copied = copied if any(copied) else None
        batch, heads, rows, head_dim = output.shape
        self._output_size = (batch, rows, heads, head_dim) if output.layout == "BNHD" else output.shape
        self._options: dict[str, Any] = {"dtype": output.kernel_dtype, "device": output.device}

    def prepare(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, key_lengths: Tensor | None
    ) -> PreparedLaunch:
        """Quantise tensors of the form that the plan was made for; q, k and v in the caller's layout."""
        if self._prepare is None:
            return PreparedLaunch(self, None, None, None)
        if self._copied is not None:
            q, k, v = (
                _copy(x, self.output.layout) if copied else x for x, copied in zip((q, k, v), self._copied, strict=True)
            )
        if key_lengths is not None:
            key_lengths = key_lengths.contiguous()
        workspace = torch.empty(self.workspace.size, dtype=torch.uint8, device=self.output.device)
        self._prepare.start(
            workspace.data_ptr(),
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            0 if key_lengths is None else key_lengths.data_ptr(),
            0 if attn_mask is None else attn_mask.data_ptr(),
        )
        return PreparedLaunch(self, workspace, attn_mask, key_lengths)

    def prepare_call(self, call: AttentionCall) -> PreparedLaunch:
        """prepare() of a call of the form that the plan was made for."""
        tensors = (call.query, call.key, call.value)
        q, k, v = (x.transpose(1, 2) if call.layout == "BNHD" else x for x in tensors)
        return self.prepare(q, k, v, call.attn_mask, call.key_lengths)

    def run(self, state: PreparedLaunch) -> tuple[Tensor, Tensor | None]:
        """Output [B, H, Nq, D] in the query's dtype, and LSE where it is wanted."""
        form = self.output
        output = torch.empty(self._output_size, **self._options)
        lse = torch.empty(form.shape[:3], dtype=torch.float32, device=form.device) if form.return_lse else None
        if self._run is not None and state.workspace is not None:
            self._run.start(
                state.workspace.data_ptr(),
                output.data_ptr(),
                0 if lse is None else lse.data_ptr(),
                0 if state.key_lengths is None else state.key_lengths.data_ptr(),
                0 if state.attn_mask is None else state.attn_mask.data_ptr(),
            )
        if form.layout == "BNHD":
            output = output.transpose(1, 2)
        return (output.to(form.dtype) if form.dtype == torch.float32 else output), lse


def copied_strides(x: Tensor) -> tuple[int, int, int, int]:
    """Strides of [B, H, N, D] after the copy that a plan makes."""
    _, heads, length, head_dim = x.shape
    return heads * length * head_dim, length * head_dim, head_dim, 1


def _copy(x: Tensor, layout: str) -> Tensor:
    """Contiguous [B, H, N, D] in 16 bits."""
    dtype = torch.bfloat16 if x.dtype == torch.float32 else x.dtype
    x = x.transpose(1, 2) if layout == "BNHD" else x
    return x.to(dtype, memory_format=torch.contiguous_format, copy=True)


def planned(kernel: LaunchingKernel, call: AttentionCall) -> LaunchPlan:
    """The plan of a call's form, made where there is none yet."""
    form = (kernel, form_of_call(call))
    plan = _PLANS.get(form)
    if plan is None:
        plan = kernel.plan(call)
        _PLANS.put(form, plan)
    return plan


_PLANS: FormCache[LaunchPlan] = FormCache(256)
