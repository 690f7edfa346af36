"""TRAINING.md from the result files."""

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from paper_study import plots
from paper_study.document import Cell, Document, source

from sage_kernels.benchmark_shapes import TRAINING_SHAPES

from . import published

Result = dict[str, Any]
MODELS = {"wan_digits": "demo video model", "byte_lm": "byte language model"}
TENSORS = {"output": "O", "dq": "dQ", "dk": "dK", "dv": "dV"}
_RESOURCES = {"issue_slots": "issue slots", "tensor_cores": "tensor cores"}
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def write_report(results: Path, report: Path) -> None:
    """TRAINING.md, training.html and pictures in `report` from the JSON files in `results`."""
    report.mkdir(parents=True, exist_ok=True)
    document = Document("Training with 8-bit attention (SageBwd), measured")
    document.text(
        "The authors' figures come from the paper's reviews, with their models on their machines; ours from the "
        "commands named here. Where a claim is not confirmed the text says so."
    )
    speed(document, read(results / "training.json"))
    profile(document, read(results / "training_profile.json"))
    layer(document, read(results / "layer_latency.json"))
    ablation(document, read(results / "training_gradients.json"))
    fine_tuning(document, read(results / "fine_tuning.json"))
    pretraining(document, read(results / "pretraining.json"), report)
    lora(document, read(results / "lora.json"), report)
    document.write(report, "TRAINING.md", "training.html")
    print(f"wrote {report / 'TRAINING.md'} and {report / 'training.html'}")


def read(path: Path) -> Result | None:
    """A result file, or None where there is none."""
    found: Result | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return found


def section(document: Document, title: str, result: Result | None, script: str) -> Iterator[Result]:
    """A heading, and the result to go on with; or what is missing and how to get it."""
    document.heading(title)
    if result is None:
        document.text(f"Not measured yet: `python sage_kernels/benchmarks/{script}` on a GPU writes its result file.")
        return
    document.text(f"`python sage_kernels/benchmarks/{script}`. {source(result)}")
    yield result


def speed(document: Document, result: Result | None) -> None:
    """Attention alone."""
    for found in section(document, "Attention alone: forward and backward pass", result, "training.py"):
        document.text(
            "TFLOP/s over 3.5 times a forward pass, quantisation included; memory is the peak of both passes beyond "
            "inputs, output and gradients; the error is the mean relative L1 of dQ, dK and dV."
        )
        lines: list[list[Cell]] = []
        for row in found["rows"]:
            flash = pick(found["rows"], shape=row["shape"], method="sdpa_flash")
            lines.append([
                f"{row['shape']}, {row['method']}", row["ms"], round(row["tflops"]),
                f"{flash['ms'] / row['ms']:.2f}" if flash else None, row["extra_bytes"] / 2**20,
                f"{row['rel_l1']:.4f}",
            ])  # fmt: skip
        header = ["", "ms", "TFLOP/s", "x sdpa_flash", "MiB extra", "rel. L1"]
        document.table(header, lines)
        ours = [row for row in found["rows"] if row["method"] == "sagebwd_int8"]
        items = []
        for row in ours:
            flash, cudnn = (
                pick(found["rows"], shape=row["shape"], method=name) for name in ("sdpa_flash", "sdpa_cudnn")
            )
            if flash and cudnn:
                reached = "reaches" if flash["ms"] / row["ms"] >= published.SPEED_UP else "does not reach"
                items.append(
                    f"{row['shape']}: {flash['ms'] / row['ms']:.2f} x FlashAttention 2, which {reached} the paper's "
                    f"{published.SPEED_UP} x (RTX 4090); {cudnn['ms'] / row['ms']:.2f} x cuDNN's 16-bit kernel; memory "
                    f"{row['extra_bytes'] / flash['extra_bytes']:.2f} x FlashAttention's."
                )
        document.items(items)


