"""The router: measured times decide where there are any, a careful rule elsewhere."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend

from sage_kernels import dispatch, router
from sage_kernels.architectures import find_architecture
from sage_kernels.attention_call import make_call
from sage_kernels.kernels import KERNELS, find_kernel, sdpa

HOPPER = find_architecture((9, 0))
AMPERE = find_architecture((8, 0))
LENGTHS = [1024, 4096, 16384]
# The rung wins from somewhere between 1024 and 4096 tokens on.
MS = {"sdpa_flash": [0.1, 1.6, 25.6], "sdpa_cudnn": [0.05, 0.8, 12.8], "int8_triton": [0.1, 0.6, 6.4]}
CLASS = {"head_dim": 128, "is_causal": False, "mask": "none", "heads": 24, "lengths": LENGTHS}
# With a mask tensor the rung loses everywhere.
MASKED_MS = {"sdpa_efficient": [0.1, 1.6, 25.6], "int8_triton": [0.2, 1.7, 26.0]}
ENTRY = {"rows": [{**CLASS, "ms": MS}, {**CLASS, "mask": "aligned", "ms": MASKED_MS}]}


@pytest.fixture
def table(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"sm_90": ENTRY}))
    monkeypatch.setattr(router, "TABLE", path)


def call_of(rows, keys=None, heads=24, head_dim=128, precision="auto", is_causal=False, mask=None):
    """A call whose tensors have no memory."""
    q = torch.empty(1, heads, rows, head_dim, device="meta", dtype=torch.bfloat16)
    k = torch.empty(1, heads, keys or rows, head_dim, device="meta", dtype=torch.bfloat16)
    return make_call(q, k, k, mask, is_causal, None, False, None, "BHND", precision, False, False)


def slower(call, architecture=HOPPER):
    return router.slower_than_sixteen_bit(call, architecture, "int8_triton", "int8")


def test_times_at_measured_lengths_are_those_that_were_measured(table):
    for length, ms in zip(LENGTHS, MS["int8_triton"], strict=True):
        assert router.predicted_seconds(call_of(length), HOPPER, "int8_triton") == pytest.approx(ms / 1000)
    assert router.fastest_sixteen_bit(call_of(4096), HOPPER) == ("sdpa_cudnn", pytest.approx(0.8e-3))


def test_times_between_and_beyond_follow_the_work(table):
    between = router.predicted_seconds(call_of(2048), HOPPER, "sdpa_cudnn")
    assert between == pytest.approx(0.2e-3)  # of a method whose time is all work
    beyond = router.predicted_seconds(call_of(32768), HOPPER, "int8_triton")
    assert beyond == pytest.approx(4 * 6.4e-3)
    assert router.predicted_seconds(call_of(4096, heads=48), HOPPER, "int8_triton") > 2 * 0.5e-3


def test_few_rows_or_few_keys_count_as_a_short_call(table):
    """Preparation of a long K does not pay for a few rows, and few rows don't fill the GPU."""
    assert slower(call_of(16384)) is None
    assert "16 bit" in slower(call_of(256, 16384))
    assert "16 bit" in slower(call_of(16384, 512))
    assert "16 bit" in slower(call_of(4096, heads=4))


def test_sixteen_bit_serves_what_was_measured_slower(table):
    assert slower(call_of(4096)) is None
    assert slower(call_of(1024)) == "at this size sdpa_cudnn in 16 bit was measured to be as fast or faster"


@pytest.mark.parametrize(
    ("call", "architecture"),
    [
        (call_of(1000), HOPPER),  # shorter than any
        (call_of(4096, head_dim=64), HOPPER),
        (call_of(4096, is_causal=True), HOPPER),
        (call_of(4096, head_dim=64, mask=torch.ones(1, 4096, dtype=torch.bool, device="meta")), HOPPER),
        (call_of(4096), AMPERE),
        (call_of(4096), None),
    ],
)
def test_nothing_is_predicted_where_nothing_was_measured(table, call, architecture):
    assert router.predicted_seconds(call, architecture, "int8_triton") is None
    assert "not measured" in slower(call, architecture)


def test_calls_with_a_mask_have_times_of_their_own(table):
    call = call_of(16384, mask=torch.ones(1, 16384, dtype=torch.bool, device="meta"))
    assert router.fastest_sixteen_bit(call, HOPPER) == ("sdpa_efficient", pytest.approx(25.6e-3))
    assert slower(call) == "at this size sdpa_efficient in 16 bit was measured to be as fast or faster"


