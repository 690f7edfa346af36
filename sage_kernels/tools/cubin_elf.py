"""What a cubin says about its kernel: registers, shared memory, stack. A reader of the few ELF parts that hold it.

Attribute numbers are those of NVIDIA's .nv.info sections; tests/test_cubins.py checks them against ptxas's own report.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_SECTION = struct.Struct("<IIQQQQIIQQ")  # Elf64_Shdr
_SYMBOL = struct.Struct("<IBBHQQ")  # Elf64_Sym
_REGISTER_COUNT, _FRAME_SIZE = 0x2F, 0x11
_PAYLOAD_WITH_SIZE = 4  # format of an attribute whose payload follows; the others hold it in place of a size
_RESERVED_SHARED_BYTES = 1024  # that the system takes of each block's shared memory from sm_90 on


@dataclass(frozen=True)
class KernelResources:
    """What one kernel takes.

    Attributes:
        registers: per thread at launch.
        static_shared_bytes: per block, without what the system reserves.
        stack_bytes: local memory per thread: spilled registers and arrays that are indexed at run time.
    """

    registers: int
    static_shared_bytes: int
    stack_bytes: int


@dataclass(frozen=True)
class _Section:
    name: str
    data: bytes
    size: int


def read_resources(cubin: bytes, entry: str) -> KernelResources:
    """Resources of the kernel `entry`.

    Raises:
        ValueError: not a cubin, or one without that kernel.
    """
    sections = _sections(cubin)
    symbols = _symbol_names(sections)
    if f".text.{entry}" not in sections or entry not in symbols:
        raise ValueError(f"no kernel {entry} in this cubin")
    attributes = {
        (number, payload[0]): payload[1]
        for number, payload in _attributes(sections[".nv.info"].data)
        if number in (_REGISTER_COUNT, _FRAME_SIZE)
    }
    shared = sections.get(f".nv.shared.{entry}")
    index = symbols.index(entry)
    return KernelResources(
        attributes[_REGISTER_COUNT, index],
        0 if shared is None else shared.size - _RESERVED_SHARED_BYTES,
        attributes[_FRAME_SIZE, index],
    )


def symbol_names(cubin: bytes) -> list[str]:
    """Names of all symbols."""
    return _symbol_names(_sections(cubin))


def _sections(cubin: bytes) -> dict[str, _Section]:
    if cubin[:5] != b"\x7fELF\x02":
        raise ValueError("not a cubin: it is no 64-bit ELF file")
    (offset,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names_index = struct.unpack_from("<3H", cubin, 58)
    headers = [_SECTION.unpack_from(cubin, offset + number * size) for number in range(count)]
    names = headers[names_index]
    sections = {}
    for header in headers:
        name = _text(cubin, names[4] + header[0])
        sections[name] = _Section(name, cubin[header[4] : header[4] + header[5]], header[5])
    return sections


def _symbol_names(sections: dict[str, _Section]) -> list[str]:
    strings = sections[".strtab"].data
    return [_text(strings, symbol[0]) for symbol in _SYMBOL.iter_unpack(sections[".symtab"].data)]


def _attributes(data: bytes) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Numbers of the attributes and the 32-bit words of their payloads."""
    position = 0
    while position < len(data):
        kind, number, size = struct.unpack_from("<BBH", data, position)
        position += 4
        if kind == _PAYLOAD_WITH_SIZE:
            yield number, struct.unpack_from(f"<{size // 4}I", data, position)
            position += size


def _text(data: bytes, start: int) -> str:
    return data[start : data.index(b"\0", start)].decode()