def profile(document: Document, result: Result | None) -> None:
    """What the kernels wait for."""
    for found in section(document, "Where the time of attention goes", result, "training_profile.py"):
        document.text(
            "One pass under Nsight Compute, at the clock that it sets. Issue slots, tensor cores, special functions "
            "(exponentials) and memory: percent of the time in which they are busy. Instructions are for each score "
            "that a thread computes."
        )
        lines: list[list[Cell]] = []
        items = []
        for shape in TRAINING_SHAPES:
            rows = [row for row in found["rows"] if row["shape"] == shape.name]
            scores = shape.batch * shape.heads * shape.length**2 / (2 if shape.is_causal else 1)
            for row in rows:
                multiplies = row["tensor_cores_busy"] > 1
                lines.append([
                    f"{shape.name}, {row['method']}", round(row["us"]),
                    f"{32 * row['instructions'] / scores:.1f}" if multiplies else None,
                    *(round(row[f"{key}_busy"]) for key in (*_RESOURCES, "special_functions", "dram")),
                ])  # fmt: skip
            if not rows:
                continue
            total = sum(row["us"] for row in rows)
            issue, tensor = (sum(row["us"] * row[f"{key}_busy"] for row in rows) / total for key in _RESOURCES)
            items.append(
                f"{shape.name}: {_RESOURCES['issue_slots']} are busy {issue:.0f} % of the time and "
                f"{_RESOURCES['tensor_cores']} {tensor:.0f} %: neither is the limit. With issue slots always busy the "
                f"same instructions would take {issue / 100:.2f} of the time."
            )
        document.table(["", "us", "instructions", "issue slots", "tensor cores", "exponentials", "DRAM"], lines)
        document.items(items)
        document.text(
            "One kernel computes all gradients: S^T in INT8, P^T dO, dS^T Q and dS K in 16 bits. In INT8 those three "
            "took two kernels, which both computed the scores and dP, and a thread spent on codes, maxima and scales "
            "what the tensor cores saved. dQ is added up in integers, so that results stay the same from run to run. "
            "What keeps the tensor cores from being busy is that a thread's registers hold the sums of dK and dV and "
            "one block of scores: little of one block overlaps the next."
        )


def layer(document: Document, result: Result | None) -> None:
    """One layer's parts."""
    title = "Latency of training one layer"
    for found in section(document, title, result, "layer_latency.py"):
        document.text(
            "One layer in bfloat16, batch 1, causal, forward and backward pass, ms. Parts are timed apart; total is "
            "the whole layer in one piece, so that it is not their exact sum. Peak is of both passes beyond weights "
            "and inputs, gradients included."
        )
        lines: list[list[Cell]] = []
        items = []
        for shape in dict.fromkeys(row["shape"] for row in found["rows"]):
            rows = [row for row in found["rows"] if row["shape"] == shape]
            shared = {row["part"]: row["ms"] for row in rows if row["method"] == "all"}
            totals = {row["method"]: row for row in rows if row["part"] == "total"}
            for method, total in totals.items():
                attention = pick(rows, method=method, part="attention")
                assert attention is not None
                lines.append([
                    f"{shape}, {method}", shared["ffn"], attention["ms"], shared["projections"], shared["others"],
                    total["ms"], attention["extra_bytes"] / 2**20, total["extra_bytes"] / 2**20,
                ])  # fmt: skip
            if {"sdpa_flash", "sagebwd_int8"} <= totals.keys():
                flash, ours = totals["sdpa_flash"]["ms"], totals["sagebwd_int8"]["ms"]
                theirs = published.LAYER.get(shape)
                text = f"{shape}: the layer takes {ours / flash - 1:+.1%} against FlashAttention 2"
                if "sdpa_cudnn" in totals:
                    text += f" and {ours / totals['sdpa_cudnn']['ms'] - 1:+.1%} against cuDNN"
                items.append(
                    text + (f"; the authors report {theirs:+.1%} against FlashAttention 2." if theirs else ".")
                )
        header = ["", "FFN", "attention", "projections", "others", "total", "attention: peak MiB", "total: peak MiB"]
        document.table(header, lines)
        document.items(items)
        document.text(
            "In the authors' table the projections take 3.7 times as long as the FFN, though the FFN has about four "
            "times their operations, and as long as attention; how the parts were timed is not told."
        )


