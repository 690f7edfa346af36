"""The experiments on training with 8-bit attention: texts, model, runs that go on, evaluation, and their report."""

import importlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "sage_kernels" / "benchmarks"
ABOUT = {"gpu": "a GPU", "machine": "here", "torch": "2", "commit": "0" * 40, "date": "2026-01-01"}


@pytest.fixture(scope="module")
def study():
    """Import a module of benchmarks/ by its name."""
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    sys.path.remove(str(BENCHMARKS))


def small_study(study, folder, **options):
    texts = folder / "prose.txt", folder / "code.txt"
    for path in texts:
        path.write_bytes(bytes(range(32, 127)) * 60)
    defaults = {"device": "cpu", "work": folder / "work", "texts": texts, "short": True, "processes": 1}
    return study("training_study.study").Study(**defaults | options)


def test_every_twentieth_file_is_held_out(study, tmp_path):
    corpus = study("training_study.corpus")
    archive = tmp_path / "package.tar.gz"
    with tarfile.open(archive, "w:gz") as packed:
        for index in range(40):
            path = tmp_path / f"{index:02}.txt"
            path.write_text(f"file {index:02}")
            packed.add(path, f"package-1/docs/{path.name}")
            packed.add(path, f"package-1/other/{path.name}")
    source = corpus.Source("package==1", archive.name, "", (("prose", "docs/", ".txt"),))
    assert [content for _, content in corpus.texts_of(archive, source)] == [b"file %02d" % i for i in range(40)]
    corpus.write_parts("prose", [b"%02d" % i for i in range(40)], tmp_path)
    assert (tmp_path / "prose.held_out.txt").read_bytes() == corpus.SEPARATOR.join([b"19", b"39"])
    assert len(corpus.load("prose", tmp_path).train) == 38 * 2 + 37 * len(corpus.SEPARATOR)


def test_a_package_other_than_the_pinned_one_is_refused(study, tmp_path, monkeypatch):
    corpus = study("training_study.corpus")

    def download(command, **_):
        (Path(command[command.index("--dest") + 1]) / corpus.SOURCES[0].file).write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(corpus.subprocess, "run", download)
    with pytest.raises(RuntimeError, match=r"has SHA-256 .*, expected"):
        corpus.load("prose", tmp_path)


def test_the_language_model_sees_no_later_byte(study, tmp_path):
    model = small_study(study, tmp_path).model(qk_norm=True, method="int8")
    text = torch.arange(2 * 64).view(2, 64)
    changed = text.clone()
    changed[:, 40:] += 1
    with torch.no_grad():
        before, after = model(text), model(changed)
    # K's mean is over all keys, so that codes may round elsewhere; nothing else of later bytes may be seen.
    assert float((before - after)[:, :40].abs().max()) < 0.02 * float((before - after)[:, 40:].abs().max())


def test_methods_start_equal_and_int8_learns_as_bf16_does(study, tmp_path):
    small, run = small_study(study, tmp_path), study("training_study.training_run")
    losses = {}
    for method in ("bf16", "int8"):
        model = small.model(qk_norm=False, method=method)
        config = run.RunConfig(steps=15, batch=4, warmup=5)
        losses[method] = run.Trainer(model, small.corpus("prose").train, config, seed=0).run(method).losses
    assert losses["bf16"][-1] < losses["bf16"][0] - 0.5
    torch.testing.assert_close(losses["int8"], losses["bf16"], rtol=0, atol=0.02)


def test_a_broken_off_study_goes_on_where_it_stopped(study, tmp_path):
    small = small_study(study, tmp_path)
    ran, written = [], []

    def run(_, name):
        if name == "c" and len(ran) < 3:
            ran.append("broken off")
            raise KeyboardInterrupt
        ran.append(name)
        return {"name": name}

    with pytest.raises(KeyboardInterrupt):
        small.run_all(["a", "b", "c"], run, written.append)
    small.run_all(["a", "b", "c"], run, written.append)
    assert ran == ["a", "b", "broken off", "c"]
    assert [len(found) for found in written] == [0, 1, 2, 2, 3]


