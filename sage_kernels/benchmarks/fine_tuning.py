"""Does fine-tuning with INT8 attention prepare a language model for FP4 inference? The paper's authors say so.

    export PYTHONPATH=sage_kernels/src
    python sage_kernels/benchmarks/fine_tuning.py               # on a GPU; --processes 3 trains three models at once
    python sage_kernels/benchmarks/fine_tuning.py --short --text PROSE.txt CODE.txt     # seconds on a CPU

A byte-level language model of 14 million parameters is pretrained on prose (3,000 steps, 16-bit attention). From that
one start it is fine-tuned on source code for 1,000 steps with BF16, INT8 and FP8 attention and several seeds of the
data's order; the seeds are the same for every method. Each result is evaluated on code it never saw with 16-bit
attention, and with FP4 attention by the quantised reference: ours, and SageAttention3 as published.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))
from result_file import describe
from training_study.attention_methods import FP4_RECIPES, TRAINING_METHODS, fp4_attention, training_attention
from training_study.language_model import LanguageModel
from training_study.study import Study, curve_points
from training_study.training_run import RunConfig, Trainer, evaluate

from sage_kernels.evidence import write_json

RESULTS = Path(__file__).parent / "results"
STEPS = 1000
LEARNING_RATE = 3e-4


def main() -> None:
    """Train what is missing, write the result file, print the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    study, options = Study.from_command_line(parser)
    study.started_model("bf16")
    names = [f"fine_tuning_{method}_{seed}" for seed in range(options.seeds) for method in TRAINING_METHODS]
    out = options.out or (None if study.short else RESULTS / "fine_tuning.json")
    rows: list[dict[str, Any]] = []

    def write(runs: list[dict[str, Any]]) -> None:
        rows[:] = [row for found in runs for row in found["rows"]]
        about = {"steps": study.steps(STEPS), "curves": {f"{x['method']}_{x['seed']}": x["losses"] for x in runs}}
        if out is not None and runs:
            write_json(out, {**describe("fine_tuning.py", study.device, options.commit), **about, "rows": rows})

    study.run_all(["fine_tuning_start", *names], run, write)
    for row in rows:
        print(f"{row['method']:6} seed {row['seed']} evaluated with {row['evaluated_with']:14} "
              f"{row['nats_per_byte']:.5f} nats a byte, perplexity {row['perplexity']:.4f}")  # fmt: skip


def run(study: Study, name: str) -> dict[str, Any]:
    """Fine-tune, or take the start as it is, and evaluate."""
    method, _, seed = name.removeprefix("fine_tuning_").partition("_")
    model = study.started_model("bf16" if method == "start" else method)
    losses: list[float] = []
    if method != "start":
        config = RunConfig(study.steps(STEPS), learning_rate=LEARNING_RATE)
        result = Trainer(model, study.corpus("code").train, config, seed=1000 + int(seed)).run(f"{method} {seed}")
        losses = [round(value, 4) for value in curve_points(result.losses)]
    return {
        "method": method,
        "seed": int(seed or 0),
        "losses": losses,
        "rows": [
            {"benchmark": "fine_tuning", "shape": "byte_lm", "method": method, "seed": int(seed or 0), **found}
            for found in evaluations(study, model)
        ],
    }


def evaluations(study: Study, model: LanguageModel) -> list[dict[str, Any]]:
    """Loss on held-out code with each attention."""
    text = study.corpus("code").held_out
    attentions = {"bf16": training_attention("bf16")} | {name: fp4_attention(name) for name in FP4_RECIPES}
    found = []
    for name, attend in attentions.items():
        loss = evaluate(model, text, attend).mean()
        found.append({"evaluated_with": name, "nats_per_byte": float(loss), "perplexity": float(loss.exp())})
    return found


if __name__ == "__main__":
    main()
