"""Scenarios of the nodes that measure and report, inside a real ComfyUI; see scenarios.py."""

import gc
import logging
import math
from types import ModuleType, SimpleNamespace
from typing import Any

import comfy.model_management
import psutil
import torch
from scenarios import ALL_FP4, OVERRIDE_KEY, STEPS, Nodes, patch
from tiny_models import TinyModel, build

CALLS_PER_BLOCK, BLOCKS = 2, 3


def override_of(patched: Any) -> Any:
    """The pack's override in a MODEL."""
    return patched.model_options["transformer_options"][OVERRIDE_KEY]


def failing_kernel(nodes: Nodes, step: int, block: int, sampler: str) -> dict[str, Any]:
    """A sampling in which a kernel gives NaN at one block from one evaluation on, and the next sampling."""
    model = build("wan")
    patched = patch(nodes, model.patcher, **ALL_FP4)
    override = override_of(patched)
    evaluations: list[int] = []
    kernels: ModuleType = override._kernels
    tracking = __import__(f"{type(override).__module__.rpartition('.')[0]}.block_tracking", fromlist=["x"])

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
        running = tracking.current_evaluation().block.index
        output = kernels.attention(q, k, v, **options)
        return output * math.nan if running == block and len(evaluations) > step else output

    override._kernels = SimpleNamespace(explain=kernels.explain, attention=attention)
    handle = model.diffusion_model.register_forward_pre_hook(lambda *_: evaluations.append(1))
    with captured_log() as log:
        latents = model.sample(patched, sampler=sampler, steps=STEPS)
        again = model.sample(patched, sampler=sampler, steps=STEPS)
    handle.remove()
    return {
        "finite": bool(latents.isfinite().all() and again.isfinite().all()),
        "bad_blocks": [str(bad) for bad in override.bad_blocks],
        "named": sum("gave non-finite numbers" in message and message.startswith("Sage3: block") for message in log),
        "next_run_by_block": {str(b): kernels for b, kernels in override.coverage.by_block().items()},
    }


def bad_model(nodes: Nodes) -> dict[str, Any]:
    """A model that gives NaN by itself."""
    model = build("wan")
    model.diffusion_model.blocks[1].self_attn.v.bias.data.fill_(math.nan)
    patched = patch(nodes, model.patcher, **ALL_FP4)
    evaluations: list[int] = []
    handle = model.diffusion_model.register_forward_pre_hook(lambda *_: evaluations.append(1))
    with captured_log() as log:
        model.sample(patched, steps=STEPS)
    handle.remove()
    return {
        "evaluations": len(evaluations),
        "bad_blocks": len(override_of(patched).bad_blocks),
        "said": sum("in 16 bit too" in message for message in log),
    }


def doctor(nodes: Nodes, replaced_by: str | None) -> dict[str, Any]:
    """The report on a patched model, whose override something else may have replaced."""
    model = build("wan")
    patched = patch(nodes, model.patcher, **ALL_FP4)
    if replaced_by == "core":
        import comfy.ldm.modules.attention as core  # noqa: PLC0415

        if not hasattr(patched, "set_model_optimized_attention"):
            return {"text": None}
        patched.set_model_optimized_attention(core.attention_pytorch)
    elif replaced_by == "foreign":
        patched.model_options["transformer_options"][OVERRIDE_KEY] = lambda func, *args, **kwargs: func(*args, **kwargs)
    else:
        model.sample(patched)
    return {"text": nodes["Sage3Doctor"].execute(model=patched).args[0]}


def doctor_without_model(nodes: Nodes) -> dict[str, Any]:
    """The report without a model."""
    return {"text": nodes["Sage3Doctor"].execute().args[0]}


class FakeVae:
    """Three channels of the latents as pixels, eight times as large."""

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        pixels = samples[:, :3].movedim(1, -1).sigmoid()
        return pixels.repeat_interleave(4, -3).repeat_interleave(4, -2)


def compare(nodes: Nodes, family: str, mode: str, with_vae: bool, same: bool) -> dict[str, Any]:
    """The node on a plain and a patched model, or twice on the plain one."""
    model = build(family)
    patched = patch(nodes, model.patcher, **ALL_FP4)
    node = nodes["Sage3Compare"]
    latent = {"samples": torch.zeros_like(model.noise)}
    frames, text, latent_a, latent_b = node.execute(
        model_a=model.patcher,
        model_b=model.patcher if same else patched,
        positive=model.positive,
        negative=model.negative,
        latent_image=latent,
        mode=mode,
        vae=FakeVae() if with_vae else None,
        **{"seed": 1, "steps": STEPS, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0},
    ).args
    return {
        "frames": list(frames.shape),
        "in_range": bool(frames.min() >= 0 and frames.max() <= 1),
        "largest": float(frames.max()),
        "text": text,
        "latents_differ": not torch.equal(latent_a["samples"], latent_b["samples"]),
        "a_is_as_sampled": torch.equal(
            latent_a["samples"],
            comfy.sample.sample(
                *(model.patcher, comfy.sample.prepare_noise(latent["samples"], 1), STEPS, 2.0, "euler", "simple"),
                *(model.positive, model.negative, latent["samples"]),
                disable_pbar=True,
                seed=1,
            ),
        ),
    }


