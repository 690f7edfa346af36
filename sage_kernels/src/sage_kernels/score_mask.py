"""Which keys a query may attend to: bool and additive masks, causality, key lengths, padding."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ScoreMask:
    """Masks of one call, applied to a tile of scores at a time.

    Attributes:
        attn_mask: bool (True: attend) or additive, broadcastable to [B, H, Nq, Nk]; None for none.
        is_causal: key j only for query i >= j (top-left aligned, as in torch).
        key_lengths: int32 [B]; keys at and beyond are ignored. None for none.
        key_length: Nk; the tile may reach beyond it into padding.
    """

    attn_mask: Tensor | None
    is_causal: bool
    key_lengths: Tensor | None
    key_length: int

    def skips(self, rows: slice, keys: slice) -> bool:
        """Whether causality masks the whole tile."""
        return self.is_causal and keys.start >= rows.stop

    def apply(self, scores: Tensor, rows: slice, keys: slice) -> Tensor:
        """Scores [B, H, rows, keys] with the masks added; -inf where a query may not attend."""
        columns = torch.arange(keys.start, keys.stop, device=scores.device)
        if self.attn_mask is not None:
            scores = self._apply_attn_mask(scores, rows, keys)
        if keys.stop > self.key_length:
            scores = scores.masked_fill(columns >= self.key_length, -torch.inf)
        if self.is_causal and keys.stop - 1 > rows.start:
            row_numbers = torch.arange(rows.start, rows.stop, device=scores.device)
            scores = scores.masked_fill(columns > row_numbers[:, None], -torch.inf)
        if self.key_lengths is not None:
            scores = scores.masked_fill(columns >= self.key_lengths[:, None, None, None], -torch.inf)
        return scores

    def _apply_attn_mask(self, scores: Tensor, rows: slice, keys: slice) -> Tensor:
        assert self.attn_mask is not None
        mask = self.attn_mask
        mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
        if mask.shape[2] > 1:
            mask = mask[:, :, rows]
        padding = 0
        if mask.shape[3] > 1:
            mask = mask[..., keys]
            padding = keys.stop - keys.start - mask.shape[3]
        if mask.dtype == torch.bool:
            mask = torch.nn.functional.pad(mask, (0, padding), value=True)
            return scores.masked_fill(~mask, -torch.inf)
        return scores + torch.nn.functional.pad(mask.to(scores.dtype), (0, padding))


def valid_tokens(key_lengths: Tensor, length: int) -> Tensor:
    """Bool [B, 1, length, 1]: which tokens key_lengths keeps."""
    return (torch.arange(length, device=key_lengths.device) < key_lengths[:, None])[:, None, :, None]
