"""The report from the result files."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paper_study import chips, plots, published
from paper_study.document import Document, source
from paper_study.model_sections import caches, drift, end_to_end, trade_off
from paper_study.verdicts import VERDICTS

Rows = list[dict[str, Any]]
MAIN_SET = "trained_model"
SETS = (MAIN_SET, "sentence_model", "biased", "sharp")
# Why our figures stand elsewhere than the paper's, where they do.
REASONS = {
    "smoothing": (
        "The models differ in what smoothing has to remove. The demo model normalises Q and K before attention and its "
        "heads share little bias, so that without smoothing it loses a fraction of what CogVideoX-2B loses, the mean "
        "of K holds little, and what is left is channels of different size, which a rotation evens out. The synthetic "
        "biased set has what the paper's model has, and there the paper's order holds but for Hadamard's place."
    ),
    "precisions": (
        "P in INT8 has the fixed scale 1 / 127 here, so that weights below 1 / 254 of a row's largest vanish; the "
        "paper's text does not say how it scales P. Q and K in INT8 have a scale for each query row, finer than blocks."
    ),
}


def write_report(results: Path, report: Path) -> None:
    """REPORT.md, report.html and pictures in `report` from the JSON files in `results`."""
    paper = read(results / "paper.json")
    if paper is None:
        raise SystemExit(f"no {results / 'paper.json'}; run paper.py without --render first")
    report.mkdir(parents=True, exist_ok=True)
    document = Document("SageAttention3's tables, ours beside them")
    introduction(document, paper, read(results / "paper_short_seconds.json"))
    rows: Rows = paper["rows"]
    accuracy(document, rows, "smoothing", published.SMOOTHING, "Smoothing, everything in FP4")
    accuracy(document, rows, "precisions", published.PRECISIONS, "Precision of Q K and of P V")
    two_level(document, rows)
    drift(document, paper["drift"], report)
    trade_off(document, rows, read(results / "attention.json"), predicted_tops(results), report)
    theoretical(document)
    memory(document, read(results / "attention.json"))
    caches(document, rows, read(results / "kv_decode.json"), report)
    ideas(document, rows, report)
    end_to_end(document, read(results / "end_to_end.json"))
    document.heading("Where each table of the reviews is")
    document.table(["reviewer, table", "what it shows", "here"], published.REVIEW_TABLES)
    document.write(report)
    print(f"wrote {report / 'REPORT.md'} and {report / 'report.html'}")


def read(path: Path) -> dict[str, Any] | None:
    """A result file, or None where there is none."""
    found: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return found


def predicted_tops(results: Path) -> float | None:
    """What the cost model of the FP4 kernel's machine code predicts for an RTX 5090, or None without its file."""
    path = results / "fp4_sass_budget.txt"
    found = re.search(r"public kernel's overlap: .* = (\d+) of", path.read_text() if path.exists() else "")
    return float(found[1]) if found else None


def introduction(document: Document, paper: dict[str, Any], short: dict[str, Any] | None) -> None:
    """Where the numbers come from."""
    document.text(
        "Cosine, relative L1 (sum of differences over sum of magnitudes) and relative RMSE are those of attention "
        "outputs against exact attention, means over layers and inputs. The paper's are of all layers of CogVideoX-2B, "
        "ours of the tensors below. Difference is our L1 on the trained model less the paper's. The paper's RMSE is "
        "absolute and depends on the model's units; ours is relative to the output's own root mean square."
    )
    document.items(
        [f"`{x['name']}`: {x['what']}; {x['rows']} query rows of each. {source(x['measured'])}" for x in paper["sets"]]
    )
    again = "Again: `python sage_kernels/benchmarks/paper.py`, and `--render` for the report alone."
    if short:
        again += f" `--short --results DIR`, a sample of everything, took {short['seconds']:.0f} s on a CPU "
        again += f"({short['machine']})."
    document.text(again)


def find(rows: Rows, table: str, method: str, name: str) -> dict[str, Any] | None:
    """One row."""
    return next((x for x in rows if (x["table"], x["method"], x["set"]) == (table, method, name)), None)


def names_of(rows: Rows, table: str) -> list[str]:
    """Methods of a table in order."""
    return list(dict.fromkeys(x["method"] for x in rows if x["table"] == table))


def sets_of(rows: Rows) -> list[str]:
    """Sets that were measured, in the report's order."""
    return [name for name in SETS if any(x["set"] == name for x in rows)]


