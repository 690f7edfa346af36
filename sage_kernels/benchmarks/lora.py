"""The LoRA example with 16-bit and with INT8 attention: same clips, same start; loss curves and held-out loss.

export PYTHONPATH=sage_kernels/src
python sage_kernels/benchmarks/lora.py                                  # on a GPU; needs sage-kernels[lora]
python sage_kernels/benchmarks/lora.py --steps 2 --batch 1 --out FILE   # minutes on a CPU
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from result_file import add_commit_option, describe

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from lora_fine_tuning import train

from sage_kernels.evidence import write_json

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Train both, write the result file after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_commit_option(parser)
    parser.add_argument("--out", type=Path, default=RESULTS / "lora.json")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for method in ("bf16", "int8"):
        example = argparse.Namespace(
            **vars(options), attention=method, rank=16, learning_rate=1e-3, checkpointing=False
        )
        _, result = train(example)
        rows.append({"benchmark": "lora", "shape": "wan_digits", "method": method, **result})
        write_json(options.out, {**describe("lora.py", options.device, options.commit), "rows": rows})
        print(
            f"{method}: held-out loss {result['held_out_before']:.4f} before, {result['held_out_after']:.4f} after, "
            f"{result['seconds']:.1f} s; {result['coverage']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