def ablation(document: Document, result: Result | None) -> None:
    """Gradients."""
    title = "Which matmul costs how much accuracy"
    for found in section(document, title, result, "training_gradients.py --device cuda"):
        rows = found["rows"]
        shapes = list(dict.fromkeys(row["shape"] for row in rows))
        document.text(
            "Relative L1 / cosine against exact float32 gradients over all layers. Matmuls: qk (S = Q K^T), pv (P V), "
            "dp (dO V^T), dv (P^T dO), dq (dS K), dk (dS^T Q). `int8` and `fp8` leave dp alone in 16 bit. Computed by "
            "the reference that defines what the kernels compute: `int8` and `fp8` are the Triton kernels' recipes. "
            "The CUDA kernels for Hopper GPUs keep dv, dq and dk in 16 bits as well: the row "
            "`int8, as in CUDA on Hopper GPUs`, where it is measured."
        )
        document.items([f"{MODELS[shape]}: {source(found['measured'][shape])}" for shape in shapes])
        document.text("INT8 against FP8, all layers, L1 / cosine:")
        lines: list[list[Cell]] = []
        for number in ("int8", "fp8"):
            lines.append([f"{number}, authors (CogVideoX-2B)", None, *published.GRADIENTS[number]])
            lines += [[f"{number}, {MODELS[shape]}", *cells(rows, shape, number)] for shape in shapes]
        document.table(["", *TENSORS.values()], lines)
        document.items(format_verdicts(rows, shapes))
        document.text("Table 2 of the reviews, INT8: every backward matmul quantised but one; L1 of the gradient.")
        document.table(
            ["not quantised", "authors: dQ", "dK", "dV"]
            + [f"{MODELS[shape]}: {name}" for shape in shapes for name in ("dQ", "dK", "dV")],
            [
                [label, *published.ALL_BUT_ONE[label]]
                + [f"{row['rel_l1']:.4f}" if (row := pick(rows, shape=shape, method=method, tensor=tensor)) else None
                   for shape in shapes for tensor in ("dq", "dk", "dv")]
                for label, method in published.ALL_BUT_ONE_METHODS.items()
            ],
        )  # fmt: skip
        document.items(exact_dp_verdicts(rows, shapes))
        document.text("All rows, L1 / cosine:")
        methods = dict.fromkeys(row["method"] for row in rows)
        header = ["", *(f"{MODELS[shape]}: {name}" for shape in shapes for name in TENSORS.values())]
        document.table(header, [[method, *(c for s in shapes for c in cells(rows, s, method))] for method in methods])


def format_verdicts(rows: Sequence[Result], shapes: Sequence[str]) -> list[str]:
    """INT8 against FP8 and against the authors, and what smoothing K brings."""
    items = []
    for shape in shapes:
        found = {
            (method, tensor): row["rel_l1"]
            for method in ("int8", "fp8", "int8, K not smoothed")
            for tensor in ("dq", "dk", "dv")
            if (row := pick(rows, shape=shape, method=method, tensor=tensor))
        }
        worse = [TENSORS[t] for t in ("dq", "dk", "dv") if found["int8", t] >= found["fp8", t]]
        text = "INT8's gradients are nearer than FP8's" if not worse else f"FP8 is nearer in {', '.join(worse)}"
        over = [
            f"{TENSORS[t]} {found['int8', t]:.4f} (theirs {published.GOALS[t]})"
            for t in ("dq", "dk", "dv")
            if found["int8", t] > published.GOALS[t]
        ]
        text += f"; over the authors' L1: {', '.join(over)}" if over else "; all within the authors' L1"
        smoothing = found["int8, K not smoothed", "dq"] / found["int8", "dq"]
        items.append(f"{MODELS[shape]}: {text}. Without smoothing K, INT8's dQ has {smoothing:.2f} x the L1.")
    return items


def exact_dp_verdicts(rows: Sequence[Result], shapes: Sequence[str]) -> list[str]:
    """Whether dO V^T in 16 bit matters most, as the authors say."""
    items = []
    for shape in shapes:
        ratios = {
            tensor: every["rel_l1"] / one["rel_l1"]
            for tensor in ("dq", "dk")
            if (every := pick(rows, shape=shape, method="int8, every matmul", tensor=tensor))
            and (one := pick(rows, shape=shape, method="int8", tensor=tensor))
        }
        best = {
            tensor: min(
                ("dp", "dq", "dk"),
                key=lambda name, tensor=tensor: (
                    pick(rows, shape=shape, method=f"int8, every matmul but {name}", tensor=tensor) or {}
                ).get("rel_l1", math.inf),
            )
            for tensor in ("dq", "dk")
        }
        confirmed = all(name == "dp" for name in best.values())
        items.append(
            f"{MODELS[shape]}: quantising dO V^T too multiplies L1 of dQ by {ratios['dq']:.2f} and of dK by "
            f"{ratios['dk']:.2f}. "
            + ("Keeping it in 16 bit helps more than keeping any other backward matmul, as the authors say."
               if confirmed else
               f"The matmul best kept in 16 bit is {best['dq']} for dQ and {best['dk']} for dK; the authors say dp.")
        )  # fmt: skip
    return items


