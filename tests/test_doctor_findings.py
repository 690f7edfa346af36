"""Who replaces attention: named as a user would, with what to do."""

import functools
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from sage_kernels.block_overrides import BlockLayout
from sage_kernels.precision_policy import PrecisionPolicy

CORE_FILE = "/srv/ComfyUI/comfy/ldm/modules/attention.py"


@pytest.fixture
def findings(pack_module):
    return pack_module("doctor_findings")


@pytest.fixture
def core(monkeypatch):
    """Core's attention module with one function of its own, and a model that imported it."""
    module, model = ModuleType("comfy.ldm.modules.attention"), ModuleType("comfy.ldm.wan.model")
    module.__file__ = CORE_FILE
    module.optimized_attention = model.optimized_attention = function("optimized_attention", CORE_FILE)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, model.__name__, model)
    return module


def function(name, file):
    """A function whose code is in a file."""
    scope = {}
    exec(compile(f"def {name}(*args, **kwargs): pass", file, "exec"), scope)
    return scope[name]


@pytest.fixture
def foreign():
    return function("fast_attention", "/srv/ComfyUI/custom_nodes/ComfyUI-Other/nodes/patch.py")


def patched(override, wrappers=None):
    return SimpleNamespace(
        model_options={"transformer_options": {"optimized_attention_override": override}}, wrappers=wrappers or {}
    )


OURS = {"apply_model": {"sage3_attention": [None]}}


def test_a_node_that_replaced_ours_is_named_with_what_to_do(findings, core, foreign):
    (line,), (fix,) = findings.model_overrides(patched(foreign, OURS))
    assert line == "an attention override of ComfyUI-Other (fast_attention)"
    assert fix.startswith("A node after Sage3 Attention has replaced it by ComfyUI-Other")


def test_an_override_of_core_is_named_so(findings, core):
    (line,), fixes = findings.model_overrides(patched(function("optimized_attention_override", CORE_FILE)))
    assert line == "an attention override of ComfyUI itself (optimized_attention_override)"
    assert fixes == []


def test_a_model_without_an_override_is_told_to_be_patched(findings, core):
    lines, (fix,) = findings.model_overrides(SimpleNamespace(model_options={}, wrappers={}))
    assert lines == ["no attention override: the model runs ComfyUI's own attention"]
    assert "connect Sage3 Attention" in fix


def test_our_override_is_shown_with_its_counts_and_what_is_behind_it(findings, core, pack_module, foreign):
    sentinel = pack_module("sentinel").Sentinel(BlockLayout({"double": 2}))
    override = pack_module("attention_override").AttentionOverride(
        PrecisionPolicy("fp4"), None, previous=functools.partial(foreign, 1), sentinel=sentinel
    )
    override.coverage.record(None, "fp4")
    lines, fixes = findings.model_overrides(patched(override, OURS))
    assert lines == ["Sage3 Attention; its last sampling: fp4 1", "it leaves to: ComfyUI-Other (fast_attention)"]
    assert fixes == []


def test_attention_replaced_for_all_models_is_found_even_under_a_borrowed_name(findings, core, monkeypatch, foreign):
    assert findings.global_patches() == []
    replacement = functools.wraps(core.optimized_attention)(foreign)
    monkeypatch.setattr(sys.modules["comfy.ldm.wan.model"], "optimized_attention", replacement)
    assert findings.global_patches() == [
        "comfy.ldm.wan.model.optimized_attention is replaced by ComfyUI-Other (optimized_attention)"
    ]


def test_a_replaced_sdpa_of_torch_is_found(findings, core, monkeypatch, foreign):
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", foreign)
    assert [line.split(" is ")[0] for line in findings.global_patches()] == ["torch's scaled_dot_product_attention"]


def test_options_of_the_command_line_are_shown_with_their_meaning(findings):
    args = SimpleNamespace(use_sage_attention=True, cpu=False)
    (line,) = findings.launch_flags(args)
    assert line.startswith("--use-sage-attention: the calls that this pack leaves alone run in SageAttention")
