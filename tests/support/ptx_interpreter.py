"""Runs one warp through straight-line PTX, to see which elements end up in which register of an MMA.

Knows the instructions that Triton emits for a kernel of one tile; anything else raises NotImplementedError.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

WARP = 32
_ADDRESS_BITS = 32  # parameter i is a pointer to i << 32
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")


@dataclass
class Mma:
    """Operands of one mma instruction: one array of 32 lanes for each register, by operand (d, a, b, c, scales)."""

    name: str
    operands: list[list[np.ndarray]]


@dataclass
class Warp:
    """State of the 32 lanes. `memory` holds the bytes that each pointer parameter points at, and takes stores.

    Register i of lane l of the first result of an mma is set to 4 l + i, so that stores show where it belongs.
    """

    memory: list[np.ndarray]
    registers: dict[str, np.ndarray] = field(default_factory=dict)
    shared: np.ndarray = field(default_factory=lambda: np.zeros(1 << 16, np.uint8))
    mmas: list[Mma] = field(default_factory=list)

    def run(self, ptx: str) -> None:
        """Execute the body of the only kernel in `ptx` up to its ret."""
        for opcode, operands in _statements(ptx):
            if opcode == "ret":
                return
            self._execute(opcode, operands)

    def _execute(self, opcode: str, operands: list[str]) -> None:
        root = opcode.split(".", maxsplit=1)[0]
        if root == "bar":
            return
        if root == "mma":
            self._mma(opcode, operands)
        elif root in ("ld", "st", "ldmatrix"):
            _MEMORY[root](self, opcode, operands)
        elif root in _ARITHMETIC:
            result = _ARITHMETIC[root](opcode, *map(self._read, operands[1:]))
            narrow = opcode.endswith("32") and not opcode.startswith(("cvt.u64", "mad.wide"))
            self.registers[operands[0]] = result & 0xFFFFFFFF if narrow else result
        else:
            raise NotImplementedError(f"the interpreter doesn't know {opcode}; add it to tests/support")

    def _read(self, operand: str) -> np.ndarray:
        if operand == "%tid.x":
            return np.arange(WARP, dtype=np.int64)
        if operand.startswith("%"):
            return self.registers[operand]
        value = 0 if operand == "global_smem" else int(operand, 0)
        return np.full(WARP, value, np.int64)

    def _vector(self, operand: str) -> list[str]:
        return [name.strip() for name in operand.strip("{}").split(",")]

    def _address(self, operand: str) -> np.ndarray:
        terms = operand.strip("[] ").split("+")
        return sum(self._read(term.strip()) for term in terms)

    def _bytes(self, opcode: str, address: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """For each lane the memory that its address is in, and the offset there."""
        if ".shared" in opcode:
            return [self.shared] * WARP, address
        return [self.memory[segment] for segment in address >> _ADDRESS_BITS], address & ((1 << _ADDRESS_BITS) - 1)

    def _load(self, opcode: str, operands: list[str]) -> None:
        targets = self._vector(operands[0])
        if ".param" in opcode:
            index = int(operands[1].strip("[]").rsplit("_", 1)[1])
            self.registers[targets[0]] = np.full(WARP, index << _ADDRESS_BITS, np.int64)
            return
        size = int(opcode[-2:].lstrip("bsuf")) // 8
        memories, offsets = self._bytes(opcode, self._address(operands[1]))
        for number, target in enumerate(targets):
            words = [
                _word(memory, offset + number * size, size) for memory, offset in zip(memories, offsets, strict=True)
            ]
            self.registers[target] = np.array(words, np.int64)

    def _store(self, opcode: str, operands: list[str]) -> None:
        size = int(opcode[-2:].lstrip("bsuf")) // 8
        memories, offsets = self._bytes(opcode, self._address(operands[0]))
        for number, source in enumerate(self._vector(operands[1])):
            for lane, value in enumerate(self._read(source)):
                first = offsets[lane] + number * size
                memories[lane][first : first + size] = list(int(value).to_bytes(size, "little"))

    def _ldmatrix(self, opcode: str, operands: list[str]) -> None:
        """Lane l gets the word l % 4 of row l // 4 of 8x8 matrices of 16 bits; lane 8 m + r points at row r of m."""
        if opcode.split(".", 1)[1] not in {f"sync.aligned.m8n8.x{n}.shared.b16" for n in (1, 2, 4)}:
            raise NotImplementedError(f"the interpreter doesn't know {opcode}; add it to tests/support")
        rows = self._address(operands[1])
        for matrix, target in enumerate(self._vector(operands[0])):
            words = [_word(self.shared, rows[8 * matrix + lane // 4] + lane % 4 * 4, 4) for lane in range(WARP)]
            self.registers[target] = np.array(words, np.int64)

    def _mma(self, opcode: str, operands: list[str]) -> None:
        self.mmas.append(Mma(opcode, [[self._read(name) for name in self._vector(group)] for group in operands]))
        for number, target in enumerate(self._vector(operands[0])):
            self.registers[target] = 4 * np.arange(WARP, dtype=np.int64) + number


def _statements(ptx: str) -> list[tuple[str, list[str]]]:
    body = ptx[ptx.index("// %bb.0") :]
    lines = [line.split("//")[0].strip() for line in body.splitlines()]
    kept = [line for line in lines if not line.startswith((".loc", "$")) and line not in ("{", "}")]
    statements = [statement.strip() for statement in " ".join(kept).split(";")]
    parts = [statement.split(None, 1) for statement in statements if statement]
    return [(part[0], _OPERAND.findall(part[1]) if len(part) > 1 else []) for part in parts]


def _word(memory: np.ndarray, offset: int, size: int) -> int:
    return int.from_bytes(memory[offset : offset + size].tobytes(), "little")


def _bit_field(opcode: str, value: np.ndarray, first: np.ndarray, length: np.ndarray) -> np.ndarray:
    bits = value >> first & (1 << length) - 1
    sign = bits >> (length - 1) & 1
    return bits - (sign << length) if ".s32" in opcode else bits


def _shuffle(opcode: str, value: np.ndarray, lane: np.ndarray, clamp: np.ndarray, members: np.ndarray) -> np.ndarray:
    if not opcode.startswith("shfl.sync.idx") or clamp[0] != WARP - 1:
        raise NotImplementedError(f"the interpreter knows shfl.sync.idx of the whole warp, not {opcode}")
    return value[lane % WARP]


def _compare(opcode: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if ".eq." not in opcode:
        raise NotImplementedError(f"the interpreter knows setp.eq, not {opcode}")
    return (a == b).astype(np.int64)


_ARITHMETIC: dict[str, Callable[..., np.ndarray]] = {
    "mov": lambda _, a: a,
    "cvt": lambda _, a: a,
    "add": lambda _, a, b: a + b,
    "and": lambda _, a, b: a & b,
    "or": lambda _, a, b: a | b,
    "xor": lambda _, a, b: a ^ b,
    "shl": lambda _, a, b: a << b,
    "mad": lambda _, a, b, c: a * b + c,
    "selp": lambda _, a, b, predicate: np.where(predicate == 1, a, b),
    "bfe": _bit_field,
    "setp": _compare,
    "shfl": _shuffle,
}
_MEMORY = {"ld": Warp._load, "st": Warp._store, "ldmatrix": Warp._ldmatrix}
