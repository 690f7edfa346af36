"""Faults in machine code that no test of a kernel's source can see, because the assembler makes them.

Each check takes a listing of disassembly.disassemble() and gives what it found wrong, in words. Instructions are looked
at in the order in which they stand, which in our kernels is that of the inner loops.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.MULTILINE)
_REGISTER = re.compile(r"\bR(\d+)(\.64)?")
_NO_DESTINATION = (
    "ST",
    "RED",
    "BAR",
    "BRA",
    "SYNCS",
    "EXIT",
    "ISETP",
    "FSETP",
    "R2UR",
    "WARP",
    "MEMBAR",
    "CALL",
    "RET",
)
# What can give codes of 8 or 4 bits: conversions, memory, other threads.
_MAKES_CODES = ("F2FP", "LDG", "LDS", "LDL", "SHFL", "ATOM")
# What hands on codes that its operands hold.
_HANDS_ON = ("PRMT", "SEL", "MOV", "IMAD.MOV", "IMAD.U32", "IMAD.SHL", "LOP3", "SHF.L.U32", "SHF.R.U32", "LEA", "BFI")
_DEPTH = 12  # operations between a conversion and what reads its result
_GROUP_END = "gsb0"


@dataclass(frozen=True)
class Instruction:
    """One line of a listing."""

    address: str
    opcode: str
    operands: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.address}: {self.opcode} {', '.join(self.operands)}"

    @property
    def written(self) -> frozenset[int]:
        """Registers that it writes."""
        first = _REGISTER.match(self.operands[0]) if self.operands else None
        if first is None or self.opcode.startswith(_NO_DESTINATION):
            return frozenset()
        width = next((words for mark, words in ((".128", 4), (".64", 2), (".WIDE", 2)) if mark in self.opcode), 1)
        return frozenset(range(int(first[1]), int(first[1]) + width))

    @property
    def named(self) -> frozenset[int]:
        """Registers that it names, written or read."""
        found = set(self.written)
        for match in _REGISTER.finditer(" ".join(self.operands)):
            found |= {int(match[1]), int(match[1]) + (match[2] is not None)}
        return frozenset(found)


def instructions(sass: str) -> list[Instruction]:
    """The instructions of a listing, in order."""
    return [
        Instruction(address, opcode, tuple(part.strip() for part in operands.split(",")) if operands else ())
        for address, opcode, operands in _LINE.findall(sass)
    ]


def unwritten_codes(sass: str) -> list[str]:
    """Conversions from FP8 or FP4 whose operand no conversion, load or shuffle has written.

    The assemblers of CUDA 12.8 and 12.9 make such code: they merge a conversion to FP8 into the word that its result is
    packed into (F2FP.PACK_AB_MERGE_C), and what else reads the result gets a register with something else in it.
    """
    code = instructions(sass)
    return [
        str(instruction)
        for place, instruction in enumerate(code)
        if "UNPACK_B" in instruction.opcode and not _holds_codes(code, place, instruction.operands[1], _DEPTH)
    ]


def _holds_codes(code: list[Instruction], place: int, operand: str, depth: int) -> bool:
    match = _REGISTER.match(operand)
    if match is None or depth == 0:  # zero, a constant, a uniform register; or followed for too long to say
        return True
    for before in range(place - 1, -1, -1):
        writer = code[before]
        if int(match[1]) in writer.written:
            if writer.opcode.startswith(_MAKES_CODES):
                return True
            return writer.opcode.startswith(_HANDS_ON) and all(
                _holds_codes(code, before, source, depth - 1) for source in writer.operands[1:]
            )
    return False


@dataclass(frozen=True)
class MatrixProduct:
    """A wgmma (IGMMA, QGMMA or HGMMA): its registers are its own until a wait."""

    instruction: Instruction
    accumulator: frozenset[int]
    left: frozenset[int]  # operand A, where it is in registers
    ends_group: bool


def matrix_products(code: list[Instruction]) -> Iterator[tuple[int, MatrixProduct]]:
    """Every wgmma with its place."""
    for place, instruction in enumerate(code):
        shape = re.match(r"[IQH]GMMA\.64x(\d+)x", instruction.opcode)
        if shape is None:
            continue
        halved = instruction.opcode.endswith(".F16")
        first, left = (re.match(r"R(\d+)", operand) for operand in instruction.operands[:2])
        assert first is not None
        registers = range(int(first[1]), int(first[1]) + int(shape[1]) // (4 if halved else 2))
        lefts = range(int(left[1]), int(left[1]) + 4) if left is not None else ()
        yield (
            place,
            MatrixProduct(instruction, frozenset(registers), frozenset(lefts), _GROUP_END in instruction.operands),
        )


def touched_in_flight(sass: str) -> list[str]:
    """Instructions that use a wgmma's accumulator, or write its operand A, before a wait for it."""
    code, found = instructions(sass), []
    products = dict(matrix_products(code))
    groups: list[list[MatrixProduct]] = []
    open_group: list[MatrixProduct] = []
    for place, instruction in enumerate(code):
        if place in products:
            open_group.append(products[place])
            if products[place].ends_group:
                groups.append(open_group)
                open_group = []
        elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
            pending = int(instruction.operands[-1], 16)
            groups = groups[len(groups) - pending :] if pending else []
        else:
            for product in (product for group in [*groups, open_group] for product in group):
                if instruction.named & product.accumulator or instruction.written & product.left:
                    found.append(f"{instruction} while {product.instruction} may be in flight")
                    break
    return found


def serialized_products(sass: str) -> list[str]:
    """Wgmmas that are groups of one, as where the assembler gave up on keeping several in flight."""
    alone, continues = [], False
    for _, product in matrix_products(instructions(sass)):
        if product.ends_group and not continues:
            alone.append(str(product.instruction))
        continues = not product.ends_group
    return alone