def accuracy(
    document: Document, rows: Rows, table: str, figures: dict[str, tuple[float, float, float]], title: str
) -> None:
    """A table of cosine and L1 with the paper's figures, and sentences where they disagree."""
    sets = sets_of(rows)
    document.heading(title)
    header = ["", "paper: cosine", "paper: L1", "paper: RMSE"]
    header += [f"{name}: {measure}" for name in sets for measure in ("cosine", "L1", "rel. RMSE")] + ["difference"]
    lines = []
    for method in names_of(rows, table):
        line: list[Any] = [method, *figures.get(method, (None, None, None))]
        for name in sets:
            found = find(rows, table, method, name)
            line += [None, None, None] if found is None else [
                f"{found['cosine']:.5f}", f"{found['rel_l1']:.4f}", f"{found['relative_rmse']:.4f}"
            ]  # fmt: skip
        ours = find(rows, table, method, MAIN_SET)
        line.append(f"{ours['rel_l1'] - figures[method][1]:+.4f}" if ours and method in figures else None)
        lines.append(line)
    document.table(header, lines)
    sentences = disagreements(rows, table, figures)
    if sentences:
        document.items(sentences)
        document.text(REASONS[table])


def disagreements(rows: Rows, table: str, figures: dict[str, tuple[float, float, float]]) -> list[str]:
    """A sentence for each figure that is off by more than half, and for each pair of rows in another order."""
    ours = {method: find(rows, table, method, MAIN_SET) for method in figures}
    errors = {method: row["rel_l1"] for method, row in ours.items() if row is not None}
    sentences = []
    for method, error in errors.items():
        ratio = error / figures[method][1]
        if not 2 / 3 <= ratio <= 1.5:
            sentences.append(
                f"{method}: L1 is {error:.4f} here and {figures[method][1]:.4f} in the paper ({ratio:.2f} x)."
            )
    names = list(errors)
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            paper_order = figures[first][1] - figures[second][1]
            if paper_order * (errors[first] - errors[second]) < 0 and abs(paper_order) > 0.05 * figures[first][1]:
                better, worse = (first, second) if errors[first] < errors[second] else (second, first)
                sentences.append(
                    f"Here {better} is more accurate than {worse}; in the paper it is the other way round."
                )
    return sentences


def two_level(document: Document, rows: Rows) -> None:
    """Direct against two-level quantisation of P."""
    sets = sets_of(rows)
    document.heading("Two-level against direct quantisation of P")
    document.text(
        "The paper stretches each row of P to 448 x 6 so that its group scales use all of E4M3. It gives no figures in "
        "its reviews; the last row leaves three powers of two of headroom, so that O need not be rescaled at every "
        "step."
    )
    lines: list[list[Any]] = []
    for method in names_of(rows, "two_level"):
        found = [find(rows, "two_level", method, name) for name in sets]
        lines.append([method, *(f"{x['cosine']:.5f} / {x['rel_l1']:.4f}" if x else None for x in found)])
    document.table(["cosine / L1", *sets], lines)
    direct, stretched = (
        find(rows, "two_level", method, MAIN_SET) for method in ("direct, smooth V", "two-level, smooth V")
    )
    if direct and stretched:
        change = 1 - stretched["rel_l1"] / direct["rel_l1"]
        document.text(
            f"On the trained model the second level changes L1 by {-change:+.1%}. Weights near a row's maximum have "
            "scales that E4M3 holds well either way; what the stretch saves are the groups far below it, which count "
            "for little in L1."
        )


def theoretical(document: Document) -> None:
    """TOPS by chip."""
    document.heading("Theoretical TOPS by chip")
    names = {"16 bit (FlashAttention3)": "16 bit", "FP8 (FlashAttention3)": "FP8", "FP4 (SageAttention3)": "FP4"}
    lines = []
    for label, operand in names.items():
        ours = chips.peak(operand)
        figures = published.THEORETICAL[label]
        pairs = [(figure, ours[chip]) for figure, chip in zip(figures, ("B300", "B200", "RTX 5090"), strict=True)]
        lines.append([label, *(cell for pair in pairs for cell in pair), ours["H100"]])
    header = ["", "B300: paper", "ours", "B200: paper", "ours", "RTX 5090: paper", "ours", "H100: ours"]
    document.table(header, lines)
    document.text(
        "Dense, float32 accumulation. RTX 5090 and H100 are processors times clock times operations a cycle; B200 and "
        "B300 are NVIDIA's figures for the GB200 and GB300 boards, which are also the paper's. The air-cooled B200 "
        "has a "
        "tenth less. None of it is a measurement, and no Blackwell GPU was at hand."
    )


