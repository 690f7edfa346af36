"""Fill Triton's disk cache with the forms of the FP4 kernel that the tests launch, all at the same time.

python warm_nvfp4_triton.py FORM     compiles one: a JSON object of head_dim, is_causal, dtype and changes of RECIPE
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from sage_kernels.attention_call import make_call
from sage_kernels.kernels.nvfp4_triton import RECIPE, NVFP4TritonKernel


def warm(forms: Sequence[Mapping[str, Any]]) -> None:
    """One process a form: a compilation takes seconds, most of them in one thread.

    Raises:
        RuntimeError: a form can't be compiled; with its output.
    """
    running = [
        subprocess.Popen(
            [sys.executable, __file__, json.dumps(form)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for form in forms
    ]
    outputs = [process.communicate()[0] for process in running]
    for form, process, output in zip(forms, running, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"{form}: {output}")


def launch(form: Mapping[str, Any]) -> None:
    """A launch on a few tokens."""
    dtype = getattr(torch, form["dtype"])
    q, k, v = (torch.ones(1, 1, 2, form["head_dim"], dtype=dtype, device="cuda") for _ in range(3))
    call = make_call(q, k, v, None, form["is_causal"], None, True, None, "BHND", "fp4", True, False)
    kernel = NVFP4TritonKernel(replace(RECIPE, **form.get("recipe", {})), dot_scaled=False)
    kernel.run(kernel.prepare(call))
    torch.cuda.synchronize()


if __name__ == "__main__":
    launch(json.loads(sys.argv[1]))
