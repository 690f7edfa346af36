"""Instruction budget of the FP4 attention kernel's inner loop, counted in its machine code.

    python sage_kernels/tools/sass_budget.py KERNEL.cubin --head-dim 128

The unit is a step: 16 query rows against 128 keys, in which QK and PV proper take 64 OMMA at head_dim 128. The kernel
is warp-specialised. Its consumer loop is the shortest one with EX2 and the useful OMMA of a turn (the one without
masks); its correction loop, whose warps compute delta_s, is the shortest one with OMMA and no EX2. What one turn of
that loop costs is spread over the steps that the consumers make of it.

Only the common path is counted. Blocks that are entered only through one side of a branch whose other side goes past
them, to the end of the turn, with all the useful OMMA, are a detour: raising a row's maximum, waiting again for a
barrier, and the loading of the next tile, which one correction warp does. Of two ways around each other the one that
arrives on a barrier is the common one, or else the longer one. Detours are listed with their size.

The model is fixed, so that kernels can be compared. Two steps on each quadrant of a multiprocessor take, in cycles,
T = 16 OMMA on the tensor pipe, M = 8 MUFU on the special-function pipe, I = 1 for each other instruction's issue, and
the eight steps of a multiprocessor take S in shared memory: a warp's LDSM.x4 or LDS.128 4, LDS.64 2, LDS.32 1.
Neither of the two predictions is a measurement.

In the variant with Q and K in MXFP8, QK takes 64 QMMA, half the work of an OMMA each at half the rate: 16 cycles too.
Its shares are of the same FP4 peak, so that two thirds are its bound.
"""

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from disassembly import disassemble, find_nvdisasm
from sass_listing import Function, Instruction, Loop, SassError, find_detours, find_loops, parse

STEP_SCORES = 16 * 128
PRODUCTS = ("OMMA", "QMMA")  # m16n8k64 in FP4; m16n8k32 in MXFP8, where QK is in that
WORK = (PRODUCTS, "SYNCS.ARRIVE")  # what a turn is for: products, and handing the tile's memory back
STEPS_A_QUADRANT = 2
STEPS_A_MULTIPROCESSOR = 8
SERIAL_SHARE = 0.79  # of the other pipes' cycles that the public kernel does not hide behind its MMAs
PEAK_TFLOPS = 1676  # dense FP4, RTX 5090
GOAL = 0.72  # share of the peak at the public kernel's overlap

# Column titles of the table and the opcodes they stand for; anything else is "other".
CLASSES: dict[str, tuple[str, ...]] = {
    "OMMA": ("OMMA",),
    "QMMA": ("QMMA",),
    "MUFU": ("MUFU",),
    "FFMA": ("FFMA",),
    "FMNMX": ("FMNMX", "FMNMX3"),
    "FADD": ("FADD",),
    "FMUL": ("FMUL",),
    "F2FP": ("F2FP",),
    "LDS, LDSM, STS": ("LDS", "LDSM", "STS"),
    "SHFL": ("SHFL",),
    "PRMT, SEL, LOP, MOV": ("PRMT", "SEL", "FSEL", "LOP3", "PLOP3", "MOV"),
    "VIMNMX": ("VIMNMX", "VIMNMX3"),
    "integer": ("IADD", "IADD3", "IMAD", "LEA", "SHF", "ISETP", "FSETP"),
    "branch": ("BRA", "BSSY", "BSYNC", "WARPSYNC", "VOTE", "YIELD"),
    "barrier": ("BAR", "SYNCS"),
    "NOP": ("NOP",),
}
OTHER = "other"


@dataclass(frozen=True)
class Tiling:
    """What a turn of the loops does.

    Attributes:
        rows, keys: of the scores that one consumer warp computes in a turn.
        useful: its OMMA of QK and PV proper in a turn.
        consumers, correctors: warps of a thread block; a turn of all correctors serves one turn of all consumers.
    """

    rows: int
    keys: int
    useful: float
    consumers: int
    correctors: int

    @property
    def steps(self) -> float:
        """Steps in a consumer's turn."""
        return self.rows * self.keys / STEP_SCORES


