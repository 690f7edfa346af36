"""Calibration profiles: kept whole by a file, refused in one line when damaged, hostile or of another model."""

import dataclasses
import json
import os
import struct
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from sage_kernels.block_overrides import BlockLayout

FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def module(pack_module):
    return pack_module("profile")


@pytest.fixture
def files(pack_module):
    return pack_module("profile_file")


@pytest.fixture
def fields():
    generator = torch.Generator().manual_seed(0)
    return {
        "family": "Flux",
        "fingerprint": "ab" * 32,
        "pack_version": "0.1.0",
        "layout": BlockLayout({"double": 1, "single": 2}),
        "schedule": (1.0, 0.6, 0.3, 0.0),
        "steps": (0, 2),
        "precisions": ("fp4", "int8"),
        "heads": (2, 2, 0),
        "errors": torch.rand(2, 3, 2, 2, generator=generator) * torch.tensor([1.0, 1.0, 0.0])[:, None, None],
        "sensitivity": torch.rand(2, 3, 2, generator=generator),
        "final_errors": torch.rand(2, 2, generator=generator),
        "full_error": torch.rand(2, generator=generator),
        "attention_share": torch.tensor([0.5, 0.5, 0.0]),
        "method": "measured",
        "settings": {"rows": 256, "note": "x"},
    }


@pytest.fixture
def profile(module, fields):
    return module.CalibrationProfile(**fields)


@pytest.fixture
def saved(profile, tmp_path):
    path = tmp_path / "p.sage3.safetensors"
    profile.save(path)
    return path.read_bytes()


def test_a_file_keeps_everything(profile, module, tmp_path):
    path = tmp_path / "p.sage3.safetensors"
    profile.save(path)
    loaded = module.CalibrationProfile.load(path)
    for field in dataclasses.fields(profile):
        before, after = getattr(profile, field.name), getattr(loaded, field.name)
        assert torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after, field.name
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert "sensitivity" in safetensors.torch.load_file(path)


def test_a_failed_write_leaves_the_old_file(profile, files, tmp_path, monkeypatch):
    path = tmp_path / "p.sage3.safetensors"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        profile.save(path)
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [(path.name, b"old")]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"family": "a\nb"}, "family must be one line"),
        ({"fingerprint": "xyz"}, "64 hexadecimal"),
        ({"layout": BlockLayout({"double": 2})}, "one number per block"),
        ({"layout": BlockLayout({"0: 1, double": 3})}, "no block type"),
        ({"layout": BlockLayout({"double": 2000})}, "from 1 to 1024"),
        ({"schedule": (1.0,)}, "number of sigmas"),
        ({"schedule": (1.0, float("nan"), 0.3, 0.0)}, "a sigma"),
        ({"steps": (2, 0)}, "must rise"),
        ({"steps": (0, 3)}, "a step must be"),
        ({"steps": ()}, "steps looked at"),
        ({"precisions": ("fp4", "fp4")}, "each precision once"),
        ({"precisions": ("fp4", "fp16")}, "must be of"),
        ({"heads": (2, True, 0)}, "heads of a block"),
        ({"heads": (2, 1, 0)}, "heads that the block hasn't"),
        ({"errors": torch.zeros(2, 3, 2, 3)}, r"errors must be float32 \[2, 3, 2, 2\]"),
        ({"errors": torch.zeros(2, 3, 2, 2).double()}, "errors must be float32"),
        ({"sensitivity": torch.full((2, 3, 2), float("nan"))}, "numbers from 0"),
        ({"sensitivity": torch.full((2, 3, 2), -1.0)}, "numbers from 0"),
        ({"full_error": torch.full((2,), float("inf"))}, "numbers from 0"),
        ({"attention_share": torch.tensor([0.5, 0.2, 0.0])}, "must sum to 1"),
        ({"settings": {"a": [1]}}, "settings.a must be a number"),
        ({"settings": {str(i): i for i in range(65)}}, "at most 64"),
    ],
)
def test_impossible_fields_are_refused(module, fields, change, part):
    with pytest.raises(module.ProfileError, match=part) as raised:
        module.CalibrationProfile(**{**fields, **change})
    assert "\n" not in str(raised.value)


def edited(saved, edit_header=lambda header: None, edit_fields=lambda fields: None, tensors=None):
    """The file with its JSON changed."""
    (length,) = struct.unpack("<Q", saved[:8])
    header = json.loads(saved[8 : 8 + length])
    fields = json.loads(header["__metadata__"]["sage3_profile"])
    edit_fields(fields)
    header["__metadata__"]["sage3_profile"] = json.dumps(fields)
    edit_header(header)
    return packed(json.dumps(header).encode(), saved[8 + length :] if tensors is None else tensors)


def packed(header, tensors=b""):
    return struct.pack("<Q", len(header)) + header + tensors


def put(name, value):
    return lambda mapping: mapping.__setitem__(name, value)


