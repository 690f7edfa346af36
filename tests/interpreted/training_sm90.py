"""The CUDA training kernels for sm_90a on the CPU, behind Triton's interpreter, against the reference.

Run by tests/test_training_sm90.py, with TRITON_INTERPRET=1.
"""

from dataclasses import replace

import pytest
import torch

from sage_kernels.driver import TENSOR_MAP
from sage_kernels.kernel_variants import TRAINING_SM90_ENTRIES, training_sm90_variant
from sage_kernels.training import sm90_backend, triton_backend
from sage_kernels.training.configs import find_config
from sm90_on_host import HostKernel
from training_cases import exact, expected, make_tensors, relative_l1, run
from triton_interpreter import multiply_bfloat16, round_as_gpus_do

BOUND = 3e-3  # relative L1 to the reference, as for Triton's kernels
LSE_BOUND = 2e-4
QUALITY = 0.035  # to exact attention


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    """Compiled once."""
    folder, loaded = tmp_path_factory.mktemp("kernels"), {}

    def load(block_d, dtype, device):
        if (block_d, dtype) not in loaded:
            variants = (
                training_sm90_variant(entry, block_d, dtype == torch.bfloat16) for entry in TRAINING_SM90_ENTRIES
            )
            loaded[block_d, dtype] = {variant.entry: HostKernel(variant, folder) for variant in variants}
        return loaded[block_d, dtype]

    return load


def tensor_map(x):
    """What tests/kernels/sm90_on_host.h copies by: address, sizes and strides, the fastest axis first."""
    strides = [2 * stride for stride in x.stride()]
    return TENSOR_MAP(x.data_ptr(), *x.shape[::-1], *strides[2::-1])


@pytest.fixture(autouse=True)
def as_on_gpus(monkeypatch, kernels):
    round_as_gpus_do(monkeypatch)
    multiply_bfloat16(monkeypatch)
    monkeypatch.setattr(sm90_backend, "_load", kernels)
    monkeypatch.setattr(sm90_backend, "_tensor_map", tensor_map)
    monkeypatch.setattr(sm90_backend, "serves", lambda *call: True)


@pytest.mark.parametrize(
    ("heads", "rows", "keys", "head_dim", "is_causal", "scale"),
    [
        ((2, 1), 150, 300, 128, True, None),
        ((1, 1), 70, 60, 104, False, -0.1),
        ((1, 1), 1, 130, 40, False, None),
        ((1, 1), 130, 1, 64, True, None),
    ],
)
def test_kernels_agree_with_the_reference(heads, rows, keys, head_dim, is_causal, scale):
    tensors = make_tensors(1, *heads, rows, keys, head_dim, torch.bfloat16)  # GPUs also test float16
    results, lse = run(*tensors, is_causal=is_causal, scale=scale)
    recipe = sm90_backend.recipe()
    wanted, wanted_lse = expected(*tensors, recipe, is_causal=is_causal, scale=scale)
    for x, y, z in zip(results, wanted, exact(*tensors, is_causal=is_causal, scale=scale), strict=True):
        assert torch.isfinite(x).all(), "not finite, or never written"
        if float(z.abs().max()) > 1e-6:  # one key: dQ and dK are zero
            assert relative_l1(x, y) < BOUND
            assert relative_l1(x, z) < QUALITY
    assert float((lse - wanted_lse).abs().mean()) <= LSE_BOUND