def memory(document: Document, attention: dict[str, Any] | None) -> None:
    """Footprint of long sequences."""
    document.heading("Memory for long sequences")
    shapes = {"Wan 720p, 75,600 tokens, 40 heads of 128": (40, 75600, 128), "32,768 tokens, 32 heads": (32, 32768, 128),
              "131,072 tokens, 24 heads": (24, 131072, 128)}  # fmt: skip
    columns = [chips.attention_gigabytes(*shape) for shape in shapes.values()]
    document.table(["GB", *shapes], [[name, *(column[name] for column in columns)] for name in columns[0]])
    document.text(
        "The paper says that SageAttention3 takes what FlashAttention takes. That leaves out what its public kernel "
        "allocates for smoothing Q, delta_s as a float32 matrix of N / 128 by N for each head and a temporary copy "
        "of half "
        "its size, which at video lengths is several times Q, K and V. Ours has no such matrix: delta_s comes from FP4 "
        "means and two FP4 digits of K inside the kernel."
    )
    caches_ = chips.cache_gigabytes(8, 131072, 128, 32)
    document.table(
        ["Decoding, 131,072 tokens, 8 key heads of 128, 32 layers", "GB", "less than bf16"],
        [[name, size, f"{1 - size / caches_['bf16']:.1%}"] for name, size in caches_.items()],
    )
    document.text("The paper's 75 % counts the 4-bit codes; a group of 16 also has a scale of 8 bits.")
    extra = [x for x in (attention or {"rows": []})["rows"] if x.get("extra_bytes") and x["benchmark"] == "whole_call"]
    if extra:
        found = [[f"{x['shape']}, {x['method']}", x["extra_bytes"] / 2**20] for x in extra]
        document.text(f"Measured beyond inputs and output (MiB). {source(attention or {})}")
        document.table(["whole call", "MiB"], found)


def ideas(document: Document, rows: Rows, report: Path) -> None:
    """Numerics beyond the paper: errors, costs, verdicts."""
    sets = sets_of(rows)
    document.heading("Better numerics at the same bits")
    document.text("L1 as a multiple of SageAttention3's as published. Lines with + build on the line before.")
    base = {name: find(rows, "ideas", "SageAttention3 as published", name) for name in sets}
    lines: list[list[Any]] = []
    groups: dict[str, dict[str, float]] = {}
    for method in names_of(rows, "ideas"):
        found = {name: find(rows, "ideas", method, name) for name in sets}
        ratios = {name: ratio(found[name], base[name]) for name in sets}
        groups[method] = {name: value for name, value in ratios.items() if value is not None}
        cost, verdict = VERDICTS.get(method, ("", ""))
        lines.append([method, *(None if x is None else f"{x:.3f}" for x in ratios.values()), cost, verdict])
    absolute = [f"{row['rel_l1']:.4f}" if row else None for row in base.values()]
    lines.insert(0, ["SageAttention3 as published: L1 itself", *absolute, "", ""])
    document.table(["", *sets, "cost on sm_120", "verdict"], lines)
    plots.bars(report / "ideas.png", groups, "L1 relative to SageAttention3 as published", "ratio")
    document.image("ideas.png", "L1 of each idea relative to SageAttention3")
    goal(document, rows, sets)


def ratio(row: dict[str, Any] | None, base: dict[str, Any] | None) -> float | None:
    """L1 over that of the base."""
    return None if row is None or base is None else row["rel_l1"] / base["rel_l1"]


def goal(document: Document, rows: Rows, sets: Sequence[str]) -> None:
    """The goal of 0.75, said as it stands."""
    used = [name for name in sets if name != "sentence_model"]
    parts = {
        label: [
            ratio(find(rows, "ideas", method, name), find(rows, "ideas", "SageAttention3 as published", name))
            for name in used
        ]
        for label, method in (("fp4", "+ four over six for K, V = ours (fp4)"), ("fp8_fp4", "fp8_fp4 (Q, K in MXFP8)"))
    }
    sentences = []
    for label, ratios in parts.items():
        known = [x for x in ratios if x is not None]
        mean = sum(known) / max(1, len(known))
        single = ", ".join(f"{name} {value:.3f}" for name, value in zip(used, known, strict=False))
        word = "reached" if mean <= 0.75 else "missed"
        sentences.append(f"{label}: {single}; mean {mean:.3f}, so the goal of 0.75 is {word}.")
    document.items(sentences)