HUGE = [1 << 40, 1 << 40]
HOSTILE = {
    "empty": lambda saved: b"",
    "no header": lambda saved: b"\x01\x00",
    "header longer than the file": lambda saved: struct.pack("<Q", 1 << 62) + saved[8:],
    "header of 2 MiB": lambda saved: packed(b" " * (2 << 20) + b"{}"),
    "deep JSON": lambda saved: packed(b"[" * 500_000),
    "deep JSON in the metadata": lambda saved: edited(
        saved, lambda header: header["__metadata__"].__setitem__("sage3_profile", '{"a":' * 100_000)
    ),
    "a number of 100,000 digits": lambda saved: packed(b'{"a":' + b"1" * 100_000 + b"}"),
    "not UTF-8": lambda saved: packed(b'{"\xff\xfe": 1}'),
    "NaN": lambda saved: edited(saved, edit_fields=put("schedule", [1.0, float("nan"), 0.3, 0.0])),
    "infinite number": lambda saved: edited(
        saved, lambda header: header["__metadata__"].__setitem__("sage3_profile", '{"version": 1e999}')
    ),
    "not an object": lambda saved: packed(b"[1, 2]"),
    "no metadata": lambda saved: edited(saved, lambda header: header.pop("__metadata__")),
    "metadata of another program": lambda saved: edited(saved, put("__metadata__", {"format": "pt"})),
    "another version": lambda saved: edited(saved, edit_fields=put("version", 2)),
    "version true": lambda saved: edited(saved, edit_fields=put("version", True)),
    "unknown field": lambda saved: edited(saved, edit_fields=put("run", "import os")),
    "missing field": lambda saved: edited(saved, edit_fields=lambda fields: fields.pop("heads")),
    "field of a wrong type": lambda saved: edited(saved, edit_fields=put("steps", "02")),
    "steps that are objects": lambda saved: edited(saved, edit_fields=put("steps", [{}, {}])),
    "precisions that are lists": lambda saved: edited(saved, edit_fields=put("precisions", [["fp4"], ["int8"]])),
    "blocks without number": lambda saved: edited(saved, edit_fields=put("blocks", {"double": "3"})),
    "many blocks": lambda saved: edited(saved, edit_fields=put("blocks", {"double": 10**12})),
    "no blocks": lambda saved: edited(saved, edit_fields=lambda f: f.update(blocks={}, heads=[])),
    "negative heads": lambda saved: edited(saved, edit_fields=put("heads", [2, 2, -1])),
    "huge tensor": lambda saved: edited(
        saved, lambda h: h["errors"].update(shape=HUGE, data_offsets=[0, (1 << 80) * 4])
    ),
    "other dtype": lambda saved: edited(saved, lambda h: h["errors"].update(dtype="F64")),
    "tensor without offsets": lambda saved: edited(saved, lambda h: h["errors"].pop("data_offsets")),
    "tensors that overlap": lambda saved: edited(saved, lambda h: h["errors"].update(data_offsets=[0, 96])),
    "extra tensor": lambda saved: edited(saved, put("more", {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})),
    "bytes too many": lambda saved: saved + b"\0\0\0\0",
    "bytes too few": lambda saved: saved[:-4],
    "pickle": lambda saved: b"\x80\x04cos\nsystem\n(S'false'\ntR.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_give_one_line(module, saved, tmp_path, name):
    data = HOSTILE[name](saved)
    path = tmp_path / "evil.sage3.safetensors"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(module.ProfileError) as raised:
        module.CalibrationProfile.load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400
    assert peak < 16 << 20


def test_a_key_that_comes_twice_is_refused(files, module, saved):
    (length,) = struct.unpack("<Q", saved[:8])
    header, tensors = saved[8 : 8 + length], saved[8 + length :]
    for key in (b'"errors":', b'\\"version\\":'):
        start = header.index(key)
        value = header[start : header.index(b"}" if b"errors" in key else b",", start) + 1].rstrip(b",")
        with pytest.raises(module.ProfileError, match="has a key twice"):
            files.parse_profile(packed(header[:start] + value + b"," + header[start:], tensors))


def test_a_file_above_the_limit_is_not_read_to_the_end(module, files, tmp_path, monkeypatch, saved):
    monkeypatch.setattr(files, "MAX_FILE_BYTES", len(saved) - 1)
    path = tmp_path / "large.sage3.safetensors"
    path.write_bytes(saved)
    with pytest.raises(module.ProfileError, match="larger than"):
        module.CalibrationProfile.load(path)


NO_FILES = {"missing": lambda path: None, "a folder": Path.mkdir}
if hasattr(os, "mkfifo"):  # not on Windows
    NO_FILES["a pipe"] = os.mkfifo


@pytest.mark.parametrize("name", NO_FILES)
def test_what_is_no_file_is_refused(module, tmp_path, name):
    NO_FILES[name](tmp_path / "x.sage3.safetensors")
    with pytest.raises(module.ProfileError, match="can't be read"):
        module.CalibrationProfile.load(tmp_path / "x.sage3.safetensors")


def parse(files, module, data):
    """The profile, or None where it is refused as it should be."""
    try:
        return files.parse_profile(data)
    except module.ProfileError as error:
        message = str(error)
    assert "\n" not in message
    return None


@FUZZ
@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=8))
def test_flipped_bytes(files, module, saved, flips):
    data = bytearray(saved)
    for place, bits in flips:
        data[int(place * len(data))] ^= bits
    parse(files, module, bytes(data))


