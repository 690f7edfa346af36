"""`launch_example.py DIR`: load the example kernel with DIR as its cache, launch it, say whether it computed.

A process of its own, for tests of several that share a cache.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from example_kernel import SOURCES, VARIANT, Parameters
from sage_kernels.architectures import device_architecture
from sage_kernels.cubin_cache import CubinCache
from sage_kernels.cubin_loader import KernelLoader
from sage_kernels.cubin_manifest import CubinManifest
from sage_kernels.driver import cuda_driver

cache = CubinCache(Path(sys.argv[1]))
device = torch.device("cuda", torch.cuda.current_device())
source, destination = torch.arange(100.0, device=device), torch.zeros(100, device=device)
loader = KernelLoader(cuda_driver(), SOURCES, CubinManifest(cache.folder), cache)
kernel = loader.load(VARIANT, device.index, device_architecture(device).target, emulate=True)
kernel.launch((1, 1, 1), Parameters(source.data_ptr(), destination.data_ptr(), 100, 1.0))
print("right" if torch.equal(destination, source * 6) else f"wrong: {destination}")
