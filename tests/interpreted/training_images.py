"""Images of the backward kernels for sm_90a in Triton's interpreter, against their layout written in torch.

Run by tests/test_training_triton.py, with TRITON_INTERPRET=1.
"""

from dataclasses import replace

import pytest
import torch

from sage_kernels.training import sm90_backend, triton_backend
from training_cases import make_tensors
from triton_interpreter import round_as_gpus_do


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
    round_as_gpus_do(monkeypatch)
    q, k, v, d_output = make_tensors(1, 2, 1, 150, 200, head_dim, torch.bfloat16)
    output = torch.empty_like(q)
    saved = triton_backend.forward(q, k, v, output, False, 0.1, "int8")
    value_codes = []
    monkeypatch.setattr(sm90_backend, "serves", lambda *call: True)
    monkeypatch.setattr(sm90_backend, "attend", lambda saved, *call: value_codes.append(call[0]))
    tiles = triton_backend.forward(q, k, v, output, False, 0.1, "int8")
    images = sm90_backend.make_images(d_output, output, replace(tiles, lse=saved.lse))
    images |= {name: getattr(tiles, name) for name in ("query", "key", "key_transposed")}
    (images["value_codes"],) = value_codes
    block_d = saved.query.shape[2]
    query, key = saved.query.view(2, -1, 64, block_d), saved.key.view(1, -1, 128, block_d)
    query_tiles, key_tiles = query.shape[1], key.shape[1]
    d_out = torch.nn.functional.pad(d_output.float(), (0, block_d - head_dim, 0, 64 * query_tiles - 150))
    d_out = d_out.view(2, query_tiles, 64, block_d)
    values = torch.nn.functional.pad(v.float(), (0, block_d - head_dim, 0, 128 * key_tiles - 200))
    values = values.view(1, key_tiles, 128, block_d)
    value_scales = values.abs().amax((2, 3), keepdim=True) / 127
    scales = d_out.abs().amax((2, 3)) / 127
    codes = (d_out / scales[:, :, None, None]).round().to(torch.int8)
    expected = {
        "query": swizzled(query),
        "query_transposed": swizzled(transposed(query)),
        "d_output_transposed": swizzled(transposed(codes)),
        "key": swizzled(key),
        "key_transposed": swizzled(saved.key_transposed.view(1, -1, block_d, 128)),
        "value_codes": swizzled(transposed((values / value_scales).round().to(torch.int8))),
    }
    for name, wanted in expected.items():
        found = images[name].view(torch.uint8).flatten()
        assert torch.equal(found, wanted.contiguous().view(torch.uint8).flatten()), name
    rows = images["rows"].view(2, query_tiles, 132)
    delta = torch.nn.functional.pad((d_output.float() * output.float()).sum(3)[0], (0, 64 * query_tiles - 150))
    assert torch.equal(rows[..., :64].flatten(1), saved.lse)
    torch.testing.assert_close(rows[..., 64:128].flatten(1), -delta)
    assert torch.equal(rows[..., 128], saved.query_scales)
    assert torch.equal(rows[..., 129], scales)