@FUZZ
@given(length=st.floats(0, 1, exclude_max=True), tail=st.binary(max_size=64))
def test_truncated_files(files, module, saved, length, tail):
    data = saved[: int(length * len(saved))]
    assert parse(files, module, data) is None
    parse(files, module, data + tail)


@FUZZ
@given(data=st.binary(max_size=400), length=st.integers(0, (1 << 64) - 1))
def test_random_bytes(files, module, data, length):
    assert parse(files, module, data) is None
    assert parse(files, module, struct.pack("<Q", length) + data) is None
    assert parse(files, module, packed(data)) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = ("version", "family", "fingerprint", "pack_version", "blocks", "schedule", "steps", "precisions", "heads")


@FUZZ
@given(name=st.sampled_from([*FIELDS, "method", "settings"]), value=JSON)
def test_any_json_in_any_field(files, module, saved, name, value):
    parse(files, module, edited(saved, edit_fields=put(name, value)))


@FUZZ
@given(name=st.sampled_from(["errors", "sensitivity", "__metadata__"]), value=JSON)
def test_any_json_in_the_header(files, module, saved, name, value):
    assert parse(files, module, edited(saved, put(name, value))) is None


@FUZZ
@given(shape=st.lists(st.integers(-2, 1 << 62), max_size=5), offsets=st.lists(st.integers(-8, 1 << 62), max_size=3))
def test_any_shape_and_offsets(files, module, saved, shape, offsets):
    refused = edited(saved, lambda h: h["errors"].update(shape=shape, data_offsets=offsets))
    assert parse(files, module, refused) is None


class WanModel(nn.Module):
    def __init__(self, blocks=2, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(blocks))


class Flux(nn.Module):
    def __init__(self):
        super().__init__()
        self.double_blocks = nn.ModuleList([nn.Linear(16, 16)])
        self.single_blocks = nn.ModuleList([nn.Linear(16, 16)])


def patcher(diffusion_model, backup=None):
    return SimpleNamespace(get_model_object=lambda name: diffusion_model, backup=backup or {})


@pytest.fixture
def fingerprint(pack_module):
    return pack_module("model_fingerprint").model_fingerprint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_the_fingerprint_survives_casts_and_scales(fingerprint, dtype):
    model, cast = WanModel(), WanModel()
    for linear in cast.blocks:
        linear.weight.data = (linear.weight.data * 7).to(dtype)
        linear.bias = None
    assert fingerprint(patcher(model)) == fingerprint(patcher(cast))


def test_the_fingerprint_tells_models_apart(fingerprint):
    models = [WanModel(), WanModel(seed=1), WanModel(blocks=3), Flux()]
    assert len({fingerprint(patcher(model)) for model in models}) == len(models)


def test_the_fingerprint_is_that_of_the_weights_without_a_merged_lora(fingerprint):
    model = WanModel()
    before = fingerprint(patcher(model))
    original = model.blocks[0].weight.data.clone()
    model.blocks[0].weight.data.neg_()
    assert fingerprint(patcher(model)) != before
    backup = {"diffusion_model.blocks.0.weight": SimpleNamespace(weight=original)}
    assert fingerprint(patcher(model, backup)) == before


@pytest.mark.parametrize(
    ("model", "part"),
    [
        (Flux(), "measured on Wan, this is Flux"),
        (WanModel(blocks=3), "has the blocks 0-1, this one 0-2"),
        (WanModel(seed=1), "the weights are those of another model"),
    ],
)
def test_a_profile_says_what_does_not_fit(module, fields, fingerprint, model, part):
    own = patcher(WanModel())
    profile = module.CalibrationProfile(
        **{
            **fields,
            "family": "Wan",
            "fingerprint": fingerprint(own),
            "layout": BlockLayout({"double": 2}),
            "heads": (2, 2),
            "errors": fields["errors"][:, :2],
            "sensitivity": fields["sensitivity"][:, :2],
            "attention_share": torch.tensor([0.5, 0.5]),
        }
    )
    profile.check(own)
    with pytest.raises(module.ProfileError, match=part):
        profile.check(patcher(model))


def test_sensitivity_by_block_asks_for_a_precision_that_was_measured(profile, module):
    assert [str(block) for block in profile.sensitivity_by_block("int8")] == ["double.0", "single.0", "single.1"]
    with pytest.raises(module.ProfileError, match="calibrate with fp8_fp4"):
        profile.sensitivity_by_block("fp8_fp4")


def test_nothing_is_unpickled(saved, files, module, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("unpickled")

    monkeypatch.setattr(sys.modules["pickle"], "loads", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert parse(files, module, saved) is not None
