"""CuTe layouts as their C++ text spells them, Layout<Shape<...>, Stride<...>>, evaluated at coordinates."""

import ast
import math
import re
from dataclasses import dataclass
from typing import TypeAlias

Nested: TypeAlias = "int | tuple[Nested, ...]"


@dataclass(frozen=True)
class CuteLayout:
    """A function from one coordinate a mode to an offset; a mode's coordinate runs over its parts leftmost fastest."""

    shape: tuple[Nested, ...]
    stride: tuple[Nested, ...]

    def __call__(self, *coordinates: int) -> int:
        modes = zip(coordinates, self.shape, self.stride, strict=True)
        return sum(_offset(coordinate, shape, stride) for coordinate, shape, stride in modes)


def parse_layout(text: str) -> CuteLayout:
    """The layout that `Layout<Shape<...>, Stride<...>>` spells, with numbers like _8 and C++ comments."""
    text = re.sub(r"//.*", "", text)
    text = re.sub(r"\w+\s*<", "(", text).replace(">", ",)")  # names of the templates don't matter
    return CuteLayout(*ast.literal_eval(re.sub(r"\b_(\d+)", r"\1", text).strip()))


def _size(shape: Nested) -> int:
    return shape if isinstance(shape, int) else math.prod(map(_size, shape))


def _offset(coordinate: int, shape: Nested, stride: Nested) -> int:
    if isinstance(shape, int):
        return coordinate * stride
    offset = 0
    for part, part_stride in zip(shape, stride, strict=True):
        offset += _offset(coordinate % _size(part), part, part_stride)
        coordinate //= _size(part)
    return offset