def fine_tuning(document: Document, result: Result | None) -> None:
    """Does INT8 help FP4?"""
    title = "Does INT8 fine-tuning help FP4 inference?"
    for found in section(document, title, result, "fine_tuning.py"):
        document.text(
            "The authors fine-tuned Qwen2.5-1.5B for 1,000 steps and evaluated with FP4 attention: GSM8K 0.4912 after "
            "BF16, 0.5232 after INT8, 0.5031 after FP8; one run each. Here a byte-level model of 14 million "
            "parameters, pretrained by us on prose, is fine-tuned on source code for 1,000 steps, several seeds, the "
            "same batches for every method. Loss in nats a byte on code it never saw; smaller is better."
        )
        rows = found["rows"]
        methods = [m for m in ("start", "bf16", "int8", "fp8") if any(row["method"] == m for row in rows)]
        evaluations = list(dict.fromkeys(row["evaluated_with"] for row in rows))
        lines: list[list[Cell]] = []
        for method in methods:
            line: list[Cell] = ["before fine-tuning" if method == "start" else f"{method} fine-tuning"]
            for name in evaluations:
                losses = list(by_seed(rows, method, name).values())
                spread = f" ± {statistics.stdev(losses):.5f}" if len(losses) > 1 else ""
                mean = statistics.fmean(losses)
                line.append(f"{mean:.5f}{spread} (ppl {math.exp(mean):.4f})")
            lines.append([*line, len(by_seed(rows, method, evaluations[0]))])
        labels = {"bf16": "16-bit inference", "fp4": "FP4, ours", "fp4_published": "FP4 as published"}
        document.table(["mean ± standard deviation", *(labels[x] for x in evaluations), "seeds"], lines)
        document.text("Paired by seed, in thousandths of a nat: mean difference and its 95 % interval (Student's t).")
        lines = []
        verdicts = []
        for left, right in (("int8", "bf16"), ("fp8", "bf16"), ("int8", "fp8")):
            cells_: list[Cell] = [f"{left} less {right} fine-tuning"]
            for name in evaluations:
                differences = paired(by_seed(rows, left, name), by_seed(rows, right, name))
                cells_.append(interval_text(differences))
                if name.startswith("fp4") and left == "int8":
                    verdicts.append(f"{labels[name]}, {left} against {right}: {verdict(differences)}")
            lines.append(cells_)
        for method in methods[1:]:
            line = [f"what FP4 costs after {method} fine-tuning"]
            for name in evaluations:
                costs = paired(by_seed(rows, method, name), by_seed(rows, method, "bf16"))
                line.append(None if name == "bf16" else interval_text(costs))
            lines.append(line)
        extra: list[Cell] = ["FP4's cost after int8 less after bf16"]
        for name in evaluations:
            costs = [paired(by_seed(rows, method, name), by_seed(rows, method, "bf16")) for method in ("int8", "bf16")]
            difference = [left - right for left, right in zip(*costs, strict=True)]
            extra.append(None if name == "bf16" else interval_text(difference))
        lines.append(extra)
        document.table(["1e-3 nats a byte", *(labels[x] for x in evaluations)], lines)
        document.items(verdicts)
        document.text(
            "The last line is the claim in the narrow sense, that INT8 fine-tuning makes FP4 itself cost less; a "
            "difference that 16-bit inference shows too comes from training alone. "
            "FP4 attention is computed by the quantised reference; no GPU with FP4 tensor cores was at hand. A model "
            "of this size loses little by FP4, so that what training could save is little as well: this neither "
            "repeats nor excludes the authors' figures on a model a hundred times larger, whose one run each says "
            "nothing of the spread between seeds."
        )


def by_seed(rows: Sequence[Result], method: str, evaluated_with: str) -> dict[int, float]:
    """Loss of each seed."""
    return {
        row["seed"]: row["nats_per_byte"]
        for row in rows
        if (row["method"], row["evaluated_with"]) == (method, evaluated_with)
    }


