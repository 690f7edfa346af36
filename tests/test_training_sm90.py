"""Which gradients the CUDA kernels for sm_90a compute, and their parameter."""

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sage_kernels.architectures import find_architecture
from sage_kernels.driver import TENSOR_MAP
from sage_kernels.kernel_sources import source_folder
from sage_kernels.kernel_variants import TRAINING_SM90_ENTRIES, TRAINING_SM90_HEAD_DIMS, training_sm90_variant
from sage_kernels.training import sm90_backend
from sage_kernels.training.configs import find_config
from sm90_on_host import find_compiler

ROOT = Path(__file__).resolve().parent.parent
HOPPER = find_architecture((9, 0))
CUDA = torch.device("cuda")


@pytest.fixture
def on(monkeypatch):
    """Pretend a GPU."""
    monkeypatch.setattr(sm90_backend, "loading_obstacle", lambda variant, target: None)
    return lambda architecture: monkeypatch.setattr(sm90_backend, "device_architecture", lambda device: architecture)


@pytest.mark.parametrize(
    ("head_dim", "block_d", "precision", "served"),
    [
        (128, 128, "int8", True),
        (40, 64, "int8", True),
        (44, 64, "int8", False),  # rows that aren't whole vectors
        (32, 32, "int8", False),
        (128, 128, "fp8", False),
    ],
)
def test_serves_int8_of_its_head_dims(on, head_dim, block_d, precision, served):
    on(HOPPER)
    assert sm90_backend.serves(CUDA, head_dim, block_d, torch.bfloat16, precision) is served


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_leaves_other_gpus_to_triton(on, capability):
    on(find_architecture(capability))
    assert not sm90_backend.serves(CUDA, 128, 128, torch.bfloat16, "int8")


def test_leaves_the_cpu_to_triton():
    assert not sm90_backend.serves(torch.device("cpu"), 128, 128, torch.bfloat16, "int8")


def test_leaves_to_triton_what_can_not_be_loaded(on, monkeypatch):
    on(HOPPER)
    monkeypatch.setattr(sm90_backend, "loading_obstacle", lambda variant, target: "no compiler")
    assert not sm90_backend.serves(CUDA, 128, 128, torch.bfloat16, "int8")


@pytest.mark.parametrize("head_dim", TRAINING_SM90_HEAD_DIMS)
@pytest.mark.parametrize("entry", TRAINING_SM90_ENTRIES)
def test_kernels_fit_into_a_multiprocessor(entry, head_dim):
    assert training_sm90_variant(entry, head_dim, True).shared_bytes <= HOPPER.shared_memory


def test_the_recipe_has_the_tiles_of_the_sources():
    text = (source_folder() / "training_sm90.cuh").read_text()
    query_tile, key_tile = map(int, re.findall(r"kQueryTile = (\d+), kKeyTile = (\d+)", text)[0])
    recipe = sm90_backend.recipe()
    assert (recipe.query_tile, recipe.key_tile) == (query_tile, key_tile)
    assert recipe.forward_keys == key_tile
    assert recipe.exact == {"dp", "dv", "dk", "dq"}


@pytest.mark.parametrize("head_dim", TRAINING_SM90_HEAD_DIMS)
def test_cuda_and_triton_compute_one_forward_pass_on_hopper(head_dim):
    triton, cuda = find_config(HOPPER, head_dim).recipe("int8"), sm90_backend.recipe()
    for name in ("query_tile", "key_tile", "forward_keys", "smooth_k"):
        assert getattr(triton, name) == getattr(cuda, name)


def test_rows_of_queries_have_the_length_of_the_source():
    text = (source_folder() / "training_sm90_rows.cuh").read_text()
    assert int(re.findall(r"kRowFloats = (\d+)", text)[0]) == sm90_backend._ROW_FLOATS
    assert sm90_backend._ROW_FLOATS % 4 == 0  # the copy to shared memory takes whole vectors


@pytest.mark.parametrize(
    ("file", "struct", "parameters"),
    [
        ("training_sm90.cuh", "TrainParams", sm90_backend._Parameters),
        ("training_sm90_forward.cu", "TrainForwardParams", sm90_backend._ForwardParameters),
        ("training_sm90_quantize.cu", "TrainQuantizeParams", sm90_backend._QuantizeParameters),
        ("training_sm90_rows.cu", "TrainRowsParams", sm90_backend._RowsParameters),
        ("training_sm90_query.cu", "TrainQueryParams", sm90_backend._QueryParameters),
    ],
)
def test_parameters_have_the_fields_of_the_sources(file, struct, parameters):
    text = (source_folder() / file).read_text()
    body = re.sub(r"//.*", "", text[text.index(f"struct {struct} {{") :].partition("};")[0].partition("{")[2])
    kinds = {"float": ctypes.c_float, "int": ctypes.c_int32, "i64": ctypes.c_int64 * 3, "TensorMap": TENSOR_MAP}
    kinds["u64"] = ctypes.c_uint64 * 4
    fields = []
    for kind, star, names in re.findall(r"(?:const )?(\w+)(\*?) ([^;]+);", body):
        fields += [
            (name.strip("* ").partition("[")[0], ctypes.c_uint64 if star else kinds[kind]) for name in names.split(",")
        ]
    assert tuple(fields) == parameters._fields_


def test_only_what_tensor_maps_can_not_describe_is_copied():
    x, odd = (torch.zeros(2, 3, 40, columns, dtype=torch.bfloat16) for columns in (64, 68))
    fitting = (x, x.transpose(1, 2), x[:, :, 1:], x[..., 8:48], x[:1].transpose(0, 2))
    assert all(sm90_backend._mappable(y) is y for y in fitting)
    for y in (x[..., 4:], x[:, :, :1].expand_as(x), x.mT, x[..., ::2], odd[..., :64]):
        copy = sm90_backend._mappable(y)
        assert copy.is_contiguous()
        assert torch.equal(copy, y)


@pytest.mark.skipif(
    find_compiler() is None, reason="no C++ compiler (g++ or clang++) to compile the kernels for the CPU"
)
def test_kernels_agree_with_the_reference_on_the_cpu():
    """In a process of its own, because Triton decides at import whether it interprets."""
    pytest.importorskip("triton", reason="Triton is not installed")
    packages = [str(source_folder().parent / "src"), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(packages), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreted/training_sm90.py"]
    run = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout
