"""The selftest: what it finds wrong, what it writes, and that it ends well where it can't run."""

import json
import math
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

from sage_kernels import cli, selftest, selftest_warmup
from sage_kernels.architectures import find_architecture
from sage_kernels.attention import attention, explain, prepare
from sage_kernels.benchmark_shapes import FORWARD_SHAPES, TRAINING_SHAPES, BenchmarkShape
from sage_kernels.cli import main
from sage_kernels.dispatch import Refusal
from sage_kernels.kernels import find_kernel
from sage_kernels.recipes import RECIPES
from sage_kernels.reference import attention_fp32, quantized_attention
from sage_kernels.selftest_grid import HEAD_DIMS, KINDS, GridCall, grid, kernel_recipe, run_call

CPU = torch.device("cpu")


def emulated(*qkv, **options):
    return attention(*qkv, allow_emulation=True, **options)


def decide_emulated(*qkv, **options):
    return explain(*qkv, allow_emulation=True, **options)


def test_the_grid_has_every_kind_at_every_head_dim_in_both_types():
    calls = list(grid())
    assert {(call.kind, call.head_dim) for call in calls} == {(kind, dim) for kind in KINDS for dim in HEAD_DIMS}
    assert len({call.name for call in calls}) == len(calls)
    assert {call.dtype for call in calls} == {torch.float16, torch.bfloat16}