def test_pretraining_runs_from_the_command_line_and_counts_what_is_not_finite(study, tmp_path):
    small = small_study(study, tmp_path)
    assert small.texts is not None
    options = ["--short", "--device", "cpu", "--work", str(tmp_path), "--out", str(tmp_path / "out.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / "pretraining.py"), *options, "--text", *map(str, small.texts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["qk_norm"], row["method"]) for row in rows] == [
        (True, "bf16"), (True, "int8"), (False, "bf16"), (False, "int8")
    ]  # fmt: skip
    assert all(row["non_finite"] == 0 and row["steps"] == 12 and len(row["losses"]) == 2 for row in rows)


def test_evaluation_is_the_same_whatever_the_model_trained_with(study, tmp_path):
    small = small_study(study, tmp_path)
    run, methods = study("training_study.training_run"), study("training_study.attention_methods")
    text = small.corpus("code").held_out
    exact, fp4 = (
        [
            run.evaluate(small.model(qk_norm=True, method=method), text, attend)
            for method in ("bf16", "int8")
        ]
        for attend in (methods.training_attention("bf16"), methods.fp4_attention("fp4"))
    )  # fmt: skip
    for first, second in (exact, fp4):
        assert torch.equal(first, second)
    assert 0 < float((exact[0] - fp4[0]).abs().max()) < 0.05


@pytest.mark.parametrize(
    ("differences", "word"),
    [
        ([-0.002, -0.0021, -0.0019], "confirmed;"),
        ([0.002, 0.0021, 0.0019], "refuted;"),
        ([-0.002, 0.001, 0.0], "not confirmed;"),
        ([-0.002], "not confirmed;"),
    ],
)
def test_a_claim_is_confirmed_only_beyond_the_spread_of_seeds(study, differences, word):
    assert study("training_study.report").verdict(differences).startswith(word)


def test_the_report_says_what_is_measured_and_what_is_missing(study, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib draws the report's pictures")
    rows = [
        {"method": method, "seed": seed, "evaluated_with": name, "nats_per_byte": 1 + 0.01 * seed + cost}
        for method, gain in (("bf16", 0.0), ("int8", 0.001), ("fp8", -0.001))
        for seed in range(3)
        for name, cost in (("bf16", 0.0), ("fp4", 0.005 - gain), ("fp4_published", 0.007))
    ]
    (tmp_path / "fine_tuning.json").write_text(json.dumps({**ABOUT, "rows": rows}))
    curves = [
        {"method": method, "qk_norm": True, "steps": 40, "losses": [3.0, 2.0, 1.5, 1.4], "final_loss": 1.4,
         "held_out_loss": 1.5, "non_finite": 0, "largest_gradient_norm": 2.0}
        for method in ("bf16", "int8")
    ]  # fmt: skip
    (tmp_path / "pretraining.json").write_text(json.dumps({**ABOUT, "curve_steps": 10, "rows": curves}))
    study("training_study.report").write_report(tmp_path, tmp_path / "report")
    text = (tmp_path / "report" / "TRAINING.md").read_text()
    assert "FP4, ours, int8 against bf16: confirmed; INT8 gives a smaller loss, by 1.000 thousandths" in text
    assert "FP4 as published, int8 against bf16: not confirmed" in text
    assert text.count("Not measured yet") == 5
    assert "Steps with a loss or gradient norm that is not finite: 0." in text
    assert (tmp_path / "report" / "pretraining.png").stat().st_size > 1000
    assert "<table>" in (tmp_path / "report" / "training.html").read_text()


def test_the_profilers_counts_are_those_of_a_kernels_last_launch(study):
    listing = """what the program prints
==PROF== Disconnected
"ID","Kernel Name","time","busy"
"","","ns","%"
"0","training_sm90_query(TrainParams)","1,500","5.5"
"1","training_sm90_forward(TrainForwardParams)","900","40.25"
"2","training_sm90_query(TrainParams)","1,000","6.5"
"""
    counts = study("training_profile").read_counts(listing, {"us": "time", "issue_slots_busy": "busy"})
    assert counts == {
        "query": {"us": 1000.0, "issue_slots_busy": 6.5},
        "forward": {"us": 900.0, "issue_slots_busy": 40.25},
    }


def test_the_fp4_emulator_computes_the_reference_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreted/recipe_emulator.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stdout
    assert "4 passed" in run.stdout
