"""Control flow of a kernel from nvdisasm's listing: instructions, basic blocks, loops, and what a loop's turn skips."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_FUNCTION = re.compile(r"\.text\.([\w$]+):")
_LABEL = re.compile(r"(\.L\w+):")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_TARGET = re.compile(r"`\((\.L\w+)\)")
_ENDS = ("EXIT", "RET", "BRX", "JMX")


class SassError(RuntimeError):
    """A listing that can't be read, or a loop that isn't there. The message says what to do."""


@dataclass(frozen=True)
class Instruction:
    """One machine instruction, such as @P0 MUFU.EX2 R9, R177."""

    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def root(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> str | None:
        """Label that a branch goes to."""
        match = _TARGET.search(self.operands) if self.root == "BRA" else None
        return match[1] if match else None

    @property
    def conditional(self) -> bool:
        """Whether control may go on to the next instruction: guarded, or a predicate or a vote among the operands."""
        return bool(self.guard) or not self.operands.lstrip().startswith("`")


@dataclass(frozen=True)
class Block:
    """Instructions that run one after the other; successors are indices into the function's blocks."""

    label: str
    instructions: tuple[Instruction, ...]
    successors: tuple[int, ...]


@dataclass(frozen=True)
class Loop:
    """A natural loop: its header and all its blocks, by index."""

    header: int
    blocks: frozenset[int]


@dataclass(frozen=True)
class Detour:
    """Blocks of a loop that are entered only through one side of a branch whose other side goes past them."""

    label: str
    blocks: frozenset[int]


@dataclass(frozen=True)
class Function:
    """A kernel's control flow."""

    name: str
    blocks: tuple[Block, ...]

    def instructions(self, blocks: Iterable[int]) -> Iterator[Instruction]:
        """Of these blocks, in the order of the listing."""
        for index in sorted(blocks):
            yield from self.blocks[index].instructions

    def count(self, blocks: Iterable[int], opcode: str | tuple[str, ...]) -> int:
        """Instructions whose opcode begins with this, such as "OMMA" or "MUFU.EX2", or with one of these."""
        return sum(instruction.opcode.startswith(opcode) for instruction in self.instructions(blocks))


def parse(listing: str) -> list[Function]:
    """The functions of a listing.

    Raises:
        SassError: it holds none.
    """
    functions: dict[str, list[str | Instruction]] = {}
    lines: list[str | Instruction] = []
    for line in map(str.strip, listing.splitlines()):
        if match := _FUNCTION.match(line):
            lines = functions.setdefault(match[1], [])
        elif match := _LABEL.match(line):
            lines.append(match[1])
        elif match := _INSTRUCTION.match(line):
            lines.append(Instruction(int(match[1], 16), (match[2] or "").strip(), match[3], match[4]))
    if not functions:
        raise SassError("no function in the listing; it must be the output of `nvdisasm -c`")
    return [Function(name, _build_blocks(lines)) for name, lines in functions.items()]


def _build_blocks(lines: list[str | Instruction]) -> tuple[Block, ...]:
    labels: dict[str, int] = {}
    bodies: list[list[Instruction]] = [[]]
    for line in lines:
        if isinstance(line, str):
            if bodies[-1]:
                bodies.append([])
            labels[line] = len(bodies) - 1
        else:
            bodies[-1].append(line)
            if line.root == "BRA" or line.root in _ENDS:
                bodies.append([])
    names = {index: label for label, index in labels.items()}
    return tuple(
        Block(names.get(index, _address(body)), tuple(body), _successors(index, body, labels, len(bodies)))
        for index, body in enumerate(bodies)
    )


def _address(body: list[Instruction]) -> str:
    return f"{body[0].address:04x}" if body else "end"


def _successors(index: int, body: list[Instruction], labels: dict[str, int], count: int) -> tuple[int, ...]:
    following = (index + 1,) if index + 1 < count else ()
    if not body:
        return following
    last = body[-1]
    if last.target is not None:
        if last.target not in labels:
            raise SassError(f"branch at {last.address:04x} to the unknown label {last.target}")
        return (*following, labels[last.target]) if last.conditional else (labels[last.target],)
    return () if last.root in _ENDS and not last.guard else following


