"""Everything about the launches of a call that its form decides, worked out once; a call then only adds addresses.

Preparing one launch in Python takes longer than the launch itself. A plan holds no tensors, and nothing in it changes
once it is made, so that threads and streams share it.
"""

import ctypes
import math
import threading
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
_MAX_WORKSPACES = 16  # whose addresses a template keeps
_ADDRESS_BYTES = 8
BoundLaunch = tuple[ConfiguredLaunch, "ctypes.Array[Any]"]


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


class _OwnStruct(threading.local):
    """A thread's filled struct and the workspace that it points into."""

    def __init__(self) -> None:
        self.workspace: int | None = None
        self.words: ctypes.Array[Any] | None = None


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
        self._bytes = bytes(_ADDRESS_BYTES) + bytes(parameters)
        self._array = ctypes.c_uint64 * (len(self._bytes) // _ADDRESS_BYTES)
        self._buffers = [(self._index(name), offset) for name, offset in buffers.items()]
        self._tensors = [None if name is None else self._index(name) for name in tensors]
        self._with_workspace: dict[int, bytes] = {}
        self._own = _OwnStruct()

    def filled(self, workspace: int, *addresses: int) -> "ctypes.Array[Any]":
        """The struct of one call, led by its own address, which is how the driver takes it.

        It holds until the thread asks for the next one: a launch copies it.
        """
        own = self._own
        words = own.words
        if words is None or own.workspace != workspace:
            words = self._array.from_buffer_copy(self._with_workspace.get(workspace) or self._fill_buffers(workspace))
            words[0] = ctypes.addressof(words) + _ADDRESS_BYTES
            own.words, own.workspace = words, workspace
        for field, address in zip(self._tensors, addresses, strict=True):
            if field is not None:
                words[field] = address
        return words

    def _fill_buffers(self, workspace: int) -> bytes:
        """The struct with the addresses of buffers; torch's allocator gives the same few workspaces over and over."""
        words = self._array.from_buffer_copy(self._bytes)
        for index, offset in self._buffers:
            words[index] = workspace + offset
        if len(self._with_workspace) >= _MAX_WORKSPACES:
            self._with_workspace.clear()
        content = self._with_workspace[workspace] = bytes(words)
        return content

    def _index(self, name: str) -> int:
        return 1 + int(getattr(self.type, name).offset) // _ADDRESS_BYTES


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
        self._filled = template.filled
        first = launches[0][0]
        self.driver, self.context, self.device_index = first.driver, first.context, first.device_index
        self._configured: dict[int, tuple[ConfiguredLaunch, ...]] = {}

    def start(self, workspace: int, *addresses: int) -> None:
        """Launch on torch's current stream; arguments as of ParameterTemplate.filled()."""
        self.driver.launch(self.context, self.bound(current_stream(self.device_index), workspace, *addresses))

    def bound(self, stream: int, workspace: int, *addresses: int) -> list[BoundLaunch]:
        """What Driver.launch() takes; arguments as of ParameterTemplate.filled()."""
        parameters = self._filled(workspace, *addresses)
        return [(launch, parameters) for launch in self._configured.get(stream) or self._configure(stream)]

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
        is_like_query: whether the query has the output's dtype and strides.
    """

    shape: tuple[int, int, int, int]
    layout: str
    dtype: torch.dtype
    return_lse: bool
    device: torch.device
    is_like_query: bool

    @classmethod
    def of(cls, call: AttentionCall) -> "OutputForm":
        """What `call` is to return."""
        shape = (call.batch, call.heads, call.query_length, call.head_dim)
        query = call.query.transpose(1, 2) if call.layout == "BNHD" else call.query
        is_like_query = query.is_contiguous() and query.dtype != torch.float32
        return cls(shape, call.layout, query.dtype, call.return_lse, call.device, is_like_query)

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


@dataclass(eq=False, slots=True)
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
        self._dtype, self._device = output.kernel_dtype, output.device

    def prepare(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, key_lengths: Tensor | None
    ) -> PreparedLaunch:
        """Quantise tensors of the form that the plan was made for; q, k and v in the caller's layout."""
        if self._prepare is None:
            return PreparedLaunch(self, None, None, None)
        if self._copied is not None:
            q, k, v = self._copies(q, k, v)
        if key_lengths is not None:
            key_lengths = key_lengths.contiguous()
        workspace = torch.empty(self.workspace.size, dtype=torch.uint8, device=self._device)
        lengths, mask = _address(key_lengths), _address(attn_mask)
        self._prepare.start(workspace.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr(), lengths, mask)
        return PreparedLaunch(self, workspace, attn_mask, key_lengths)

    def prepare_call(self, call: AttentionCall) -> PreparedLaunch:
        """prepare() of a call of the form that the plan was made for."""
        tensors = (call.query, call.key, call.value)
        q, k, v = (x.transpose(1, 2) if call.layout == "BNHD" else x for x in tensors)
        return self.prepare(q, k, v, call.attn_mask, call.key_lengths)

    def run(self, state: PreparedLaunch) -> tuple[Tensor, Tensor | None]:
        """Output [B, H, Nq, D] in the query's dtype, and LSE where it is wanted."""
        output, lse = self._empty_output(), self._empty_lse()
        if self._run is not None and state.workspace is not None:
            lengths, mask = _address(state.key_lengths), _address(state.attn_mask)
            self._run.start(state.workspace.data_ptr(), output.data_ptr(), _address(lse), lengths, mask)
        return self._result(output), lse

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, key_lengths: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """run() of prepare(), with all launches in a row."""
        if self._prepare is None or self._run is None:
            return self.run(self.prepare(q, k, v, attn_mask, key_lengths))
        output, lse = torch.empty_like(q) if self.output.is_like_query else self._empty_output(), self._empty_lse()
        if self._copied is not None:
            q, k, v = self._copies(q, k, v)
        if key_lengths is not None:
            key_lengths = key_lengths.contiguous()
        workspace = torch.empty(self.workspace.size, dtype=torch.uint8, device=self._device)
        start, lengths, mask = workspace.data_ptr(), _address(key_lengths), _address(attn_mask)
        stream = current_stream(self._run.device_index)
        launches = self._prepare.bound(stream, start, q.data_ptr(), k.data_ptr(), v.data_ptr(), lengths, mask)
        launches += self._run.bound(stream, start, output.data_ptr(), _address(lse), lengths, mask)
        self._run.driver.launch(self._run.context, launches)
        return self._result(output), lse

    def _copies(self, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert self._copied is not None
        q, k, v = (
            _copy(x, self.output.layout) if copied else x for x, copied in zip(tensors, self._copied, strict=True)
        )
        return q, k, v

    def _empty_output(self) -> Tensor:
        return torch.empty(self._output_size, dtype=self._dtype, device=self._device)

    def _empty_lse(self) -> Tensor | None:
        if not self.output.return_lse:
            return None
        return torch.empty(self.output.shape[:3], dtype=torch.float32, device=self._device)

    def _result(self, output: Tensor) -> Tensor:
        if self.output.layout == "BNHD":
            output = output.transpose(1, 2)
        return output.to(torch.float32) if self.output.dtype == torch.float32 else output


def copied_strides(x: Tensor) -> tuple[int, int, int, int]:
    """Strides of [B, H, N, D] after the copy that a plan makes."""
    _, heads, length, head_dim = x.shape
    return heads * length * head_dim, length * head_dim, head_dim, 1


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


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