def paired(left: dict[int, float], right: dict[int, float]) -> list[float]:
    """Differences of the seeds that both have."""
    return [left[seed] - right[seed] for seed in left if seed in right]


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval; infinite for one value."""
    if len(differences) < 2:
        return statistics.fmean(differences) if differences else math.nan, math.inf
    student = STUDENT.get(len(differences) - 1, 2.2)
    return statistics.fmean(differences), student * statistics.stdev(differences) / len(differences) ** 0.5


def interval_text(differences: Sequence[float]) -> str:
    """Thousandths."""
    mean, half = interval(differences)
    return f"{mean * 1e3:+.3f} ± {half * 1e3:.3f}"


def verdict(differences: Sequence[float]) -> str:
    """Whether the first method is better."""
    mean, half = interval(differences)
    if mean + half < 0:
        return f"confirmed; INT8 gives a smaller loss, by {-mean * 1e3:.3f} thousandths of a nat ({-mean:.3%} of ppl)."
    if mean - half > 0:
        return f"refuted; INT8 gives a larger loss, by {mean * 1e3:.3f} thousandths of a nat."
    return (
        f"not confirmed; the difference ({mean * 1e3:+.3f} thousandths of a nat) is within the spread of "
        f"{len(differences)} seeds (± {half * 1e3:.3f})."
    )


def pretraining(document: Document, result: Result | None, report: Path) -> None:
    """Loss curves."""
    for found in section(document, "Pretraining with and without QK-norm", result, "pretraining.py"):
        rows, width = found["rows"], found["curve_steps"]
        document.table(
            ["", "steps", "loss of the last 100 steps", "held-out loss", "steps not finite", "largest gradient norm"],
            [
                [name(row), row["steps"], f"{row['final_loss']:.4f}", f"{row['held_out_loss']:.4f}", row["non_finite"],
                 round(row["largest_gradient_norm"], 2)]
                for row in rows
            ],
        )  # fmt: skip
        curves = {name(row): ([(i + 0.5) * width for i in range(len(row["losses"]))], row["losses"]) for row in rows}
        plots.curves(
            report / "pretraining.png", curves, "Pretraining a byte-level language model", "step", "nats a byte"
        )
        document.image("pretraining.png", "Loss curves of BF16 and INT8 attention, with and without QK-norm")
        for qk_norm in (True, False):
            pair = {row["method"]: row for row in rows if row["qk_norm"] == qk_norm}
            if {"bf16", "int8"} <= pair.keys():
                gap = pair["int8"]["held_out_loss"] - pair["bf16"]["held_out_loss"]
                share = gap / pair["bf16"]["held_out_loss"]
                document.text(
                    f"{'With' if qk_norm else 'Without'} QK-norm, INT8's held-out loss is {gap:+.4f} nats a byte "
                    f"({share:+.2%}) from BF16's after {pair['int8']['steps']:,} steps, one seed each."
                )
        broken = sum(row["non_finite"] for row in rows)
        document.text(
            f"Steps with a loss or gradient norm that is not finite: {broken}. The authors found slower convergence in "
            "pretraining, on larger models and longer runs than these."
        )


def name(row: Result) -> str:
    """Of a curve."""
    return f"{row['method'].upper()}, {'with' if row['qk_norm'] else 'without'} QK-norm"


def lora(document: Document, result: Result | None, report: Path) -> None:
    """The example's two runs."""
    title = "LoRA of the demo video model through diffusers and peft"
    for found in section(document, title, result, "lora.py"):
        rows, width = found["rows"], 10
        document.text(
            "The example `sage_kernels/examples/lora_fine_tuning.py`: the demo model learns dark digits on a bright "
            "ground. Same clips and same start for both attentions."
        )
        document.table(
            ["", "trained parameters", "steps", "held-out loss before", "after", "seconds"],
            [[row["method"], row["trained_parameters"], len(row["losses"]), f"{row['held_out_before']:.4f}",
              f"{row['held_out_after']:.4f}", round(row["seconds"], 1)] for row in rows],
        )  # fmt: skip
        curves = {}
        for row in rows:
            points = [row["losses"][i : i + width] for i in range(0, len(row["losses"]) // width * width, width)]
            curves[row["method"].upper()] = (
                [(i + 0.5) * width for i in range(len(points))],
                [statistics.fmean(x) for x in points],
            )
        plots.curves(report / "lora.png", curves, "LoRA of the demo video model", "step", "flow matching loss")
        document.image("lora.png", "Loss of LoRA with BF16 and INT8 attention")
        document.items([f"{row['method']}, attention calls: {row['coverage']}." for row in rows])


def pick(rows: Sequence[Result], **wanted: Any) -> Result | None:
    """The first row with these values."""
    return next((row for row in rows if all(row[key] == value for key, value in wanted.items())), None)


def cells(rows: Sequence[Result], shape: str, method: str) -> list[Cell]:
    """L1 / cosine of the output and the gradients."""
    found = [pick(rows, shape=shape, method=method, tensor=tensor) for tensor in TENSORS]
    return [f"{row['rel_l1']:.4f} / {row['cosine']:.5f}" if row else None for row in found]
