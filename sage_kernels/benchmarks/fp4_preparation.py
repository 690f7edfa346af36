"""What the FP4 rung costs around its attention kernel: preparation time, memory and host time.

    python sage_kernels/benchmarks/fp4_preparation.py [--output FILE]

Runs on any NVIDIA GPU: preparation has no FP4 instruction that matters for its speed (where the GPU has none, rounding to
E2M1 is emulated in a few integer instructions), and memory and host time don't depend on the attention kernel's speed.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from sage_kernels.architectures import device_architecture
from sage_kernels.attention_call import AttentionCall, make_call
from sage_kernels.benchmark_shapes import SHAPES
from sage_kernels.dispatch import decide
from sage_kernels.evidence import write_atomically
from sage_kernels.gpu_timing import machine, time_on_gpu
from sage_kernels.kernels.nvfp4_cuda import NVFP4CudaKernel
"""
"""
