"""summary.json and report.html of the demo."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jinja2

from .atomic_file import replacing

TEMPLATE = Path(__file__).with_name("report.html.jinja")


@dataclass
class Run:
    """One video and how far it is from the 16-bit one; psnr is None where the frames are the same."""

    name: str
    fp16_blocks: str
    seconds: float
    calls: dict[str, int]
    coverage: str
    psnr: float | None
    ssim: float
    cosine: float
    l1: float

    def quality(self) -> str:
        """In a few words."""
        if self.psnr is None:
            return "reference" if self.name == "fp16" else "same frames as fp16"
        return f"PSNR {self.psnr:.2f} dB, SSIM {self.ssim:.4f}, relative L1 {self.l1:.4f}"


@dataclass
class Report:
    """All that the demo found out. `values` says what cosine and l1 of the runs are taken of."""

    host: str
    values: str
    device: str
    digit: int
    direction: str
    seed: int
    steps: int
    seconds: float = 0.0
    runs: list[Run] = field(default_factory=list)
    blocks: list[dict[str, str | int | float]] = field(default_factory=list)
    ablation: list[dict[str, str | float]] = field(default_factory=list)
    removed_energy: dict[str, float] = field(default_factory=dict)
    captured_steps: tuple[int, ...] = ()

    def write(self, folder: Path) -> None:
        """Write summary.json and report.html; the pictures that report.html shows are written by the caller."""
        with replacing(folder / "summary.json") as partial:
            partial.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")
        template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE.read_text("utf-8"))
        page = template.render(
            asdict(self),
            block_count=len({row["block"] for row in self.blocks}),
            emulated=any("_emulated" in kernel for run in self.runs for kernel in run.calls),
        )
        with replacing(folder / "report.html") as partial:
            partial.write_text(page, encoding="utf-8")
