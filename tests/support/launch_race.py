"""`launch_race.py`: a kernel whose threads race, compiled at once. A process of its own, for compute-sanitizer."""

import ctypes
from pathlib import Path

import torch

from sage_kernels.architectures import device_architecture
from sage_kernels.driver import configure_launch, cuda_driver, point_to
from sage_kernels.nvrtc import find_nvrtc


class Parameters(ctypes.Structure):
    """Of the kernel."""

    _fields_ = (("values", ctypes.c_uint64),)


values = torch.arange(128.0, device="cuda")
arch = device_architecture(values.device).target
source = (Path(__file__).parents[1] / "kernels" / "bad_kernels.cu").read_text(encoding="utf-8")
driver = cuda_driver()
context = driver.primary_context(values.device.index)
cubin = find_nvrtc(arch).compile("bad_kernels.cu", source, {}, [f"-arch={arch}"])
launch = configure_launch(driver.load_function(context, cubin, "races"), (1, 1, 1), 128, 0, 0)
parameters = Parameters(values.data_ptr())
driver.launch(context, ((launch, point_to(parameters)),))
torch.cuda.synchronize()
