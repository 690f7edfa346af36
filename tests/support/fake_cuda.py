"""A CUDA driver library of Python functions: answers like libcuda and records what it was asked for."""

import ctypes
from types import SimpleNamespace

from sage_kernels.driver import LaunchConfig

NAMES = {0: b"CUDA_SUCCESS", 200: b"CUDA_ERROR_INVALID_IMAGE", 701: b"CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"}


class FakeCuda(SimpleNamespace):
    """Set `failures[function] = code` to make a call fail; `contexts` is the stack of the calling thread.

    Kernels that `struct_bytes` knows the size of the parameter of have it kept in `launched_structs`.
    """

    def __init__(self, version=12080, parameter_bytes=24):
        super().__init__()
        self.calls, self.contexts, self.failures = [], [], {}
        self.launched_parameters, self.launched_configs, self.launched_structs = [], [], []
        self.struct_bytes, self._entries = {}, {}
        self._answers = {
            "cuDriverGetVersion": lambda out: write(out, version),
            "cuGetErrorName": lambda code, out: write(out, NAMES.get(code)),
            "cuGetErrorString": lambda code, out: write(out, b"what the driver says"),
            "cuDeviceGet": write,
            "cuDevicePrimaryCtxRetain": lambda out, device: write(out, 1000 + device.value),
            "cuCtxGetCurrent": lambda out: write(out, self.contexts[-1] if self.contexts else None),
            "cuCtxPushCurrent_v2": self.contexts.append,
            "cuCtxPopCurrent_v2": lambda out: self.contexts.pop(),
            "cuModuleLoadData": lambda out, image: write(out, 2000 + self.contexts[-1]),
            "cuModuleGetFunction": self._get_function,
            "cuFuncGetParamInfo": lambda function, index, offset, size: write(size, parameter_bytes),
            "cuLaunchKernelEx": self._launch,
            "cuTensorMapEncodeTiled": lambda out, *_: ctypes.memset(out.value, 0xAB, 128),
        }
        for name in (*self._answers, "cuInit", "cuFuncSetAttribute"):
            setattr(self, name, self._function(name))

    def _function(self, name):
        def function(*arguments):
            self.calls.append((name, *arguments))
            if name in self.failures:
                return self.failures[name]
            if name in self._answers:
                self._answers[name](*arguments)
            return 0

        return function

    def _get_function(self, out, module, name):
        number = 5 + len(self._entries)
        self._entries[number] = name
        write(out, number)

    def _launch(self, config, function, parameters, extra):
        config = LaunchConfig.from_address(config)
        shape = (*config.grid, *config.block, config.shared_bytes, config.stream)
        self.launched_configs.append((function, *shape))
        size = self.struct_bytes.get(self._entries.get(function))
        if size is not None:
            self.launched_structs.append(ctypes.string_at(parameters[0], size))
        self.launched_parameters.append((self.contexts[-1], ctypes.c_uint32.from_address(parameters[0]).value))

    def count(self, name):
        """How often a function was called."""
        return sum(call[0] == name for call in self.calls)

    def last(self, name):
        """Arguments of a function's last call."""
        return next(call[1:] for call in reversed(self.calls) if call[0] == name)


def write(reference, value):
    """Store through a byref()."""
    reference._obj.value = value
