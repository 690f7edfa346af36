"""Pretraining a language model with 16-bit and with INT8 attention, with and without QK-norm: loss curves.

    export PYTHONPATH=sage_kernels/src
    python sage_kernels/benchmarks/pretraining.py               # on a GPU; --processes 4 trains four models at once
    python sage_kernels/benchmarks/pretraining.py --short --text PROSE.txt CODE.txt     # seconds on a CPU

The byte-level model of fine_tuning.py from random weights on prose for 2,000 steps: same weights, same batches, same
learning rate; only attention and QK-norm differ. Every step's loss and gradient norm is checked to be finite.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))
from result_file import describe
from training_study.attention_methods import training_attention
from training_study.study import CURVE_STEPS, Study, curve_points
from training_study.training_run import RunConfig, Trainer, evaluate

from sage_kernels.evidence import write_json

RESULTS = Path(__file__).parent / "results"
STEPS = 2000
LEARNING_RATE = 1e-3
LAST = 100  # steps whose mean is the final loss


def main() -> None:
    """Train what is missing, write the result file, print the ends of the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    study, options = Study.from_command_line(parser)
    cases = [(norm, method) for norm in ("norm", "plain") for method in ("bf16", "int8")]
    names = [f"pretraining_{norm}_{method}_{options.steps}" for norm, method in cases]
    out = options.out or (None if study.short else RESULTS / "pretraining.json")
    rows: list[dict[str, Any]] = []

    def write(found: list[dict[str, Any]]) -> None:
        rows[:] = found
        about = {"steps": study.steps(options.steps), "curve_steps": CURVE_STEPS}
        if out is not None and found:
            write_json(out, {**describe("pretraining.py", study.device, options.commit), **about, "rows": found})

    study.run_all(names, run, write)
    for row in rows:
        print(f"{row['method']:5} QK-norm {row['qk_norm']!s:5} final loss {row['final_loss']:.4f}, held out "
              f"{row['held_out_loss']:.4f}, {row['non_finite']} steps not finite, largest gradient norm "
              f"{row['largest_gradient_norm']:.1f}, {row['steps_per_second']:.1f} steps/s")  # fmt: skip


def run(study: Study, name: str) -> dict[str, Any]:
    """One curve."""
    norm, method, steps = name.removeprefix("pretraining_").split("_")
    model = study.model(norm == "norm", method)
    corpus = study.corpus("prose")
    config = RunConfig(study.steps(int(steps)), learning_rate=LEARNING_RATE)
    result = Trainer(model, corpus.train, config, seed=7).run(name)
    finite = result.losses.isfinite() & result.gradient_norms.isfinite()
    return {
        "benchmark": "pretraining",
        "shape": "byte_lm",
        "method": method,
        "qk_norm": norm == "norm",
        "steps": config.steps,
        "non_finite": int((~finite).sum()),
        "final_loss": float(result.losses[-LAST:].double().mean()),
        "held_out_loss": float(evaluate(model, corpus.held_out, training_attention(method)).mean()),
        "largest_gradient_norm": float(result.gradient_norms.max()),
        "steps_per_second": result.steps_per_second,
        "losses": [round(value, 4) for value in curve_points(result.losses)],
    }


if __name__ == "__main__":
    main()