@dataclass(frozen=True)
class Cost:
    """Instructions by class, and shared-memory wavefronts; all may be fractions."""

    classes: Mapping[str, float]
    wavefronts: float

    @property
    def instructions(self) -> float:
        """All of them."""
        return sum(self.classes.values())

    def scaled(self, factor: float) -> "Cost":
        """`factor` times this."""
        return Cost({name: count * factor for name, count in self.classes.items()}, self.wavefronts * factor)

    def plus(self, other: "Cost") -> "Cost":
        """The sum of both."""
        names = dict.fromkeys((*self.classes, *other.classes))
        classes = {name: self.classes.get(name, 0) + other.classes.get(name, 0) for name in names}
        return Cost(classes, self.wavefronts + other.wavefronts)


@dataclass(frozen=True)
class Prediction:
    """The model's cycles (see the module) and the shares of the tensor pipe's peak that follow."""

    tensor: float
    special: float
    issue: float
    shared: float
    equal_overlap: float
    full_overlap: float
    bound_by: str


@dataclass(frozen=True)
class LoopCount:
    """One loop: a turn's cost on the common path, and its detours with their instructions."""

    label: str
    turn: Cost
    detours: dict[str, int]


@dataclass(frozen=True)
class Report:
    """Everything that is printed: costs of one step, and the loops they come from."""

    head_dim: int
    consumer: LoopCount
    correction: LoopCount | None
    step: Cost
    correction_share: Cost
    useful: float
    prediction: Prediction


@dataclass(frozen=True)
class PublicKernel:
    """The public SageAttention3 kernel, compiled for sm_120a with nvcc 13.0; none of it is our measurement."""

    instructions: int
    classes: Mapping[str, int]


PUBLIC = {
    128: PublicKernel(
        860,
        {"OMMA": 64, "MUFU": 82, "FFMA": 140, "FMNMX": 82, "FADD": 72, "FMUL": 66, "F2FP": 36, "LDS, LDSM, STS": 56},
    ),
    64: PublicKernel(702, {"OMMA": 32, "MUFU": 82}),
}


