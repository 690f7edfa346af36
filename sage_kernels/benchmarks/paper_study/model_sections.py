"""Sections on models, speed and caches."""

from pathlib import Path
from typing import Any

from paper_study import plots, published
from paper_study.document import Document, source

Rows = list[dict[str, Any]]
# Rows of the trade-off and the methods of results/attention.json that are their speed on the GPU at hand.
MEASURED = {
    "FlashAttention2": "sdpa_flash",
    "FlashAttention3 (16bit)": "sdpa_cudnn",
    "SageAttention1": "sageattention_1.0.6",
    "ours: int8_fp16": "int8_fp16",
    "ours: int8": "int8",
}


def drift(document: Document, rows: Rows, report: Path) -> None:
    """Accumulated errors by layer."""
    document.heading("Accumulated error by layer")
    document.text(
        "L1 of the hidden state behind each layer against the 16-bit run on the same input; with all attention "
        "quantised, and with the layers of the largest growth in 16 bit. The paper's model has 30 layers and keeps "
        "three; ours have five and six."
    )
    figures = published.DRIFT
    document.table(
        ["SageAttention3, paper (CogVideoX-2B)", *(f"layer {layer}" for layer in figures)],
        [
            ["directly", *(x[0] for x in figures.values())],
            ["3 most sensitive in FP16", *(x[1] for x in figures.values())],
        ],
    )
    for name in dict.fromkeys(row["set"] for row in rows):
        found = [row for row in rows if row["set"] == name]
        layers = range(1, len(found[0]["rel_l1"]) + 1)
        lines = [[f"{x['method']}, {label(x)}", *(f"{value:.4f}" for value in x["rel_l1"])] for x in found]
        document.table([name, *(f"layer {layer}" for layer in layers)], lines)
        series = {f"{x['method']}, {label(x)}": (list(layers), x["rel_l1"]) for x in found}
        plots.lines(report / f"drift_{name}.png", series, f"Accumulated error, {name}", "layer", "relative L1")
        document.image(f"drift_{name}.png", f"Accumulated error of {name}")
        document.items(list(drift_sentences(found)))


def label(row: dict[str, Any]) -> str:
    """Which layers are in 16 bit."""
    kept = ", ".join(str(layer + 1) for layer in row["kept"])
    return f"layers {kept} in 16 bit" if row["kept"] else "all quantised"


def drift_sentences(rows: Rows) -> list[str]:
    """What keeping layers gains behind the last one, beside the paper's gain at layer 20."""
    sentences = []
    for method in dict.fromkeys(row["method"] for row in rows):
        direct, *others = (row for row in rows if row["method"] == method)
        last = direct["rel_l1"][-1]
        falls = ", ".join(
            f"to {row['rel_l1'][-1]:.4f} ({row['rel_l1'][-1] / last:.2f} x) with {len(row['kept'])} kept"
            for row in others
        )
        sentences.append(
            f"{method}: behind the last of {len(direct['rel_l1'])} layers {last:.4f} falls {falls}; the paper's 0.1146 "
            "at layer 20 of 30 falls to 0.0773 (0.67 x) with 3 kept."
        )
    return sentences