def many_runs(nodes: Nodes, runs: int) -> dict[str, Any]:
    """Growth of memory [bytes] and of the number of Python objects over runs that patch and sample anew."""
    model = build("wan")

    def state() -> tuple[int, int]:
        gc.collect()
        return psutil.Process().memory_info().rss, len(gc.get_objects())

    for run in range(runs):
        model.sample(patch(nodes, model.patcher, **ALL_FP4, fp16_blocks="0: 0.5", verbose=True))
        if run == runs // 5:
            start = state()
    end = state()
    return {"bytes": end[0] - start[0], "objects": end[1] - start[1], "hooks": len(model.patcher.wrappers)}


def two_models(nodes: Nodes) -> dict[str, Any]:
    """A Wan and a Flux patched differently, sampled in turns, against each alone."""
    settings = {"wan": {**ALL_FP4, "fp16_blocks": "0: 1"}, "flux": {**ALL_FP4, "fp16_blocks": "single.1: 1"}}

    def prepare() -> dict[str, tuple[TinyModel, Any]]:
        models = {family: build(family) for family in settings}
        return {family: (model, patch(nodes, model.patcher, **settings[family])) for family, model in models.items()}

    alone = {family: model.sample(patched) for family, (model, patched) in prepare().items()}
    together = prepare()
    turns = [(family, model.sample(patched)) for _ in range(2) for family, (model, patched) in together.items()]
    return {
        "same_as_alone": [torch.equal(latents, alone[family]) for family, latents in turns],
        "fp16_blocks": {
            family: sorted(
                str(b) for b, kernels in override_of(patched).coverage.by_block().items() if "fp16" in kernels
            )
            for family, (_, patched) in together.items()
        },
    }


def lora_and_reload(nodes: Nodes) -> dict[str, Any]:
    """Weights that a LoRA changes after the patch; and the model unloaded between two runs."""
    model = build("wan")
    weight = "diffusion_model.blocks.1.self_attn.q.weight"
    difference = torch.randn(256, 256, generator=torch.Generator().manual_seed(3)) * 0.1

    def with_lora(patcher: Any) -> Any:
        clone = patcher.clone()
        assert clone.add_patches({weight: ("diff", (difference,))}, 1.0) == [weight]
        return clone

    patched = patch(nodes, model.patcher, **ALL_FP4)
    without = model.sample(patched)
    after = model.sample(with_lora(patched))
    before = model.sample(patch(nodes, with_lora(model.patcher), **ALL_FP4))
    comfy.model_management.unload_all_models()
    return {
        "lora_matters": not torch.equal(without, after),
        "order_matters": not torch.equal(before, after),
        "same_after_reload": torch.equal(model.sample(patched), without),
        "kernels": override_of(patched).coverage.by_kernel(),
    }


def node_message(nodes: Nodes, family: str, sensitivity: bool) -> dict[str, Any]:
    """What the node Sage3Attention tells the browser."""
    model = build(family)
    profile = SimpleNamespace(precisions=("fp4",), sensitivity_by_block=Sensitivity()) if sensitivity else None
    node = nodes["Sage3Attention"]
    defaults = {item.id: item.default for item in node.define_schema().inputs if hasattr(item, "default")}
    return node.execute(model=model.patcher, **defaults, profile=profile).ui["sage3"][0]


class Sensitivity:
    """sensitivity_by_block of a profile that knows the tiny Wan: the index of each block, in FP4."""

    def __call__(self, precision: str) -> dict[Any, float]:
        from sage_kernels.block_overrides import BlockId  # noqa: PLC0415  (found once the pack is loaded)

        assert precision == "fp4"
        return {BlockId("double", index): float(index) for index in range(BLOCKS)}


class captured_log(logging.Handler):  # noqa: N801  (used as a function)
    """Messages of the pack while the context is open."""

    def __enter__(self) -> list[str]:
        self.messages: list[str] = []
        logging.getLogger().addHandler(self)
        return self.messages

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self)
