"""What happens inside a real ComfyUI: each function is one scenario and returns what the test asserts on, as JSON.

Imported by worker.py. `nodes` is the pack's node classes by id.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from family_models import FamilyMissingError
from tiny_models import TinyModel, build, transformer_blocks

Nodes = dict[str, Any]
PACK_ROOT = Path(__file__).resolve().parents[2]
OVERRIDE_KEY = "optimized_attention_override"
ALL_FP4 = {"precision": "fp4", "allow_emulation": True, "min_tokens": 0}
STEPS = 3
OUTSIDE = "outside"  # attention of no block


def patch(nodes: Nodes, patcher: Any, **settings: Any) -> Any:
    """The MODEL that the node Sage3Attention gives, with the node's defaults for what isn't set."""
    node = nodes["Sage3Attention"]
    defaults = {item.id: item.default for item in node.define_schema().inputs if hasattr(item, "default")}
    return node.execute(model=patcher, **{**defaults, **settings}).args[0]


def attention_calls(
    nodes: Nodes, family: str, sampler: str = "euler", steps: int = STEPS, **settings: Any
) -> dict[str, Any]:
    """Every attention call of one sampling; {"missing": why} where this ComfyUI has no such family.

    "calls" holds [block that really ran, block that the pack counted the call for, kernel, sigma, cosine between the
    pack's output and that of core's attention for the same arguments].
    """
    try:
        model = build(family)
    except FamilyMissingError as error:
        return {"missing": str(error)}
    patched = patch(nodes, model.patcher, **{**ALL_FP4, **settings})
    ours = patched.model_options["transformer_options"][OVERRIDE_KEY]
    calls: list[Any] = []
    evaluations: list[int] = []

    def counts_by_block() -> Counter[tuple[str, str]]:
        by_block = ours.coverage.by_block()
        return Counter(
            {(str(block or OUTSIDE), kernel): n for block in by_block for kernel, n in by_block[block].items()}
        )

    with running_blocks(model) as running:

        def recorder(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            before = counts_by_block()
            output = ours(func, *args, **kwargs)
            (((block, kernel), _),) = (counts_by_block() - before).items()
            sigma = float(kwargs["transformer_options"]["sigmas"][0])
            cosine = torch.cosine_similarity(output.flatten(), func(*args, **kwargs).flatten(), dim=0)
            calls.append([running[-1], block, kernel, sigma, float(cosine)])
            return output

        patched.model_options["transformer_options"][OVERRIDE_KEY] = recorder
        counter = model.diffusion_model.register_forward_hook(lambda *_: evaluations.append(1))
        model.sample(patched, sampler=sampler, steps=steps)
        counter.remove()
    blocks = [name for name, _ in transformer_blocks(model)]
    return {"evaluations": len(evaluations), "blocks": blocks, "calls": calls}


def switched_off(nodes: Nodes, family: str) -> dict[str, Any]:
    """Latents with and without the node, one after the other on one model."""
    model = build(family)
    all_blocks = f"0-{sum(1 for _ in transformer_blocks(model)) - 1}: 1"
    never_patched = model.sample()
    fp4 = model.sample(patch(nodes, model.patcher, **ALL_FP4))
    return {
        "fp4_differs_by": float((fp4 - never_patched).abs().max()),
        "bypassed_is_identical": torch.equal(model.sample(), never_patched),
        "fp16_is_identical": torch.equal(
            model.sample(patch(nodes, model.patcher, **{**ALL_FP4, "precision": "fp16"})), never_patched
        ),
        "all_blocks_in_fp16_is_identical": torch.equal(
            model.sample(patch(nodes, model.patcher, **ALL_FP4, fp16_blocks=all_blocks)), never_patched
        ),
    }


def two_clones(nodes: Nodes, in_threads: bool) -> dict[str, Any]:
    """Two clones of one model patched differently and sampled alternately or at once, against each on its own."""
    settings = [{**ALL_FP4, "fp16_blocks": "0: 1"}, {**ALL_FP4, "fp16_blocks": "1-2: 1"}]
    alone = []
    for each in settings:
        model = build("wan")
        alone.append(model.sample(patch(nodes, model.patcher, **each), steps=STEPS))
    model = build("wan")
    clones = [patch(nodes, model.patcher, **each) for each in settings]
    together: list[Any] = [None, None]
    in_step = threading.Barrier(2, timeout=60)

    def sample(index: int) -> None:
        wait = (lambda *_: in_step.wait()) if in_threads else None
        together[index] = model.sample(clones[index], steps=STEPS, callback=wait)

    if in_threads:
        threads = [threading.Thread(target=sample, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    else:
        sample(0)
        sample(1)
    return {
        "clones_differ_by": float((alone[0] - alone[1]).abs().max()),
        "same_as_alone": [torch.equal(*pair) for pair in zip(alone, together, strict=True)],
        "hooks_left": count_hooks(model),
    }


def earlier_override(nodes: Nodes) -> dict[str, Any]:
    """Blocks whose attention reaches an override that was on the model before the node."""
    model = build("wan")
    reached: list[str] = []
    with running_blocks(model) as running:

        def earlier(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            reached.append(running[-1])
            return func(*args, **kwargs)

        other = model.patcher.clone()
        other.model_options["transformer_options"][OVERRIDE_KEY] = earlier
        model.sample(patch(nodes, other, **ALL_FP4, fp16_blocks="1: 1"), steps=STEPS)
    return {"reached": reached}


def cancelled(nodes: Nodes, inside_a_block: bool) -> dict[str, Any]:
    """A sampling that is interrupted, and the one after it."""
    model = build("wan")
    patched = patch(nodes, model.patcher, **ALL_FP4, fp16_blocks="1: 1")
    undisturbed = model.sample(patched, steps=STEPS)

    def interrupt(*_: Any, **__: Any) -> None:
        raise comfy.model_management.InterruptProcessingException

    target, callback = patched, interrupt
    hooks_while_running: list[int] = []
    if inside_a_block:

        def earlier(*_: Any, **__: Any) -> None:
            hooks_while_running.append(count_hooks(model))
            interrupt()

        other = model.patcher.clone()
        other.model_options["transformer_options"][OVERRIDE_KEY] = earlier
        target, callback = patch(nodes, other, **ALL_FP4, fp16_blocks="1: 1"), None
    interrupted = False
    try:
        model.sample(target, steps=STEPS, callback=callback)
    except comfy.model_management.InterruptProcessingException:
        interrupted = True
    return {
        "interrupted": interrupted,
        "hooks_while_running": hooks_while_running,
        "hooks_left": count_hooks(model),
        "next_run_is_identical": torch.equal(model.sample(patched, steps=STEPS), undisturbed),
    }


def bad_blocks(nodes: Nodes, text: str) -> dict[str, Any]:
    """The node's error for a block string, and whether the model is as before."""
    model = build("wan")
    before = model.sample()
    try:
        patch(nodes, model.patcher, **ALL_FP4, fp16_blocks=text)
    except ValueError as error:
        message = str(error)
    else:
        message = None
    return {"message": message, "model_is_usable": torch.equal(model.sample(), before)}


