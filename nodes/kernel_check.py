"""A live test of every kernel against torch's own attention, in a process of its own: a CUDA error there stays there.

As a script: kernel_check.py FOLDER_OF_SAGE_KERNELS FIRST. It runs the cases from number FIRST on, and prints one line
of JSON when a case starts and one when it is done, so that the process that started it knows which one was fatal.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

TIMEOUT_S = 120.0
TOKENS, HEADS, HEAD_DIM = 512, 2, 128
# Cosine to float32 attention on random operands; the references give 0.983 for FP4, 0.9993 for INT8.
LEAST_COSINE = {"fp4": 0.97, "fp8_fp4": 0.97, "int8": 0.998, "int8_fp16": 0.998, "fp16": 0.9999}


def check_kernels(
    package_folder: Path, timeout_s: float = TIMEOUT_S, script: Path = Path(__file__)
) -> list[dict[str, str]]:
    """Run all cases, in as many processes as it takes to survive them.

    Args:
        package_folder: the folder that holds sage_kernels.
        timeout_s: how long one process may take.
        script: what to run; this file.

    Returns:
        For each case {"case": "cuda:0 nvfp4_cuda", "state": "ok" | "wrong" | "not run" | "crashed", "detail": a line}.
    """
    results: list[dict[str, str]] = []
    first = 0
    while True:
        lines, end = _run_child(script, package_folder, first, timeout_s)
        results += [line for line in lines if "state" in line]
        if end is None:
            return results
        started = [line for line in lines if "state" not in line]
        if len(started) == len(lines) - len(started):  # it ended between two cases, or before the first
            return [*results, {"case": "the test itself", "state": "crashed", "detail": end}]
        results.append({"case": started[-1]["case"], "state": "crashed", "detail": end})
        first += len(started)


def _run_child(
    script: Path, package_folder: Path, first: int, timeout_s: float
) -> tuple[list[dict[str, str]], str | None]:
    """The lines of one process, and how it ended if not well."""
    command = [sys.executable, str(script), str(package_folder), str(first)]
    # Files, not pipes: what was written before a crash or a timeout is there.
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out, tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        try:
            code = subprocess.run(command, stdout=out, stderr=log, timeout=timeout_s, check=False).returncode
            end = None if code == 0 else f"the process ended with exit code {code}"
        except subprocess.TimeoutExpired:
            end = f"no answer within {timeout_s:g} s"
        out.seek(0)
        log.seek(0)
        lines = [json.loads(line) for line in out if line.startswith("{") and line.endswith("}\n")]
        last_words = log.read().strip().splitlines()[-1:]
    return lines, end and ": ".join([end, *last_words])


def _cases() -> Iterator[tuple[str, str]]:
    """Device and kernel. Emulated kernels are tested where they are cheap, on the CPU; GPU kernels on GPUs."""
    from sage_kernels import capabilities  # noqa: PLC0415  (found once the script knows the folder)
    from sage_kernels.kernels import KERNELS  # noqa: PLC0415

    for device in capabilities():
        on_cpu = device.device == "cpu"
        for kernel in KERNELS:
            if kernel.precision == "fp16" or kernel.emulated == on_cpu:
                yield device.device, kernel.name


def _run_case(device: str, name: str) -> dict[str, str]:
    import torch  # noqa: PLC0415  (the parent process, which is ComfyUI, needs none of this)

    from sage_kernels import attention  # noqa: PLC0415
    from sage_kernels.attention_call import make_call  # noqa: PLC0415
    from sage_kernels.dispatch import decide  # noqa: PLC0415
    from sage_kernels.kernels import find_kernel  # noqa: PLC0415
    from sage_kernels.planned_attention import plan_with  # noqa: PLC0415

    kernel = find_kernel(name)
    precision = kernel.precision
    generator = torch.Generator().manual_seed(0)
    operands = [torch.randn(1, HEADS, TOKENS, HEAD_DIM, generator=generator) for _ in range(3)]
    q, k, v = (operand.to(device, torch.bfloat16) for operand in operands)
    options = (None, False, None, False, None, "BHND", precision, False, kernel.emulated)
    decision = decide(make_call(q, k, v, *options), (kernel,))
    if decision.kernel is None:
        return {"state": "not run", "detail": "; ".join(refusal.reason for refusal in decision.refusals)}
    if device != "cpu":
        plan_with(kernel, q, k, v, *options)  # where several kernels serve a precision, attention() would choose
    output = attention(q, k, v, precision=precision, allow_emulation=kernel.emulated).float().cpu()
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.float().cpu() for x in (q, k, v)))
    cosine = torch.nn.functional.cosine_similarity(output.flatten(), expected.flatten(), dim=0).item()
    good = cosine >= LEAST_COSINE[precision]  # False for NaN
    return {
        "state": "ok" if good else "wrong",
        "detail": f"{precision}: cosine {cosine:.5f} to torch's attention (at least {LEAST_COSINE[precision]})",
    }


def main(package_folder: str, first: int) -> None:
    """Run the cases from number `first` on."""
    # Python put the folder of this script there, whose modules would hide those of the standard library.
    sys.path[0] = package_folder
    # Anything else that prints goes to stderr.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for number, (device, kernel) in enumerate(_cases()):
        if number < first:
            continue
        case = f"{device} {kernel}"
        print(json.dumps({"case": case}), file=answers, flush=True)
        try:
            result = _run_case(device, kernel)
        except Exception as error:
            result = {"state": "crashed", "detail": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps({"case": case, **result}), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
