"""What the experiments share: their options, the pretrained start, and runs that leave a file each."""

import argparse
import json
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from result_file import add_commit_option
from torch import Tensor

from sage_kernels.evidence import write_json

from .attention_methods import training_attention
from .corpus import Corpus, load
from .language_model import SMALL, LanguageModel, ModelConfig
from .training_run import RunConfig, Trainer

DEFAULT_WORK = Path(__file__).resolve().parents[1] / "training_work"
CURVE_STEPS = 10  # steps whose mean is a point of a loss curve
START_STEPS = 3000


@dataclass(frozen=True)
class Study:
    """Options of an experiment.

    Attributes:
        device: "cuda" or "cpu".
        work: keeps corpus, start and finished runs, so that a run that is broken off goes on where it stopped.
        texts: files for prose and code instead of the pinned packages.
        short: a tiny model and few steps: whether it works, not a result.
        processes: that train beside each other on one GPU.
    """

    device: str
    work: Path
    texts: tuple[Path, Path] | None
    short: bool
    processes: int

    @classmethod
    def from_command_line(cls, parser: argparse.ArgumentParser) -> tuple["Study", argparse.Namespace]:
        """The study, and all options; ends the program where they don't fit together."""
        parser.add_argument(
            "--short", action="store_true", help="tiny model, few steps: whether it works, not a result"
        )
        parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        parser.add_argument("--work", type=Path, default=DEFAULT_WORK, help="corpus, start and finished runs (kept)")
        parser.add_argument("--text", nargs=2, type=Path, metavar=("PROSE", "CODE"), help="files of your own")
        parser.add_argument("--processes", type=int, default=1, help="that train beside each other on one GPU")
        add_commit_option(parser)
        parser.add_argument("--out", type=Path, help="result file; with --short nothing is written unless it is given")
        options = parser.parse_args()
        for path in options.text or ():
            if not path.is_file():
                parser.error(f"--text: there is no file {path}")
        work = options.work / "short" if options.short else options.work
        texts = tuple(options.text) if options.text else None
        return cls(options.device, work, texts, options.short, options.processes), options

    @property
    def torch_device(self) -> torch.device:
        """`device`."""
        return torch.device(self.device)

    def corpus(self, domain: str) -> Corpus:
        """Text of "prose" or "code" on the device."""
        text = None if self.texts is None else self.texts[("prose", "code").index(domain)]
        found = load(domain, self.work, text).to(self.torch_device)
        return Corpus(found.train, found.held_out[: 2 * SMALL.context + 1]) if self.short else found

    def model(self, qk_norm: bool, method: str, seed: int = 0) -> LanguageModel:
        """A model with weights that depend on the seed alone."""
        torch.manual_seed(seed)
        sizes = {key: getattr(SMALL, key) for key in ("width", "layers", "heads", "hidden", "context")}
        config = ModelConfig(qk_norm=qk_norm, **(sizes if self.short else {}))
        return LanguageModel(config, training_attention(method)).to(self.torch_device)

    def steps(self, steps: int) -> int:
        """How many of them are trained."""
        return 12 if self.short else steps

    def started_model(self, method: str) -> LanguageModel:
        """The model pretrained on prose with 16-bit attention, without QK-norm as in Qwen2.5; trained where missing."""
        path = self.work / "start.pt"
        model = self.model(qk_norm=False, method="bf16")
        if not path.exists():
            config = RunConfig(self.steps(START_STEPS))
            result = Trainer(model, self.corpus("prose").train, config, seed=0).run("pretraining on prose")
            self.work.mkdir(parents=True, exist_ok=True)
            curve = [round(value, 4) for value in curve_points(result.losses)]
            torch.save({"model": model.state_dict(), "losses": curve}, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)  # another experiment may be waiting for it
        model.load_state_dict(torch.load(path, map_location=self.torch_device, weights_only=True)["model"])
        model.attend = training_attention(method)
        return model

    def run_all(self, names: Sequence[str], run: "Run", write: Callable[[list[dict[str, Any]]], None]) -> None:
        """Run what the work folder has no result of; `write` gets all results in order of `names` after each run."""
        jobs = [(self, name, run) for name in names if not self._file(name).exists()]
        write(self._finished(names))
        if self.processes > 1 and len(jobs) > 1:
            with multiprocessing.get_context("spawn").Pool(min(self.processes, len(jobs))) as pool:
                for _ in pool.imap_unordered(_run_one, jobs):
                    write(self._finished(names))
        else:
            for job in jobs:
                _run_one(job)
                write(self._finished(names))

    def _finished(self, names: Sequence[str]) -> list[dict[str, Any]]:
        files = [self._file(name) for name in names]
        return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]

    def _file(self, name: str) -> Path:
        return self.work / f"{name}.json"


Run = Callable[[Study, str], dict[str, Any]]  # of a run's name


def _run_one(job: tuple[Study, str, Run]) -> None:
    study, name, run = job
    found = run(study, name)
    study.work.mkdir(parents=True, exist_ok=True)
    write_json(study._file(name), found)


def curve_points(values: Tensor) -> list[float]:
    """Means over CURVE_STEPS steps each."""
    return [float(part.double().mean()) for part in values.split(CURVE_STEPS)]
