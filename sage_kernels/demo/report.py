"""summary.json and report.html of the demo."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jinja2

from .pictures import write_atomically

TEMPLATE = Path(__file__).with_name("report.html.jinja")


@dataclass
class Run:
    """One sampling and how far it is from the 16-bit one; psnr is None for identical frames."""

    name: str
    fp16_blocks: str
    seconds: float
    calls: dict[str, int]
    coverage: str
    psnr: float | None = None
    ssim: float = 1.0
    cosine: float = 1.0
    l1: float = 0.0


@dataclass
class Report:
    """All that the demo found out."""

    host: str
    device: str
    digit: int
    direction: str
    seed: int
    steps: int
    seconds: float = 0.0
    runs: list[Run] = field(default_factory=list)
    blocks: list[dict[str, str | int | float]] = field(default_factory=list)
    ablation: list[dict[str, str | float]] = field(default_factory=list)
    captured_steps: tuple[int, ...] = ()

    def write(self, folder: Path) -> None:
        """Write summary.json and report.html; the pictures that report.html shows are written by the caller."""
        summary = json.dumps(asdict(self), indent=2).encode()
        write_atomically(folder / "summary.json", lambda file: file.write(summary))
        emulated = any("_emulated" in kernel for run in self.runs for kernel in run.calls)
        template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE.read_text("utf-8"))
        page = template.render(
            asdict(self)
            | {
                "blocks": len({row["block"] for row in self.blocks}) or 5,
                "has_study": bool(self.blocks),
                "emulation_note": "FP4 is computed by the plain PyTorch reference here: the numbers are those of FP4, "
                "the speed is not."
                if emulated
                else "",
                "seconds_note": "Seconds include measuring the error of every block in the fp16 run."
                if self.blocks
                else "",
            }
        ).encode()
        write_atomically(folder / "report.html", lambda file: file.write(page))
