"""The benchmarks that compare with the paper: their comparators, measures and report, on small tensors."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from sage_kernels.reference import attention_fp32

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "sage_kernels" / "benchmarks"


@pytest.fixture(scope="module")
def study(demo):
    """Import a module of benchmarks/ by its name."""
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    sys.path.remove(str(BENCHMARKS))


def qkv(head_dim=64):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 1, 128, head_dim, generator=generator) for _ in range(3))
    return q, k + 2 * torch.randn(1, 1, 1, head_dim, generator=generator), v


def test_transforms_leave_the_scores(study):
    methods = study("paper_study.methods")
    q, k, _ = qkv()
    for transform in (methods.smooth_quant, methods.rotate):
        new_q, new_k = transform(q, k)
        torch.testing.assert_close(new_q @ new_k.mT, q @ k.mT, rtol=1e-4, atol=1e-3)


def test_int4_of_the_caches_is_within_half_a_step(study):
    x = qkv()[1]
    rounded = study("paper_study.methods").unsigned_int4(x)
    step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / 15
    assert ((rounded - x).abs() <= 1.02 * step).all()
    assert (rounded - x).abs().mean() < 0.3 * step.mean()


def test_every_method_of_the_tables_is_near_exact_attention(study):
    tables = study("paper_study.tables")
    q, k, v = qkv()
    exact, _ = attention_fp32(q, k, v)
    for rows in tables.all_tables().values():
        for method in rows:
            found = tables.errors(method.call(q, k, v), exact)
            assert found["rel_l1"].shape == (2,)
            assert found["rel_l1"].max() < 0.5, method.name


def test_ssim_is_that_of_skimage(study):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: the judge of clips needs it")
    metrics = importlib.import_module("skimage.metrics")
    ssim = study("end_to_end").ssim
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 256, (1, 2, 32, 32), generator=generator).double()
    b = (a + torch.randint(-20, 21, a.shape, generator=generator)).clamp(0, 255)
    expected = [
        metrics.structural_similarity(y.numpy(), x.numpy(), data_range=255) for x, y in zip(a[0], b[0], strict=True)
    ]
    assert ssim(a, b).tolist() == pytest.approx(expected, abs=1e-9)


def test_result_files_are_joined_only_if_they_are_of_one_run(study, tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: the judge of clips needs it")
    join = study("end_to_end").join
    about = {"gpu": "a", "commit": "b", "clips": 560}
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    for path, commit, methods in ((one, "b", ("fp16", "fp4")), (two, "b", ("fp16", "int8")), (other, "c", ("fp4",))):
        content = {**about, "commit": commit, "rows": [{"method": x, "from": path.name} for x in methods]}
        path.write_text(json.dumps(content))
    rows = [(row["method"], row["from"]) for row in join([one, two])["rows"]]
    assert rows == [
        ("fp16", "one"),
        ("int8", "two"),
        ("fp4", "one"),
    ]
    with pytest.raises(SystemExit, match="differ in commit"):
        join([one, other])


def test_report_has_every_table_and_says_what_is_missing(study, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib draws the report's pictures")
    tables, render = study("paper_study.tables"), study("paper_study.render")
    about = {"gpu": None, "machine": "here", "torch": "2", "commit": "0" * 40, "date": "2026-01-01"}
    errors = {"cosine": 0.99, "rel_l1": 0.05, "rmse": 0.1, "relative_rmse": 0.06}
    rows = [
        {"table": table, "set": "trained_model", "method": method.name, **errors}
        for table, methods in tables.all_tables().items()
        for method in methods
    ]
    sets = [{"name": "trained_model", "what": "a model", "rows": 8, "measured": about}]
    drift = [{"set": "trained_model", "method": "ours", "kept": kept, "rel_l1": [0.1, 0.2]} for kept in ([], [1])]
    content = {**about, "sets": sets, "rows": rows, "drift": drift}
    (tmp_path / "paper.json").write_text(json.dumps(content))
    render.write_report(tmp_path, tmp_path / "report")
    report = (tmp_path / "report" / "REPORT.md").read_text()
    for missing in ("attention.json", "kv_decode.json", "end_to_end.json"):
        assert f"`results/{missing}` is missing" in report
    assert "smooth K: L1 is 0.0500 here and 0.0948 in the paper (0.53 x)." in report
    assert "the goal of 0.75 is missed" in report
    for picture in ("ideas.png", "trade_off.png", "trade_off_5090.png", "drift_trained_model.png"):
        assert (tmp_path / "report" / picture).stat().st_size > 1000
    assert "<table>" in (tmp_path / "report" / "report.html").read_text()


def test_every_idea_has_a_cost_and_a_verdict(study):
    ideas = [method.name for method in study("paper_study.tables").ideas()][1:]
    verdicts = study("paper_study.verdicts").VERDICTS
    assert set(ideas) == set(verdicts)