@pytest.mark.parametrize("precision", [*RECIPES, "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_right_kernels_pass(precision, kind):
    cases = run_call(GridCall(kind, 64, torch.bfloat16), precision, emulated, CPU)
    assert [case.passed for case in cases] == [True] * (1 if precision == "fp16" else 2), cases


@pytest.mark.parametrize("precision", ["fp4", "fp16"])
@pytest.mark.parametrize(
    "wrong",
    [
        lambda output: output * 1.4,
        lambda output: output.roll(1, dims=2),
        lambda output: output.masked_fill(torch.arange(output.shape[2])[:, None] == 7, torch.nan),
    ],
    ids=["scaled", "shifted", "nan"],
)
def test_wrong_kernels_fail(precision, wrong):
    cases = run_call(GridCall("plain", 64, torch.bfloat16), precision, lambda *a, **o: wrong(emulated(*a, **o)), CPU)
    assert not any(case.passed for case in cases)
    assert all(case.max_error is None or math.isfinite(case.max_error) for case in cases)


def test_a_kernel_that_ignores_an_argument_fails():
    def without_mask(*qkv, attn_mask, **options):
        return emulated(*qkv, **options)

    cases = run_call(GridCall("bool_mask", 64, torch.bfloat16), "fp4", without_mask, CPU)
    assert not any(case.passed for case in cases)


def test_a_kernel_that_changes_its_input_fails():
    def changing(q, k, v, **options):
        output = emulated(q, k, v, **options)
        k[1, 0, -1] = 7  # a key that key_lengths hides: no result changes
        return output

    cases = run_call(GridCall("key_lengths", 64, torch.bfloat16), "fp4", changing, CPU)
    assert not any(case.passed for case in cases)


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_sampled_error_is_that_of_the_rows_it_samples(is_causal):
    q, k, v = torch.randn(3, 1, 3, 500, 32, generator=torch.Generator().manual_seed(0))
    exact, _ = attention_fp32(q, k, v, is_causal=is_causal)
    assert selftest.sampled_error(exact, (q, k, v), is_causal) < 1e-5
    assert selftest.sampled_error(exact * 1.5, (q, k, v), is_causal) == pytest.approx(0.5, rel=1e-3)
    assert selftest.sampled_error(exact, (q, k, v), not is_causal) > 0.1


@pytest.fixture
def gpu(monkeypatch):
    """A pretended GPU that computes on the CPU, one grid call, one small shape."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    refusals = (Refusal("fp8_fp4", "no kernel yet"),)
    here = [type("Device", (), {"device": "cuda:0", "precisions": ("fp4", "fp16"), "refusals": refusals})]
    monkeypatch.setattr(selftest, "capabilities", lambda: here)
    for module in (cli, selftest):
        monkeypatch.setattr(module, "device_architecture", lambda device: find_architecture((12, 0)))
        monkeypatch.setattr(module, "doctor", lambda: "the doctor's text")
    row = {"benchmark": "whole_call", "shape": "flux", "tflops": 100.0, "rel_l1": 0.1, "extra_bytes": 5}
    rows = [{**row, "method": "sdpa_flash", "ms": 3.0}, {**row, "method": "fp4", "ms": 2.0}]
    monkeypatch.setattr(selftest, "measure", lambda rungs, device: rows)
    monkeypatch.setattr(selftest, "warm_up", lambda rungs, device, timings, progress: None)
    check = selftest.check
    monkeypatch.setattr(selftest, "attention", emulated)
    monkeypatch.setattr(selftest, "explain", decide_emulated)
    monkeypatch.setattr(selftest, "grid", lambda: [GridCall("plain", 64, torch.bfloat16)])
    monkeypatch.setattr(selftest, "check", lambda report, device: check(report, CPU))
    return monkeypatch


def test_it_writes_evidence_timings_and_the_doctors_text(gpu, tmp_path, capsys):
    file = tmp_path / "out.json"
    assert main(["selftest", "--output", str(file)]) == 0
    record = json.loads(file.read_text())
    assert set(record) >= {"gpu", "driver", "torch", "compiler", "commit", "date", "sources", "cases"}
    assert [case["name"] for case in record["cases"]] == [
        "fp4/plain_d64_bfloat16/reference",
        "fp4/plain_d64_bfloat16/exact",
        "fp16/plain_d64_bfloat16/exact",
    ]
    assert len(record["rows"]) == 2
    assert record["doctor"] == "the doctor's text"
    text = capsys.readouterr().out
    assert "runs: fp4 (fp4_emulated), fp16 (sdpa); nothing is emulated" in text
    assert "not here: fp8_fp4: no kernel yet" in text
    assert (record["kernels"], record["errors"]) == ({"fp4": ["fp4_emulated"], "fp16": ["sdpa"]}, [])
    assert "correctness: 3 of 3 cases passed" in text
    assert "1.50 x the best of SDPA" in text
    assert str(file) in text


def test_the_benchmark_prints_and_writes_its_rows(gpu, tmp_path, capsys):
    file = tmp_path / "out.json"
    assert main(["bench", "--output", str(file)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("a GPU\nflux\n")
    assert "1.50 x the best of SDPA" in text
    record = json.loads(file.read_text())
    assert set(record) == {"machine", "gpu", "torch", "commit", "date", "command", "rows"}
    assert [row["method"] for row in record["rows"]] == ["sdpa_flash", "fp4"]
    file.unlink()
    assert main(["bench"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_failed_cases_are_named_and_end_in_an_exit_code(gpu, tmp_path, capsys):
    gpu.setattr(selftest, "attention", lambda *qkv, **options: emulated(*qkv, **options) * 2)
    assert main(["selftest", "--no-timings", "--output", str(tmp_path / "out.json")]) == 1
    text = capsys.readouterr().out
    assert "correctness: 0 of 3 cases passed" in text
    assert "FAILED fp4/plain_d64_bfloat16/reference: error 1, bound 0.01" in text


def test_calls_that_a_rung_refuses_are_left_out_and_none_at_all_is_no_success(gpu, tmp_path, capsys):
    gpu.setattr(selftest, "explain", lambda *qkv, **options: type("Decision", (), {"kernel": None}))
    assert main(["selftest", "--no-timings", "--output", str(tmp_path / "out.json")]) == 1
    assert "0 of 0 cases" in capsys.readouterr().out


def test_what_breaks_off_is_reported_and_the_rest_goes_on(gpu, tmp_path, capsys):
    def breaks_at_fp4(*qkv, precision, **options):
        if precision == "fp4":
            raise RuntimeError("no compiler\nin many lines")
        return emulated(*qkv, precision=precision, **options)

    def breaks(rungs, device):
        raise RuntimeError("illegal address")

    gpu.setattr(selftest, "attention", breaks_at_fp4)
    gpu.setattr(selftest, "measure", breaks)
    file = tmp_path / "out.json"
    assert main(["selftest", "--output", str(file)]) == 1
    errors = ["fp4/plain_d64_bfloat16: RuntimeError: no compiler", "timings: RuntimeError: illegal address"]
    record = json.loads(file.read_text())
    assert record["errors"] == errors
    assert [(case["name"], case["passed"]) for case in record["cases"]] == [
        ("fp4/plain_d64_bfloat16/ran", False),
        ("fp16/plain_d64_bfloat16/exact", True),
    ]
    text = capsys.readouterr().out
    assert "1 of 2 cases passed" in text
    assert all(f"ERROR {error}" in text for error in errors)


def test_a_kernels_own_recipe_is_what_it_is_compared_with():
    call = GridCall("plain", 64, torch.bfloat16)
    own = kernel_recipe(find_kernel("int8_sm90"), call, CPU)
    assert own != RECIPES["int8"]
    assert kernel_recipe(find_kernel("nvfp4_cuda"), call, CPU) == RECIPES["fp4"]
    assert kernel_recipe(find_kernel("sdpa"), call, CPU) is None
    cases = run_call(call, "int8", lambda q, k, v, **options: quantized_attention(q, k, v, own)[0], CPU, own)
    assert all(case.passed for case in cases)
    assert cases[0].max_error < 1e-6


def test_an_interruption_writes_nothing(gpu, tmp_path, capsys):
    def interrupted(rungs, device):
        raise KeyboardInterrupt

    gpu.setattr(selftest, "measure", interrupted)
    assert main(["selftest", "--output", str(tmp_path / "out.json")]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def timed(monkeypatch):
    """measure() on the CPU at one small shape, with a pretended clock."""
    monkeypatch.setattr(selftest, "FORWARD_SHAPES", (BenchmarkShape("small", 1, 2, 128, 64, is_causal=True),))
    monkeypatch.setattr(selftest, "attention", emulated)
    monkeypatch.setattr(selftest, "prepare", lambda *qkv, **options: prepare(*qkv, allow_emulation=True, **options))
    monkeypatch.setattr(selftest, "time_on_gpu", lambda call, device: (call(), 2.0)[1])
    monkeypatch.setattr(selftest, "extra_bytes", lambda call, device: (call(), 7)[1])
    return monkeypatch


def test_every_method_is_timed_and_compared(timed, capsys):
    rows = list(selftest.measure(("int8", "fp16"), CPU))
    assert [(row["method"], row["benchmark"]) for row in rows] == [
        ("sdpa_flash", "whole_call"),
        ("int8", "whole_call"),
        ("auto", "whole_call"),
        ("int8", "kernel_only"),
    ]
    assert "no sdpa_cudnn" in capsys.readouterr().out
    assert {row["tflops"] for row in rows} == {2 * 2 * 128**2 * 64 / 2e-3 / 1e12}
    assert all(row["rel_l1"] < 0.05 for row in rows)
    assert rows[1]["rel_l1"] > rows[0]["rel_l1"]


def test_a_shape_that_does_not_fit_is_left_out(timed, capsys):
    def too_large(*qkv, **options):
        raise torch.cuda.OutOfMemoryError

    timed.setattr(selftest, "attention", too_large)
    assert list(selftest.measure(("int8",), CPU)) == []
    assert "small 1,2,128,64 causal: does not fit" in capsys.readouterr().out


def test_an_error_of_our_own_kernels_is_not_hidden(timed):
    def broken(*qkv, **options):
        raise RuntimeError("illegal address")

    timed.setattr(selftest, "attention", broken)
    with pytest.raises(RuntimeError, match="illegal address"):
        list(selftest.measure(("int8",), CPU))


def test_it_needs_no_tqdm(monkeypatch, capsys):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(selftest, "import_module", missing)
    assert list(selftest.progress([1, 2], "timings")) == [1, 2]
    assert "timings" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert main(["selftest", "--output", str(tmp_path / "out.json")]) == 1
    text = capsys.readouterr().out
    assert "there is no NVIDIA GPU 0; torch sees 0 GPUs" in text
    assert "What to do:" in text
    assert list(tmp_path.iterdir()) == []


def test_gpus_of_others_are_refused(gpu, tmp_path, capsys):
    gpu.setattr(cli, "device_architecture", lambda device: None)
    assert main(["selftest", "--output", str(tmp_path / "out.json")]) == 1
    assert "there is no NVIDIA GPU 0; torch sees 1 GPUs" in capsys.readouterr().out
    gpu.setattr(selftest, "device_architecture", lambda device: None)
    with pytest.raises(ValueError, match="runs on NVIDIA GPUs, got device cuda:0"):
        selftest.selftest(tmp_path / "out.json", torch.device("cuda:0"), timings=False)


@pytest.mark.parametrize("number", ["-1", "first"])
def test_the_gpu_is_a_number(number, capsys):
    with pytest.raises(SystemExit):
        main(["selftest", f"--device={number}"])
    assert "--device" in capsys.readouterr().err


def test_shapes_count_their_operations():
    assert BenchmarkShape("a", 1, 2, 10, 64).flops == 4 * 2 * 100 * 64
    assert BenchmarkShape("a", 1, 2, 10, 64, is_causal=True).flops == 2 * 2 * 100 * 64
    names = [shape.name for shape in (*FORWARD_SHAPES, *TRAINING_SHAPES)]
    assert len(set(names)) == len(names) == 10


def test_all_calls_of_the_selftest_are_compiled_ahead():
    jobs = selftest_warmup.jobs(("fp4", "int8", "fp16"), timings=True)
    wanted = {(rung, str(call)) for rung in ("fp4", "int8") for call in (*grid(), *FORWARD_SHAPES)}
    assert {(rung, str(call)) for rung, call in jobs} == wanted
    assert len(jobs) == len(wanted)
    assert len(selftest_warmup.jobs(("fp4",), timings=False)) == len(list(grid()))


def test_calls_are_made_ahead_whatever_becomes_of_one(monkeypatch):
    made = []

    def attention(*qkv, precision, **options):
        made.append((precision, qkv[0].shape[-1], options))
        if precision == "int8":
            raise RuntimeError("no compiler")

    monkeypatch.setattr(selftest_warmup, "attention", attention)
    small = BenchmarkShape("small", 1, 2, 8, 64, is_causal=True)
    calls = [("int8", GridCall("gqa", 96, torch.bfloat16)), ("fp4", small)]
    shown = []
    with ThreadPoolExecutor(1) as pool:
        selftest_warmup.run_calls(pool, calls, CPU, lambda items, text: shown.append((len(items), text)) or items)
    assert made == [("int8", 96, {"enable_gqa": True}), ("fp4", 64, {"is_causal": True})]
    assert shown == [(2, "compiling")]


def test_processes_that_break_off_leave_the_compiling_to_the_selftest(capsys):
    class Broken:
        def submit(self, *arguments):
            future = Future()
            future.set_exception(BrokenProcessPool("killed"))
            return future

    selftest_warmup.run_calls(Broken(), [("fp4", FORWARD_SHAPES[0])], CPU, lambda items, text: items)
    assert "broke off" in capsys.readouterr().out


def test_a_single_core_compiles_nothing_ahead(monkeypatch):
    monkeypatch.setattr(selftest_warmup.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(selftest_warmup, "run_calls", lambda *arguments: pytest.fail("made calls"))
    selftest_warmup.warm_up(("fp4",), CPU, timings=True, progress=selftest.progress)
