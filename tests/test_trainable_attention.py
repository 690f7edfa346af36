"""The public trainable_attention and its operators, with the reference in the kernels' place: no GPU is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import sage_kernels
import training_ranks
from sage_kernels.architectures import find_architecture
from sage_kernels.dispatch import UnsupportedAttention
from sage_kernels.training import emulated_attention, refusals, trainable_attention


def qkv(batch=1, heads=2, kv_heads=2, rows=70, keys=70, head_dim=32, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(count, length):
        return torch.randn(batch, count, length, head_dim, generator=generator).to(dtype).requires_grad_()

    return normal(heads, rows), normal(kv_heads, keys), normal(kv_heads, keys)


def gradients(function, tensors, **options):
    for x in tensors:
        x.grad = None
    output = function(*tensors, **options)
    generator = torch.Generator().manual_seed(1)
    output.backward(torch.randn(output.shape, generator=generator).to(output.dtype))
    return output.detach(), *(x.grad.clone() for x in tensors)


def exact(q, k, v, is_causal=False, scale=None, enable_gqa=False):
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )


def relative_l1(x, expected):
    return float((x.float() - expected.float()).abs().sum() / expected.float().abs().sum())


@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"scale": 0.3}, {"scale": -0.2}, {"enable_gqa": True, "is_causal": True}],
    ids=str,
)
def test_outputs_and_gradients_are_near_exact_ones(options):
    tensors = qkv(heads=4, kv_heads=2 if "enable_gqa" in options else 4, rows=150, keys=130)
    found = gradients(emulated_attention, tensors, **options)
    wanted = gradients(exact, [x.detach().float().requires_grad_() for x in tensors], **options)
    for x, expected, tensor in zip(found, wanted, (tensors[0], *tensors), strict=True):
        assert (x.shape, x.dtype) == (tensor.shape, tensor.dtype)
        assert relative_l1(x, expected) < 0.035


def test_layouts_agree():
    tensors = qkv(heads=3, kv_heads=3)
    transposed = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in tensors]
    output = emulated_attention(*tensors, is_causal=True)
    other = emulated_attention(*transposed, is_causal=True, layout="BNHD")
    assert other.is_contiguous()
    assert torch.equal(output, other.transpose(1, 2))
    for each in (output, other):
        each.square().sum().backward()
    assert all(torch.equal(x.grad, y.grad.transpose(1, 2)) for x, y in zip(tensors, transposed, strict=True))


def test_no_input_is_changed():
    tensors = qkv()
    before = [x.detach().clone() for x in tensors]
    gradients(emulated_attention, tensors)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_output_and_gradients_have_the_inputs_dtype(dtype):
    assert {x.dtype for x in gradients(emulated_attention, qkv(dtype=dtype))} == {dtype}


def test_float32_is_computed_as_bfloat16():
    tensors = qkv(dtype=torch.float32)
    halves = [x.detach().bfloat16().requires_grad_() for x in tensors]
    assert torch.equal(emulated_attention(*tensors), emulated_attention(*halves).float())


def test_only_the_gradients_that_are_wanted_are_given():
    q, k, v = qkv()
    emulated_attention(q, k.detach(), v.detach()).sum().backward()
    assert q.grad is not None
    assert emulated_attention(q.detach(), k.detach(), v.detach()).requires_grad is False


def test_autocast_rounds_float32_to_its_dtype():
    tensors = qkv(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = emulated_attention(*tensors)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, emulated_attention(*(x.bfloat16() for x in tensors)))
    output.sum().backward()
    assert tensors[0].grad.dtype == torch.float32


def test_gradient_checkpointing_gives_the_same_gradients():
    tensors = qkv()
    plain = gradients(emulated_attention, tensors)
    again = gradients(lambda *x: checkpoint(emulated_attention, *x, use_reentrant=False), tensors)
    assert all(torch.equal(x, y) for x, y in zip(plain, again, strict=True))


@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
def test_compiled_graphs_hold_it_whole(layout):
    tensors = [x.detach().transpose(1, 2).contiguous().requires_grad_() if layout == "BNHD" else x for x in qkv()]

    def model(q, k, v):
        return emulated_attention(q * 2, k, v, is_causal=True, layout=layout) + 1

    plain = gradients(model, tensors)
    compiled = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), tensors)
    assert all(torch.equal(x, y) for x, y in zip(plain, compiled, strict=True))


def test_the_operators_keep_torchs_rules():
    q, k, v = qkv(rows=20, keys=20)
    options = (True, 0.2, "BNHD", "int8", True)
    torch.library.opcheck(torch.ops.sage_kernels.trainable_attention.default, (q, k, v, *options))


def test_second_derivatives_are_refused_clearly():
    q, k, v = qkv(rows=20, keys=20)
    (gradient,) = torch.autograd.grad(emulated_attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"precision": "fp4"}, ValueError, "precision must be one of int8, fp8"),
        ({"layout": "NBHD"}, ValueError, "layout must be one of"),
        ({"k": torch.zeros(1, 1, 70, 32, dtype=torch.bfloat16)}, ValueError, "k and v must have one shape"),
        ({"q": torch.zeros(1, 2, 70, 32)}, TypeError, "share one dtype"),
        ({"q": None}, TypeError, "q must be a torch.Tensor"),
    ],
)
def test_bad_arguments_are_refused_clearly(change, error, message):
    arguments = dict(zip("qkv", qkv(), strict=True)) | change
    with pytest.raises(error, match=message):
        trainable_attention(**arguments)


def test_grouped_heads_must_be_asked_for():
    with pytest.raises(ValueError, match="enable_gqa=True"):
        trainable_attention(*qkv(heads=4, kv_heads=2))


def test_devices_without_kernels_are_refused_with_what_to_do():
    with pytest.raises(UnsupportedAttention, match=r"needs a CUDA GPU.*emulated_attention") as raised:
        sage_kernels.trainable_attention(*qkv())
    assert raised.value.decision.refusals[0].kernel == "int8_training"


@pytest.mark.parametrize(
    ("capability", "head_dim", "precision", "reason"),
    [
        ((7, 5), 64, "int8", "older than sm_80"),
        ((8, 0), 64, "fp8", "no FP8 tensor cores"),
        ((9, 0), 160, "int8", "at most 128"),
        ((9, 0), 64, "int8", None),
        ((9, 0), 64, "fp8", None),
        ((12, 0), 128, "int8", None),
    ],
)
def test_each_architecture_says_why_not(monkeypatch, capability, head_dim, precision, reason):
    monkeypatch.setattr(refusals, "device_architecture", lambda device: find_architecture(capability))
    monkeypatch.setattr(refusals, "triton_is_missing", lambda: False)
    found = refusals.refusal(torch.device("cuda"), head_dim, precision)
    assert (found is None) if reason is None else (reason in found)


def test_a_missing_triton_is_named(monkeypatch):
    monkeypatch.setattr(refusals, "device_architecture", lambda device: find_architecture((9, 0)))
    monkeypatch.setattr(refusals, "triton_is_missing", lambda: True)
    assert "pip install triton" in refusals.refusal(torch.device("cuda"), 64, "int8")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_average_their_gradients(kind, tmp_path):
    paths = [*(entry for entry in sys.path if entry), str(Path(training_ranks.__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    commands = [[sys.executable, training_ranks.__file__, kind, str(rank), str(tmp_path)] for rank in range(2)]
    ranks = [
        subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
        for command in commands
    ]
    try:
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    found = torch.load(tmp_path / "gradients.pt")
    model, batch = training_ranks.make_model_and_data()
    model(batch).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert relative_l1(found[name], parameter.grad) < 1e-5, name


def test_devices_without_kernels_are_refused_in_compiled_graphs_too():
    compiled = torch.compile(trainable_attention, fullgraph=True, backend="eager")
    with pytest.raises(UnsupportedAttention, match="needs a CUDA GPU"):
        compiled(*qkv())