def wavefronts(instruction: Instruction) -> int:
    """Shared-memory cycles of one warp's instruction; 0 for one that is no access to shared memory."""
    modifiers = instruction.opcode.split(".")[1:]
    if instruction.root == "LDSM":
        return next((int(part) for part in modifiers if part in ("2", "4")), 1)
    if instruction.root in ("LDS", "STS"):
        return next((int(part) // 32 for part in modifiers if part in ("64", "128")), 1)
    return 0


def count(instructions: Iterable[Instruction]) -> Cost:
    """Instructions by class."""
    classes = Counter(dict.fromkeys((*CLASSES, OTHER), 0))
    total = 0
    for instruction in instructions:
        classes[_class(instruction)] += 1
        total += wavefronts(instruction)
    return Cost(dict(classes), total)


def _class(instruction: Instruction) -> str:
    return next((name for name, opcodes in CLASSES.items() if instruction.root in opcodes), OTHER)


def count_loop(function: Function, loop: Loop, minimum: float) -> LoopCount:
    """A turn of the loop without its detours; at least `minimum` OMMA stay."""
    detours = find_detours(function, loop, WORK, minimum)
    common = loop.blocks.difference(*(detour.blocks for detour in detours))
    sizes = {detour.label: function.count(detour.blocks, "") for detour in detours}
    return LoopCount(function.blocks[loop.header].label, count(function.instructions(common)), sizes)


def attention_loops(functions: Iterable[Function], useful: float) -> tuple[LoopCount, LoopCount | None]:
    """The consumer loop and the correction loop, if there is one.

    Raises:
        SassError: no loop has EX2 and the useful OMMA.
    """
    consumers: list[LoopCount] = []
    correctors: list[LoopCount] = []
    found = 0
    for function in functions:
        for loop in find_loops(function):
            multiplications = function.count(loop.blocks, PRODUCTS)
            if not function.count(loop.blocks, "MUFU.EX2"):
                if multiplications:
                    correctors.append(count_loop(function, loop, multiplications))
            elif multiplications >= useful:
                consumers.append(count_loop(function, loop, useful))
            else:
                found = max(found, multiplications)
    if not consumers:
        raise SassError(
            f"no loop has MUFU.EX2 and {useful:g} OMMA (most: {found}); is this cubin an FP4 attention kernel? What a "
            "turn of its loop does is said by --rows, --keys and --useful"
        )

    def instructions(loop: LoopCount) -> float:
        return loop.turn.instructions

    return min(consumers, key=instructions), min(correctors, key=instructions, default=None)


def predict(step: Cost, useful: float) -> Prediction:
    """The model of the module's docstring."""
    products = sum(step.classes.get(name, 0) for name in PRODUCTS)
    tensor = STEPS_A_QUADRANT * 16 * products
    special = STEPS_A_QUADRANT * 8 * step.classes["MUFU"]
    issue = STEPS_A_QUADRANT * (step.instructions - products)
    shared = STEPS_A_MULTIPROCESSOR * step.wavefronts
    useful_cycles = STEPS_A_QUADRANT * 16 * useful
    pipes = {"tensor": tensor, "special function": special, "issue": issue + tensor / 16, "shared memory": shared}
    bound_by = max(pipes, key=lambda name: pipes[name])
    equal = useful_cycles / (tensor + SERIAL_SHARE * max(special, issue, shared))
    return Prediction(tensor, special, issue, shared, equal, useful_cycles / pipes[bound_by], bound_by)


def make_report(functions: Iterable[Function], tiling: Tiling, head_dim: int) -> Report:
    """Count the kernel's loops and bring them to one step.

    Raises:
        SassError: no loop has EX2 and the tiling's useful OMMA.
    """
    consumer, correction = attention_loops(functions, tiling.useful)
    share = Cost(dict.fromkeys(consumer.turn.classes, 0.0), 0.0)
    if correction is not None:
        share = correction.turn.scaled(tiling.correctors / (tiling.consumers * tiling.steps))
    step = consumer.turn.scaled(1 / tiling.steps).plus(share)
    useful = tiling.useful / tiling.steps
    return Report(head_dim, consumer, correction, step, share, useful, predict(step, useful))


def format_report(report: Report) -> str:
    """The table, the detours and the predictions as text."""
    public = PUBLIC.get(report.head_dim)
    rows = [("per step of 16 rows x 128 keys", "this kernel", "correction", "public kernel")]

    def row(name: str, total: float, share: float, published: int | None) -> None:
        rows.append((name, f"{total:.1f}", f"{share:.1f}", "" if published is None else str(published)))

    step, share = report.step, report.correction_share
    row("instructions", step.instructions, share.instructions, public.instructions if public else None)
    for name, total in step.classes.items():
        row("  " + name, total, share.classes[name], public.classes.get(name) if public else None)
    row("useful OMMA", report.useful, 0, public.classes["OMMA"] if public else None)
    row("shared-memory wavefronts", step.wavefronts, share.wavefronts, None)
    lines = [f"{name:32}{total:>12}{of_it:>12}{published:>15}" for name, total, of_it, published in rows]
    for title, loop in (("consumer", report.consumer), ("correction", report.correction)):
        if loop is not None:
            listed = ", ".join(f"{label} {size}" for label, size in loop.detours.items()) or "none"
            lines.append(f"{title} loop at {loop.label}; detours not counted (first label, instructions): {listed}")
    return "\n".join([*lines, *_format_predictions(report, public), *_format_goal(report)])


def _format_predictions(report: Report, public: PublicKernel | None) -> list[str]:
    predictions = {"this kernel": report.prediction}
    if public is not None:
        others = public.instructions - sum(public.classes.values())
        cost = Cost({**public.classes, OTHER: others}, 0)
        predictions["public kernel"] = predict(cost, public.classes["OMMA"])
    lines = []
    for name, p in predictions.items():
        shared = f"{p.shared:.0f}" if p.shared else "not known"
        lines += [
            f"{name}: T {p.tensor:.0f}, M {p.special:.0f}, I {p.issue:.0f}, S {shared} cycles",
            f"  predicted at the public kernel's overlap: {p.equal_overlap:.1%} of peak = "
            f"{p.equal_overlap * PEAK_TFLOPS:.0f} of {PEAK_TFLOPS} TFLOP/s",
            f"  bound at full overlap: {p.full_overlap:.1%}, set by the {p.bound_by} pipe",
        ]
    return lines


def _format_goal(report: Report) -> list[str]:
    """What the goal asks of every pipe, and what stands in its way."""
    p, step = report.prediction, report.step
    if step.classes["QMMA"]:
        return ["no goal is set with Q and K in MXFP8"]
    if p.equal_overlap >= GOAL:
        return [f"goal: {GOAL:.0%} at the public kernel's overlap is met"]
    useful = STEPS_A_QUADRANT * 16 * report.useful
    allowed = (useful / GOAL - p.tensor) / SERIAL_SHARE
    lines = [
        f"goal: {GOAL:.0%} at the public kernel's overlap asks that each of M, I and S be at most {allowed:.0f} cycles "
        f"beside T {p.tensor:.0f} ({p.tensor - useful:.0f} of it delta_s, the row sum and padding)"
    ]

    def held_at(cycles: float) -> str:
        return f"{useful / (p.tensor + SERIAL_SHARE * cycles):.1%}"

    if p.issue > allowed:
        without_nops = p.issue - STEPS_A_QUADRANT * step.classes["NOP"]
        lines.append(
            f"  I is {p.issue - allowed:.0f} above: {(p.issue - allowed) / STEPS_A_QUADRANT:.0f} of "
            f"{step.instructions - step.classes['OMMA']:.0f} instructions a step are too many; "
            f"{step.classes['NOP']:.0f} of them are NOPs that the compiler puts behind an OMMA that another follows; "
            f"without any of those NOPs I alone would still hold it at {held_at(without_nops)}"
        )
    if p.shared > allowed:
        lines.append(
            f"  S is {p.shared - allowed:.0f} above: {(p.shared - allowed) / STEPS_A_MULTIPROCESSOR:.0f} of "
            f"{step.wavefronts:.0f} wavefronts a step are too many; S alone would hold it at {held_at(p.shared)}"
        )
    return lines


def exceeded(report: Report, max_instructions: float | None, max_mufu: float | None) -> list[str]:
    """What is over budget, in words."""
    limits = [
        ("instructions", report.step.instructions, max_instructions),
        ("MUFU", report.step.classes["MUFU"], max_mufu),
    ]
    return [
        f"over budget: {value:.1f} {name} a step, at most {limit:g} allowed"
        for name, value, limit in limits
        if limit is not None and value > limit
    ]


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit status 1 when over budget, 2 when the cubin can't be counted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cubin", type=Path, help="compiled kernel, or a listing of `nvdisasm -c` (.sass)")
    parser.add_argument("--head-dim", type=int, required=True)
    parser.add_argument("--rows", type=int, default=32, help="query rows of a consumer warp (default: 32)")
    parser.add_argument("--keys", type=int, default=64, help="keys of a turn of the loop (default: 64)")
    parser.add_argument(
        "--useful", type=float, help="OMMA of QK and PV in a turn (default: by rows, keys and head_dim)"
    )
    parser.add_argument("--consumers", type=int, default=8, help="consumer warps of a thread block (default: 8)")
    parser.add_argument("--correctors", type=int, default=4, help="correction warps of a thread block (default: 4)")
    parser.add_argument("--max-instructions", type=float, help="fail above this many a step")
    parser.add_argument("--max-mufu", type=float, help="fail above this many a step")
    parser.add_argument("--output", type=Path, help="also write the report and the cubin's SHA-256 here")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(arguments)
    useful = options.useful or useful_omma(options.rows, options.keys, options.head_dim)
    tiling = Tiling(options.rows, options.keys, useful, options.consumers, options.correctors)
    try:
        report = make_report(parse(read_listing(options.cubin)), tiling, options.head_dim)
    except (SassError, OSError, ValueError) as error:
        print(f"sass_budget: {error}", file=sys.stderr)
        return 2
    text = json.dumps(asdict(report), indent=2) if options.json else format_report(report)
    print(text)
    if options.output is not None:
        digest = hashlib.sha256(options.cubin.read_bytes()).hexdigest()
        note = "" if options.json else f"\n{options.cubin.name}, SHA-256 {digest}"
        options.output.write_text(f"{text}{note}\n", encoding="utf-8")
    failures = exceeded(report, options.max_instructions, options.max_mufu)
    for failure in failures:
        print(f"sass_budget: {failure}", file=sys.stderr)
    return 1 if failures else 0


def read_listing(file: Path) -> str:
    """A listing from a file, or that of a cubin.

    Raises:
        SassError: there is no nvdisasm.
        ValueError: nvdisasm can't read the cubin.
    """
    if file.suffix == ".sass":
        return file.read_text(encoding="utf-8")
    nvdisasm = find_nvdisasm()
    if nvdisasm is None:
        raise SassError("there is no nvdisasm; install it with: pip install nvidia-cuda-nvdisasm")
    return disassemble(file.read_bytes(), nvdisasm)


def useful_omma(rows: int, keys: int, head_dim: int) -> float:
    """m16n8k64 products that QK and PV proper amount to; what only pads head_dim is not useful."""
    return 2 * rows * keys * head_dim / (16 * 8 * 64)


if __name__ == "__main__":
    sys.exit(main())
