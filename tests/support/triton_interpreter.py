"""Triton's interpreter, with its conversions between float formats put right."""

from importlib import import_module

import numpy as np
import torch

_TORCH_DTYPES = {"bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn}
_BITS = {"bf16": (torch.int16, np.uint16), "fp8e4nv": (torch.uint8, np.uint8)}


def round_as_gpus_do(monkeypatch):
    """Give the interpreter the rounding of GPUs, nearest with ties to even, and once for fma.

    Its own drops the carry out of the mantissa (1.96875 becomes 1.0 in E4M3) and rounds ties up (Triton 3.9).
    """
    interpreter = import_module("triton.runtime.interpreter")

    convert = interpreter._convert_float

    def convert_float(x, source, target, rounding_mode):
        if source.name != "fp32" or target.name not in _TORCH_DTYPES:
            return convert(x, source, target, rounding_mode)
        rounded = torch.from_numpy(np.ascontiguousarray(x).view(np.float32)).to(_TORCH_DTYPES[target.name])
        torch_bits, numpy_bits = _BITS[target.name]
        return rounded.view(torch_bits).numpy().view(numpy_bits)

    monkeypatch.setattr(interpreter, "_convert_float", convert_float)

    def fma(self, x, y, z):
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return interpreter.TensorHandle(exact.astype(x.data.dtype), z.dtype)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fma)


def multiply_bfloat16(monkeypatch):
    """Let the interpreter's dot take bfloat16, whose bits it holds in integers and multiplies as such (Triton 3.9)."""
    interpreter = import_module("triton.runtime.interpreter")
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    create_dot = builder.create_dot

    def values(x):
        if x.dtype.scalar.name != "bf16":
            return x
        numbers = (x.data.astype(np.uint32) << 16).view(np.float32)
        return handle(numbers, import_module("triton.language").float32)

    def dot(self, a, b, d, *arguments):
        return create_dot(self, values(a), values(b), d, *arguments)

    monkeypatch.setattr(builder, "create_dot", dot)