def find_loops(function: Function) -> list[Loop]:
    """Natural loops of what is reachable, those with a shared header merged."""
    dominators = _dominators(function, 0, frozenset(range(len(function.blocks))))
    bodies: dict[int, set[int]] = {}
    predecessors = _predecessors(function)
    for block, above in dominators.items():
        for header in function.blocks[block].successors:
            if header not in above:
                continue
            body = bodies.setdefault(header, {header})
            waiting = [block]
            while waiting:
                current = waiting.pop()
                if current not in body:
                    body.add(current)
                    waiting += [p for p in predecessors[current] if p in dominators]
    return [Loop(header, frozenset(body)) for header, body in bodies.items()]


def find_detours(
    function: Function, loop: Loop, work: tuple[str | tuple[str, ...], ...], minimum: float
) -> list[Detour]:
    """What a turn of the loop normally goes past: the outermost detours without which it still has its work.

    Args:
        function: the loop's.
        loop: one of find_loops.
        work: beginnings of the opcodes that a turn is for, the weightiest first. Where both sides of a branch are ways
            around each other, the one with more of them, or else the longer one, is no detour.
        minimum: how many of the first a turn has.
    """

    def weight(detour: Detour) -> tuple[int, ...]:
        return tuple(function.count(detour.blocks, opcode) for opcode in (*work, ""))

    candidates = []
    for sides in _optional_sides(function, loop):
        candidates += sorted(sides, key=weight)[: 1 if len(sides) == 2 else None]
    detours: list[Detour] = []
    remaining = loop.blocks
    for detour in sorted(candidates, key=lambda side: (weight(side)[0], -len(side.blocks))):
        if detour.blocks <= remaining and function.count(remaining - detour.blocks, work[0]) >= minimum:
            detours.append(detour)
            remaining -= detour.blocks
    return sorted(detours, key=lambda detour: min(detour.blocks))


def _optional_sides(function: Function, loop: Loop) -> Iterator[list[Detour]]:
    """For each branch in the loop the sides (none, one or both) that a turn can go without."""
    dominators = _dominators(function, loop.header, loop.blocks)
    predecessors = _predecessors(function)
    for branch in loop.blocks:
        inside = [block for block in function.blocks[branch].successors if block in loop.blocks]
        sides = []
        for first, other in (inside, inside[::-1]) if len(inside) == 2 else ():
            blocks = frozenset(block for block, above in dominators.items() if first in above)
            entries = [p for p in predecessors[first] if p in loop.blocks - blocks]
            past = _reachable(function, other, loop.blocks - blocks - {branch})
            if entries == [branch] and any(loop.header in function.blocks[block].successors for block in past):
                sides.append(Detour(function.blocks[first].label, blocks))
        yield sides


def _predecessors(function: Function) -> dict[int, list[int]]:
    predecessors: dict[int, list[int]] = {index: [] for index in range(len(function.blocks))}
    for index, block in enumerate(function.blocks):
        for successor in dict.fromkeys(block.successors):
            predecessors[successor].append(index)
    return predecessors


def _dominators(function: Function, entry: int, allowed: frozenset[int]) -> dict[int, frozenset[int]]:
    """For each block reachable from `entry` within `allowed`: the blocks on every way to it, itself included."""
    order = _reachable(function, entry, allowed)
    reachable = frozenset(order)
    predecessors = _predecessors(function)
    dominators = dict.fromkeys(order, reachable) | {entry: frozenset({entry})}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            above = [dominators[p] for p in predecessors[block] if p in reachable]
            new = frozenset.intersection(*above) | {block}
            changed |= new != dominators[block]
            dominators[block] = new
    return dominators


def _reachable(function: Function, entry: int, allowed: frozenset[int]) -> list[int]:
    """Blocks that control can get to from `entry` within `allowed`."""
    order: list[int] = []
    waiting = [entry]
    while waiting:
        block = waiting.pop()
        if block in allowed and block not in order:
            order.append(block)
            waiting += function.blocks[block].successors
    return order