def trade_off(
    document: Document, rows: Rows, attention: dict[str, Any] | None, predicted: float | None, report: Path
) -> None:
    """Speed against accuracy; `predicted` is the FP4 kernel's TOPS on an RTX 5090 after the cost model."""
    document.heading("Speed against accuracy")
    speeds = largest_speeds(attention)
    lines: list[list[Any]] = []
    on_h100: dict[str, tuple[float, float]] = {}
    on_5090: dict[str, tuple[float, float]] = {}
    for method in dict.fromkeys(x["method"] for x in rows if x["table"] == "trade_off"):
        tops_5090, tops_h100, accuracy = published.TRADE_OFF.get(method, (None, None, None))
        found = next(
            (x for x in rows if (x["table"], x["method"], x["set"]) == ("trade_off", method, "trained_model")), None
        )
        cosine = found["cosine"] * 100 if found else None
        ours = speeds.get(MEASURED.get(method, ""))
        prediction = predicted if method == "ours: fp4" else None
        difference = f"{cosine - accuracy:+.3f}" if cosine is not None and accuracy is not None else None
        cell = f"{cosine:.3f}" if cosine is not None else None
        lines.append([method, accuracy, cell, difference, tops_5090, prediction, tops_h100, ours])
        if not found:
            continue
        error = max(1 - found["cosine"], 1e-7)
        name = "cuDNN, 16 bit" if ours and MEASURED.get(method) == "sdpa_cudnn" else method
        for points, speed, kind in (
            (on_h100, ours, "measured"),
            (on_h100, tops_h100 if ours is None else None, "published"),
            (on_5090, tops_5090, "published"),
            (on_5090, prediction, "predicted"),
        ):
            if speed:
                points[f"{name} ({kind})"] = (speed, error)
    header = ["", "paper: accuracy %", "ours: cosine %", "difference", "RTX 5090, published TOPS",
              "RTX 5090, predicted TOPS", "H100, published TOPS", "H100, measured here, TFLOP/s"]  # fmt: skip
    document.table(header, lines)
    if attention is None:
        document.text(
            "No speeds of ours: `results/attention.json` is missing; `python sage_kernels/benchmarks/attention.py` "
            "on a GPU writes it."
        )
    else:
        document.text(
            "Measured here: the best of the shapes of head_dim 128 without a mask, whole calls with quantisation; "
            "FlashAttention3's line has cuDNN's kernel, which is what torch has in its place. " + source(attention)
        )
    document.text(
        "FP4 has no measured speed of ours: no GPU with FP4 tensor cores was at hand. Its prediction is arithmetic on "
        "the kernel's machine code, `results/fp4_sass_budget.txt`, which gives the public kernel its published 1038. "
        "FlashAttention-3's FP8 is taken with one scale a head and without its rotation."
    )
    for chip, file, points in (("an H100", "trade_off.png", on_h100), ("an RTX 5090", "trade_off_5090.png", on_5090)):
        plots.scatter(report / file, points, f"Speed on {chip} against error", "TFLOP/s", "1 - cosine, trained model")
        document.image(file, f"Speed on {chip} against error")


def largest_speeds(attention: dict[str, Any] | None) -> dict[str, float]:
    """Best TFLOP/s of each method over the unmasked shapes of head_dim 128."""
    best: dict[str, float] = {}
    for row in (attention or {"rows": []})["rows"]:
        if row["benchmark"] == "whole_call" and row["shape"] in ("flux", "wan480p", "wan720p", "hunyuan"):
            best[row["method"]] = round(max(best.get(row["method"], 0.0), row["tflops"]), 0)
    return best


