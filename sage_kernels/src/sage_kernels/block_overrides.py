"""Which blocks of a model are to run in FP16, and for which share of the sampling steps: the text form and its meaning.

    0-2: 1, 17: 0.5                      blocks 0 to 2 always, block 17 for the first half of the steps
    double.3: 1, single.0-5: 0.25 low    by block type; the last quarter of the steps

A bare number counts through all blocks in the order of the model's BlockLayout. Pure Python: no torch.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

NoiseEnd = Literal["high", "low"]

_ENTRY = re.compile(
    r"(?:(?P<type>[A-Za-z_]\w*)\s*\.\s*)?(?P<first>[0-9]{1,6})(?:\s*-\s*(?P<last>[0-9]{1,6}))?"
    r"\s*:\s*(?P<share>[-+]?[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)(?:\s+(?P<end>[A-Za-z]+))?",
    re.ASCII,
)
_TYPE = re.compile(r"[A-Za-z_]\w*", re.ASCII)


class BlockOverrideError(ValueError):
    """An override that can't be read, or that names blocks which the model hasn't; the message is one line."""


@dataclass(frozen=True, order=True)
class BlockId:
    """A transformer block: `index` counts within its `type` ("double", "single", ...)."""

    type: str
    index: int

    def __str__(self) -> str:
        return f"{self.type}.{self.index}"


@dataclass(frozen=True)
class BlockLayout:
    """How many blocks of each type a model has; the order of the types is the order of the bare numbers.

    Attributes:
        counts: block type -> number of blocks, such as {"double": 19, "single": 38}; types without blocks are dropped.
    """

    counts: Mapping[str, int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts", {type_: count for type_, count in self.counts.items() if count > 0})

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __iter__(self) -> Iterator[BlockId]:
        return (BlockId(type_, index) for type_, count in self.counts.items() for index in range(count))

    def __contains__(self, block: object) -> bool:
        return isinstance(block, BlockId) and 0 <= block.index < self.counts.get(block.type, 0)

    def __str__(self) -> str:
        if len(self.counts) == 1:
            return _range(0, len(self) - 1)
        return ", ".join(f"{type_}.{_range(0, count - 1)}" for type_, count in self.counts.items()) or "none"

    def name(self, block: BlockId) -> str:
        """The shortest way to write `block` in an override: its bare index where the model has one block type."""
        return str(block.index) if len(self.counts) == 1 else str(block)


@dataclass(frozen=True)
class StepShare:
    """The share of the sampling steps, 0 to 1, that a block runs in FP16, and at which end of the noise schedule."""

    share: float
    end: NoiseEnd = "high"


@dataclass(frozen=True)
class BlockOverride:
    """Blocks `first` to `last`, both included, of one type (None: numbers count through all blocks) in FP16.

    Raises:
        BlockOverrideError: a range that runs backwards, a share outside 0 to 1, an end other than "high" and "low".
    """

    first: int
    last: int
    share: float
    end: NoiseEnd = "high"
    type: str | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.first < 0:
            problems.append(f"block {self.first} is negative (blocks count from 0)")
        if self.last < self.first:
            problems.append(f"the range {self.first}-{self.last} runs backwards (write {self.last}-{self.first})")
        if not 0.0 <= self.share <= 1.0:
            problems.append(f"the share {self.share:g} is outside 0 to 1 (it is a share of the sampling steps)")
        if self.end not in get_args(NoiseEnd):
            problems.append(f"{self.end!r} is no end of the noise schedule (allowed: high, low)")
        if self.type is not None and not _TYPE.fullmatch(self.type):
            problems.append(f"{self.type!r} is no block type (letters, digits and _ are allowed)")
        if problems:
            raise BlockOverrideError("; ".join(problems))

    def __str__(self) -> str:
        blocks = _range(self.first, self.last)
        share = str(int(self.share)) if self.share in {0.0, 1.0} else repr(self.share)
        return f"{self.type}." * (self.type is not None) + f"{blocks}: {share}" + " low" * (self.end == "low")


def parse_block_overrides(text: str) -> tuple[BlockOverride, ...]:
    """Read overrides such as "0-2: 1, double.17: 0.5 low", separated by commas or new lines; "" gives none.

    Raises:
        BlockOverrideError: with the number and text of the entry at fault, and what is allowed.
    """
    overrides: list[BlockOverride] = []
    entries = [entry.strip() for entry in re.split(r"[,\n]", text)]
    for number, entry in enumerate((entry for entry in entries if entry), start=1):
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise BlockOverrideError(
                f"block override {number}, {entry!r}, is not understood; "
                "write BLOCKS: SHARE, such as '0-2: 1', 'double.3: 0.5' or '17: 0.25 low', separated by commas"
            )
        first, last = int(match["first"]), int(match["last"] or match["first"])
        end = cast(NoiseEnd, match["end"] or "high")  # BlockOverride checks it
        try:
            override = BlockOverride(first, last, float(match["share"]), end, match["type"])
        except BlockOverrideError as error:
            raise BlockOverrideError(f"block override {number}, {entry!r}: {error}") from None
        overrides.append(override)
    return tuple(overrides)


def format_block_overrides(overrides: Sequence[BlockOverride]) -> str:
    """The canonical text; parse_block_overrides() reads it back."""
    return ", ".join(str(override) for override in overrides)


def resolve_block_overrides(overrides: Sequence[BlockOverride], layout: BlockLayout) -> dict[BlockId, StepShare]:
    """What the overrides say about each block of a model.

    Raises:
        BlockOverrideError: a block or type that the model hasn't (says which exist), or a block named twice.
    """
    shares: dict[BlockId, StepShare] = {}
    named_by: dict[BlockId, BlockOverride] = {}
    all_blocks = tuple(layout)
    for override in overrides:
        blocks = all_blocks if override.type is None else tuple(b for b in all_blocks if b.type == override.type)
        if override.last >= len(blocks):
            raise BlockOverrideError(_missing_blocks(override, len(blocks), layout))
        for block in blocks[override.first : override.last + 1]:
            if block in named_by:
                raise BlockOverrideError(
                    f"block {layout.name(block)} is named twice, by '{named_by[block]}' and by '{override}'; "
                    "name each block once"
                )
            named_by[block] = override
            shares[block] = StepShare(override.share, override.end)
    return shares


def _missing_blocks(override: BlockOverride, count: int, layout: BlockLayout) -> str:
    where = f"block override '{override}':"
    if override.type is not None and count == 0:
        return f"{where} the model has no blocks of type {override.type!r}; it has {layout}"
    if override.type is not None:
        return f"{where} the model's {override.type} blocks are {override.type}.{_range(0, count - 1)}"
    numbered = _range(0, count - 1) + (f" ({layout})" if len(layout.counts) > 1 else "") if count else "none"
    return f"{where} the model has no block {override.last}; its blocks are {numbered}"


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
