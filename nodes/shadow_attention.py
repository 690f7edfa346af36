"""An attention override that computes the model's own attention and notes what low precision would have made of it."""

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sage_kernels.block_overrides import BlockId, BlockLayout

from .attention_arguments import AttentionArguments, read_arguments
from .attention_override import Kernels
from .block_tracking import current_evaluation, running_block

ROW_BLOCK = 128  # query rows that share a mean or a scale in every precision: they are sampled as a whole
CHUNK_ELEMENTS = 1 << 24  # of K or V in float32 at once: 64 MiB, of which the references hold a few


class ShadowAttention:
    """The value of transformer_options["optimized_attention_override"] during a calibration.

    What it returns is the model's own attention, so that the sampling stays the 16-bit one. Sums of errors stay on the
    device until errors() reads them: no attention call waits for the GPU.

    Args:
        layout: the model's blocks.
        precisions: to compare with the model's own attention.
        kernels: sage_kernels.
        rows: how many query rows of each head to look at; whole blocks of 128 are taken.
        native_blocks: as for AttentionOverride.
        min_tokens: attention over fewer tokens is not looked at.
        previous: the override that was there before.
        allow_emulation: passed on to sage_kernels.

    Attributes:
        slot: which column of the results calls belong to; None: don't look.
        stand_in: an override that takes all calls instead, or None.
        refusals: why calls couldn't be looked at.
    """

    def __init__(
        self,
        layout: BlockLayout,
        precisions: Sequence[str],
        kernels: Kernels,
        *,
        rows: int,
        native_blocks: Mapping[Hashable, BlockId],
        min_tokens: int = 0,
        previous: Callable[..., Any] | None = None,
        allow_emulation: bool = False,
    ) -> None:
        self.slot: int | None = None
        self.stand_in: Callable[..., Tensor] | None = None
        self.refusals: set[str] = set()
        self._blocks = tuple(layout)
        self._precisions = tuple(precisions)
        self._kernels = kernels
        self._rows = rows
        self._native_blocks = dict(native_blocks)
        self._min_tokens = min_tokens
        self._previous = previous
        self._allow_emulation = allow_emulation
        # A compiled model must ask anew each time, as AttentionOverride does.
        self._attend_eagerly = torch.compiler.disable(self._attend)
        self._lock = threading.Lock()
        # Of |difference| for each precision, then of |own output|: float32 [P + 1, H] by block, slot and device.
        self._sums: dict[tuple[BlockId, int, torch.device], Tensor] = {}
        self._work: dict[BlockId, int] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "ShadowAttention":
        """Itself: cloning a ModelPatcher copies its options deeply."""
        return self

    def __call__(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Attention as core calls it."""
        return self._attend_eagerly(func, args, kwargs)

    def _attend(self, func: Callable[..., Tensor], args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        if self.stand_in is not None:
            return self.stand_in(func, *args, **kwargs)
        output = func(*args, **kwargs) if self._previous is None else self._previous(func, *args, **kwargs)
        if self.slot is not None:
            options = kwargs.get("transformer_options") or {}
            block = running_block(current_evaluation(), self._native_blocks, options)
            if block is not None:
                self._compare(block, self.slot, read_arguments(args, kwargs), output)
        return output

    @property
    def measured_blocks(self) -> tuple[BlockId, ...]:
        """Blocks with at least one attention call that was looked at."""
        return tuple(block for block in self._blocks if block in self._work)

    def attention_share(self) -> Tensor:
        """Each block's part of the attention arithmetic that was seen, float32 [B]."""
        work = torch.tensor([self._work.get(block, 0) for block in self._blocks], dtype=torch.float64)
        return (work / work.sum()).float()

    def errors(self, slots: int) -> tuple[Tensor, tuple[int, ...]]:
        """Relative L1 float32 [P, B, H, slots], and the heads of each block; waits for the device."""
        sums = {key: tensor.cpu() for key, tensor in self._sums.items()}
        heads = [max((s.shape[1] for key, s in sums.items() if key[0] == block), default=0) for block in self._blocks]
        totals = torch.zeros(len(self._precisions) + 1, len(heads), max(heads), slots)
        for (block, slot, _), tensor in sums.items():
            totals[:, self._blocks.index(block), : tensor.shape[1], slot] += tensor
        return totals[:-1] / totals[-1].clamp(min=torch.finfo(torch.float32).tiny), tuple(heads)

    def _compare(self, block: BlockId, slot: int, call: AttentionArguments | str, output: Tensor) -> None:
        if isinstance(call, str) or min(call.query_tokens, call.key_tokens) < self._min_tokens:
            self.refusals.add(call if isinstance(call, str) else "fewer tokens than min_tokens")
            return
        refusal = self._refusal(call)
        if refusal is not None:
            self.refusals.add(refusal)
            return
        query, key, value = _heads_first(call)
        batch, heads, tokens, head_dim = query.shape
        own = _output_heads_first(call, output)
        sums = torch.zeros(len(self._precisions) + 1, heads, device=query.device)
        rows = sampled_rows(tokens, self._rows, query.device)
        options = {"scale": call.scale, "enable_gqa": call.enable_gqa, "allow_emulation": self._allow_emulation}
        for example, head, kv_head in _chunks(batch, heads, key):
            q, k, v = query[example, head][:, :, rows], key[example, kv_head], value[example, kv_head]
            expected = own[example, head][:, :, rows].float()
            mask = _mask_part(call.attn_mask, example, head, rows)
            sums[-1, head] += expected.abs().sum(dim=(0, 2, 3))
            for index, precision in enumerate(self._precisions):
                low = self._kernels.attention(q, k, v, attn_mask=mask, precision=precision, **options)
                sums[index, head] += (low.float() - expected).abs_().sum(dim=(0, 2, 3))
        with self._lock:
            place = block, slot, query.device
            self._sums[place] = self._sums[place] + sums if place in self._sums else sums
            self._work[block] = self._work.get(block, 0) + batch * heads * tokens * key.shape[2] * head_dim

    def _refusal(self, call: AttentionArguments) -> str | None:
        """Why one of the precisions can't do the call."""
        tensors, form = call.for_kernels()
        for precision in self._precisions:
            options = {**form, "precision": precision, "allow_emulation": self._allow_emulation}
            try:
                decision = self._kernels.explain(*tensors, **options)
            except (TypeError, ValueError) as error:
                return str(error)
            if decision.kernel in {None, "sdpa"}:
                return f"{precision}: {'; '.join(str(refusal) for refusal in decision.refusals)}"
        return None


def sampled_rows(tokens: int, rows: int, device: torch.device) -> Tensor:
    """Indices of the query rows to look at: whole blocks of 128, spread evenly; all rows where there are fewer."""
    blocks = tokens // ROW_BLOCK
    wanted = max(1, rows // ROW_BLOCK)
    if blocks == 0:
        return torch.arange(tokens, device=device)
    wanted = min(wanted, blocks)
    starts = (torch.arange(wanted, device=device) * 2 + 1) * blocks // (2 * wanted) * ROW_BLOCK
    return (starts[:, None] + torch.arange(ROW_BLOCK, device=device)).flatten()


def _chunks(batch: int, heads: int, key: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """(examples, query heads, key heads) that are looked at together, of at most CHUNK_ELEMENTS if it can be."""
    kv_heads = key.shape[1]
    group = heads // kv_heads
    at_once = max(1, CHUNK_ELEMENTS // (key.shape[2] * key.shape[3]))
    for example in range(batch):
        for start in range(0, kv_heads, at_once):
            stop = min(start + at_once, kv_heads)
            yield slice(example, example + 1), slice(start * group, stop * group), slice(start, stop)


def _heads_first(call: AttentionArguments) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as views [B, H, N, D]."""
    tensors = call.query.detach(), call.key.detach(), call.value.detach()
    return tuple(t.transpose(1, 2) for t in tensors) if call.output_form.layout == "BNHD" else tensors


def _output_heads_first(call: AttentionArguments, output: Tensor) -> Tensor:
    """The model's own result as a view [B, H, Nq, D]."""
    output = output.detach()
    return (
        output.unflatten(-1, (-1, call.query.shape[-1])).transpose(1, 2) if call.output_form.flatten_heads else output
    )


def _mask_part(mask: Tensor | None, example: slice, heads: slice, rows: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if mask.shape[0] > 1:
        mask = mask[example]
    if mask.shape[1] > 1:
        mask = mask[:, heads]
    return mask if mask.shape[2] == 1 else mask[:, :, rows]