def swizzled(tiles):
    """Bytes [..., rows, 64 or 128] with their chunks of 16 where wgmma's swizzle of that width finds them."""
    rows, width = tiles.shape[-2:]
    row = torch.arange(rows)
    key = row % 8 if width == 128 else row // 2 % 4
    places = torch.arange(width // 16) ^ key[:, None]
    chunks = tiles.reshape(*tiles.shape[:-1], width // 16, 16)
    return torch.gather(chunks, -2, places[..., None].expand(chunks.shape)).flatten(-2)


def transposed(tiles):
    """[..., tokens, D] as [..., D, tokens]: a thread's accumulators 2t, 2t+1, 2t+8, 2t+9 of 16 come together."""
    order = torch.tensor([0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15])
    lanes = torch.arange(tiles.shape[-2]).view(-1, 16)[:, order].flatten()
    return tiles[..., lanes, :].mT.contiguous()


@pytest.mark.parametrize("head_dim", [40, 64, 128])
def test_images_are_tiles_as_wgmma_reads_them(head_dim, monkeypatch):
    """Against what Triton's kernels quantise, and the layout written in torch."""
    q, k, v, d_output = make_tensors(1, 2, 1, 150, 200, head_dim, torch.bfloat16)
    output = torch.empty_like(q)
    triton = find_config(None, triton_backend.padded_head_dim(head_dim))
    saved = triton_backend.forward(q, k, v, output, False, 0.1, "int8", triton)
    value_codes = []
    monkeypatch.setattr(sm90_backend, "attend", lambda saved, *call: value_codes.append(call[0]))
    tiles = triton_backend.forward(q, k, v, output, False, 0.1, "int8")
    rows = sm90_backend.prepare_rows(d_output, output, replace(tiles, lse=saved.lse))
    images = {name: getattr(tiles, name) for name in ("query", "key", "key_16bit")}
    (images["value_codes"],) = value_codes
    block_d = saved.query.shape[2]
    query, key = saved.query.view(2, -1, 64, block_d), saved.key.view(1, -1, 128, block_d)
    query_tiles, key_tiles = query.shape[1], key.shape[1]
    values = torch.nn.functional.pad(v.float(), (0, block_d - head_dim, 0, 128 * key_tiles - 200))
    values = values.view(1, key_tiles, 128, block_d)
    value_scales = values.abs().amax((2, 3), keepdim=True) / 127
    smooth = k.float() - k.float().mean(2, keepdim=True)
    expected = {
        "query": swizzled(query),
        "key": swizzled(key),
        "key_16bit": torch.nn.functional.pad(smooth, (0, block_d - head_dim, 0, 128 * key_tiles - 200)).bfloat16(),
        "value_codes": swizzled(transposed((values / value_scales).round().to(torch.int8))),
    }
    for name, wanted in expected.items():
        found = images[name].view(torch.uint8).flatten()
        assert torch.equal(found, wanted.contiguous().view(torch.uint8).flatten()), name
    for name in ("query_scales", "key_scales"):
        assert torch.equal(getattr(tiles, name), getattr(saved, name)), name
    # Thread t of four has queries 2t and 2t + 1 of every 8.
    rows = rows.view(2, query_tiles, -1)
    lse = rows[..., :64].view(2, query_tiles, 4, 4, 2, 2).transpose(3, 4)
    pairs = rows[..., 64:192].view(2, query_tiles, 8, 4, 2, 2)
    delta = torch.nn.functional.pad((d_output.float() * output.float()).sum(3)[0], (0, 64 * query_tiles - 150))
    assert torch.equal(lse.reshape(2, -1), saved.lse)
    assert torch.equal(pairs[..., 0, :], pairs[..., 1, :])
    torch.testing.assert_close(pairs[..., 0, :].reshape(2, -1), -delta)
    quanta, steps = rows[..., 192:256].flatten(1), rows[..., 256:320].flatten(1)
    norms = torch.nn.functional.pad(d_output.float().abs().sum(3)[0], (0, 64 * query_tiles - 150))
    torch.testing.assert_close(steps, norms * 2.2 * values.abs().max() * 127 * saved.key_scales.max() * 2.0**-30)
    assert ((quanta * steps - 1).abs() < 1e-5)[:, :150].all()
    assert not quanta[:, 150:].any()
    assert torch.equal(rows[..., 320], saved.query_scales)


@pytest.mark.parametrize("which", [0, 2])
def test_faults_of_the_inputs_are_not_hidden(which):
    tensors = make_tensors(1, 1, 1, 70, 60, 64, torch.bfloat16)
    tensors[which][0, 0, 50, 5] = torch.nan
    results, _ = run(*tensors)
    for x, y in zip(results, exact(*tensors), strict=True):
        assert not (x.isfinite() & ~y.isfinite()).any()