def registry_metadata(nodes: Nodes) -> dict[str, Any]:
    """What ComfyUI reads from the pack's pyproject.toml, as the Registry does."""
    from comfy_config.config_parser import extract_node_configuration  # noqa: PLC0415

    return extract_node_configuration(PACK_ROOT).model_dump()


def count_hooks(model: TinyModel) -> int:
    """Forward hooks on all modules of the network."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.diffusion_model.modules())


@contextmanager
def running_blocks(model: TinyModel) -> Iterator[list[str]]:
    """A stack whose top names the block that runs; blocks are watched by their `forward`, without hooks."""
    stack = [OUTSIDE]

    def watched(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            stack.append(name)
            try:
                return forward(*args, **kwargs)
            finally:
                stack.pop()

        return run

    blocks = dict(transformer_blocks(model))
    for name, block in blocks.items():
        block.forward = watched(name, block.forward)
    try:
        yield stack
    finally:
        for block in blocks.values():
            del block.forward


def layouts(nodes: Nodes, family: str) -> dict[str, str]:
    """The blocks of a model as its modules give them, and as the names of its tensors do."""
    from sage3_pack.nodes import checkpoint_families, model_families  # noqa: PLC0415  (loaded by worker.py)

    try:
        model = build(family).diffusion_model
    except FamilyMissingError as error:
        return {"missing": str(error)}
    live = model_families.find_family(model).name, model_families.block_layout(model_families.find_blocks(model))
    stored, blocks = checkpoint_families.checkpoint_layout(list(model.state_dict())) or (None, "")
    return {"modules": f"{live[0]}: {live[1]}", "tensors": f"{stored and stored.name}: {blocks}"}