def caches(document: Document, rows: Rows, decode: dict[str, Any] | None, report: Path) -> None:
    """4-bit caches: quality of all, speed of ours."""
    document.heading("4-bit caches of keys and values")
    document.text(
        "QServe, Atom and QuaRot quantise K and V to INT4 with a scale and zero point for each token and head and "
        "compute "
        "attention in 16 bit; they are reference implementations after their papers, without their weight "
        "quantisation. Ours stores NVFP4 with the mean of the first tokens subtracted and the better of two scales."
    )
    found = [x for x in rows if x["table"] == "caches"]
    sets = list(dict.fromkeys(x["set"] for x in found))
    lines: list[list[Any]] = []
    for method in dict.fromkeys(x["method"] for x in found):
        figures = published.CACHES.get(method, (None, None))
        cells = [next((x for x in found if (x["method"], x["set"]) == (method, name)), None) for name in sets]
        lines.append([method, *figures, *(f"{x['cosine']:.5f} / {x['rel_l1']:.4f}" if x else None for x in cells)])
    document.table(["", "paper: wikitext PPL", "paper: LAMBADA", *(f"{name}: cosine / L1" for name in sets)], lines)
    document.text(
        "The paper finds SageAttention3 more accurate than either cache on a language model, though it also quantises "
        "Q and P. On both models here the caches err less than SageAttention3, as 16-bit Q and P would have it; on the "
        "synthetic sets, whose K has shared biases and outliers, smoothing outweighs that and the paper's order holds. "
        "Our cache errs less than QServe's and Atom's on the trained model and the biased set and more on the sentence "
        "model, whose heads of 32 give INT4 a scale for every 32 numbers (5 bits a number), and on the sharp set."
    )
    if decode is None:
        document.text("Decoding speed: `results/kv_decode.json` is missing; `kv_decode.py` on a GPU writes it.")
        return
    document.text(
        f"Decoding one token, 32 query heads on 8 key heads of 128. {source(decode)} The floor is bytes over the "
        f"bandwidth of reading, {decode['read_bytes_per_second'] / 1e12:.2f} TB/s (a copy moves "
        f"{decode['copy_bytes_per_second'] / 1e12:.2f} TB/s)."
    )
    shapes = list(dict.fromkeys(x["shape"] for x in decode["rows"]))
    lines = []
    for shape in shapes:
        here = {x["method"]: x for x in decode["rows"] if x["shape"] == shape}
        ours = here["fp4_cache_16"]
        best = min((x for name, x in here.items() if name.startswith("sdpa")), key=lambda x: x["ms"])
        called = min(x["call_ms"] for name, x in here.items() if name.startswith("sdpa"))
        lines.append([shape, ours["ms"] * 1000, f"{ours['share_of_floor']:.0%}", best["ms"] * 1000, best["method"],
                      f"{best['ms'] / ours['ms']:.2f}", ours["call_ms"] * 1000, called * 1000,
                      here["append_one"]["ms"] * 1000, here["append_all"]["ms"] * 1000])  # fmt: skip
    header = [
        "batch x keys",
        "ours, us",
        "of the floor",
        "best of torch (bf16), us",
        "which",
        "speed-up",
        "ours called from Python, us",
        "torch called from Python, us",
        "append one token, us",
        "append all keys, us",
    ]
    document.table(header, lines)
    document.text(
        "The paper gives 4 x as the theoretical speed-up of a 4-bit cache; with its scales bytes allow 3.56 x. The "
        "kernel unpacks codes in the registers of the lane that multiplies them, at some 3 instructions a number and "
        "lane, so that large caches are read at most of the bandwidth; small ones wait for latencies, not for bytes."
    )


def end_to_end(document: Document, result: dict[str, Any] | None) -> None:
    """What a user loses."""
    document.heading("End to end: videos of the demo model")
    if result is None:
        document.text("`results/end_to_end.json` is missing; `end_to_end.py` on a GPU writes it.")
        return
    document.text(
        f"{result['clips']} clips of {result['steps']} steps a method: every digit in every direction. The digit is "
        "read "
        "by a classifier trained on real digits, the direction by the digit's path; PSNR, SSIM and L1 against the "
        "16-bit "
        f"clips. {source(result)}"
    )
    lines = []
    for row in result["rows"]:
        compared = row["method"] not in ("real_clips", "fp16")
        lines.append([
            row["method"], f"{row['digit_accuracy_clip']:.1%}", f"{row['direction_accuracy']:.1%}",
            f"{row['speed_error_px_per_frame']:.3f}", f"{row['psnr']:.2f}" if compared else None,
            f"{row['ssim']:.4f}" if compared else None, f"{row['l1']:.4f}" if compared else None,
            row.get("fp16_blocks") or "",
        ])  # fmt: skip
    header = ["", "digit", "direction", "speed error, px a frame", "PSNR, dB", "SSIM", "L1", "blocks in 16 bit"]
    document.table(header, lines)
    by_name = {row["method"]: row for row in result["rows"]}
    left = [name for name in ("int8", "int8_fp16", "fp4", "fp8_fp4", "sageattention3_plain") if name not in by_name]
    left += [] if any("calibrated" in name for name in by_name) else ["fp4 with calibrated overrides"]
    if left:
        document.text(f"Not run yet: {', '.join(left)}; `python sage_kernels/benchmarks/end_to_end.py` runs all.")
    if "fp4" in by_name and "fp16" in by_name:
        share, fp4 = by_name["fp16"]["digit_accuracy_clip"], by_name["fp4"]["digit_accuracy_clip"]
        error = (share * (1 - share) / result["clips"]) ** 0.5
        document.text(
            f"FP4 loses {share - fp4:+.1%} of digits against 16 bit; the standard error of such a share over "
            f"{result['clips']} clips is {error:.1%}."
        )