def test_masks_whose_rows_torch_must_copy_are_a_class_of_their_own(table):
    def masked(keys):
        return call_of(16384, keys, mask=torch.ones(1, keys, dtype=torch.bool, device="meta"))

    assert router.predicted_seconds(masked(16384), HOPPER, "int8_triton") is not None
    assert router.predicted_seconds(masked(16385), HOPPER, "int8_triton") is None


def test_unmeasured_rungs_are_used_from_a_safe_length_on(table):
    assert slower(call_of(8192), AMPERE) is None
    assert "below 8192 tokens" in slower(call_of(8191), AMPERE)
    assert router.slower_than_sixteen_bit(call_of(2048), AMPERE, "nvfp4_cuda", "fp4") is None


def test_the_decision_shows_reason_and_prediction(table, monkeypatch):
    monkeypatch.setattr(dispatch, "device_architecture", lambda device: HOPPER)
    kernels = (find_kernel("int8_triton"), sdpa.KERNEL)
    monkeypatch.setattr("sage_kernels.kernels.int8_triton._triton_is_missing", lambda: False)
    decision = dispatch.decide(call_of(4096), kernels)
    assert (decision.kernel, decision.seconds) == ("int8_triton", pytest.approx(0.6e-3))
    assert decision.sixteen_bit_seconds == pytest.approx(0.8e-3)
    assert decision.speedup == pytest.approx(0.8 / 0.6)
    assert "predicted: 0.6 ms, in 16 bit 0.8 ms" in str(decision)
    decision = dispatch.decide(call_of(1024), kernels)
    assert (decision.kernel, decision.seconds) == ("sdpa", pytest.approx(0.05e-3))
    assert "int8_triton: at this size sdpa_cudnn" in str(decision)


def test_a_precision_that_was_asked_for_is_not_second_guessed(table, monkeypatch):
    monkeypatch.setattr(dispatch, "device_architecture", lambda device: HOPPER)
    monkeypatch.setattr("sage_kernels.kernels.int8_triton._triton_is_missing", lambda: False)
    kernels = (find_kernel("int8_triton"), sdpa.KERNEL)
    assert dispatch.decide(call_of(100, precision="int8"), kernels).kernel == "int8_triton"


def test_sixteen_bit_runs_on_the_backend_that_was_measured_fastest(table, monkeypatch):
    monkeypatch.setattr(sdpa, "device_architecture", lambda device: HOPPER)
    first = [sdpa.KERNEL.plan(call)._first for call in (call_of(4096), call_of(100), call_of(4096, is_causal=True))]
    assert first == [SDPBackend.CUDNN_ATTENTION.value, None, None]


def test_torchs_order_is_as_before_after_a_preference(table, monkeypatch):
    monkeypatch.setattr(sdpa, "device_architecture", lambda device: HOPPER)
    before, orders = torch._C._get_sdp_priority_order(), []
    attend = sdpa.scaled_dot_product_attention

    def watched(*tensors, **options):
        orders.append(torch._C._get_sdp_priority_order())
        return attend(*tensors, **options)

    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", watched)
    call = call_of(4096)
    output, _ = sdpa.KERNEL.run(sdpa.KERNEL.prepare(call))
    assert orders[0][0] == SDPBackend.CUDNN_ATTENTION.value
    assert sorted(orders[0]) == sorted(before) == sorted(torch._C._get_sdp_priority_order())
    assert torch._C._get_sdp_priority_order() == before
    assert output.shape == call.query.shape


def test_what_torch_chooses_by_itself_needs_no_preference(table, monkeypatch):
    monkeypatch.setattr(sdpa, "device_architecture", lambda device: HOPPER)
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *tensors, **options: SDPBackend.CUDNN_ATTENTION.value)
    assert sdpa.KERNEL.plan(call_of(4096))._first is None


def test_the_shipped_table_names_kernels_that_exist():
    table = json.loads(router.TABLE.read_text(encoding="utf-8"))
    known = {*router.SIXTEEN_BIT_METHODS, *(kernel.name for kernel in KERNELS)}
    for entry in table.values():
        assert all(entry[key] for key in ("gpu", "torch", "commit", "date", "rows"))
        for row in entry["rows"]:
            assert set(row["ms"]) <= known
            assert all(len(ms) == len(row["lengths"]) for ms in row["ms"].values())
            assert row["lengths"] == sorted(row["lengths"])
