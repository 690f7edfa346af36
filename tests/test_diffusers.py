"""The precision policy on diffusers' own transformers."""

import itertools
import threading

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, WanTransformer3DModel

from sage_kernels.block_overrides import BlockId, BlockOverrideError
from sage_kernels.diffusers import find_blocks, patch

BLOCKS = 3


@pytest.fixture
def wan():
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
        ffn_dim=32, num_layers=BLOCKS, rope_max_seq_len=32,
    ).eval()  # fmt: skip


def call_wan(model, timestep=500.0, frames=2):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, frames, 8, 8, generator=generator)
    context = torch.randn(1, 6, 8, generator=generator)
    with torch.no_grad():
        return model(latents, torch.tensor([timestep]), context, return_dict=False)[0]


def test_every_attention_of_every_block_is_taken_with_its_block(wan):
    with patch(wan, precision="fp4", allow_emulation=True) as patched:
        output = call_wan(wan)
    calls = patched.coverage.by_block()
    assert calls == {BlockId("block", i): {"fp4_emulated": 2} for i in range(BLOCKS)}
    assert str(patched.coverage) == "fp4_emulated 6: fp4: needs a CUDA GPU (6)"
    assert not torch.equal(output, call_wan(wan))


def test_without_hardware_and_emulation_nothing_changes_and_the_reason_is_told(wan):
    expected = call_wan(wan)
    with patch(wan, precision="fp4") as patched:
        assert torch.equal(call_wan(wan), expected)
    assert "needs a CUDA GPU" in str(patched.coverage)
    assert patched.coverage.by_kernel() == {"fp16": 2 * BLOCKS}


def test_blocks_kept_in_16_bit_are_bit_identical(wan):
    expected = call_wan(wan)
    with patch(wan, precision="fp4", fp16_blocks="0-2: 1", allow_emulation=True) as patched:
        assert torch.equal(call_wan(wan), expected)
    assert patched.coverage.reasons() == {"fp16": {"block override": 2 * BLOCKS}}


def test_unpatching_leaves_no_trace(wan):
    expected = call_wan(wan)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in wan.modules()]
    patch(wan, precision="fp4", allow_emulation=True).remove()
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in wan.modules()] == hooks
    assert torch.equal(call_wan(wan), expected)


def test_an_error_inside_the_model_leaves_nothing_behind(wan):
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    expected = call_wan(wan)
    with patch(wan, precision="fp4", allow_emulation=True) as patched:
        for module, before in itertools.product((wan, wan.blocks[1]), (True, False)):
            handle = module.register_forward_pre_hook(stop, prepend=before)
            with pytest.raises(Stop):
                call_wan(wan)
            handle.remove()
        patched.coverage.reset()
        call_wan(wan)
        assert patched.coverage.by_kernel() == {"fp4_emulated": 2 * BLOCKS}
        x = torch.randn(1, 1, 4, 8)
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
        assert patched.coverage.by_kernel() == {"fp4_emulated": 2 * BLOCKS}  # attention outside the model isn't taken
    assert torch.equal(call_wan(wan), expected)


def test_a_share_goes_by_the_noise_level_of_the_schedule(wan):
    sigmas = (1.0, 0.75, 0.5, 0.25, 0.0)
    with patch(wan, precision="fp4", fp16_blocks="1: 0.5, 2: 0.25 low", sigmas=sigmas, allow_emulation=True) as patched:
        served = []
        for sigma in sigmas[:-1]:
            patched.coverage.reset()
            call_wan(wan, timestep=1000 * sigma)
            served.append([*(patched.coverage.by_block()[BlockId("block", i)] for i in range(BLOCKS))])
    fp4, fp16 = {"fp4_emulated": 2}, {"fp16": 2}
    assert [row[0] for row in served] == [fp4] * 4
    assert [row[1] for row in served] == [fp16, fp16, fp4, fp4]
    assert [row[2] for row in served] == [fp4, fp4, fp4, fp16]


def test_a_pipeline_gives_the_schedule_by_its_scheduler(wan):
    class Pipeline:
        transformer = wan
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)

    Pipeline.scheduler.set_timesteps(4)
    with patch(Pipeline(), precision="fp4", fp16_blocks="0: 0.5", allow_emulation=True) as patched:
        latents = torch.zeros(1, 4, 2, 8, 8)
        served = []
        for timestep in Pipeline.scheduler.timesteps:
            patched.coverage.reset()
            velocity = call_wan(wan, float(timestep))
            served.append(patched.coverage.by_block()[BlockId("block", 0)])
            latents = Pipeline.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    assert served == [{"fp16": 2}, {"fp16": 2}, {"fp4_emulated": 2}, {"fp4_emulated": 2}]


def test_two_patched_models_in_threads_do_not_leak(wan):
    torch.manual_seed(1)
    other = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    with (
        patch(wan, precision="fp4", allow_emulation=True) as first,
        patch(other, precision="int8", allow_emulation=True) as second,
    ):
        threads = [threading.Thread(target=lambda m=m: [call_wan(m) for _ in range(5)]) for m in (wan, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert first.coverage.by_kernel() == {"fp4_emulated": 2 * BLOCKS * 5}
    assert second.coverage.by_kernel() == {"int8_emulated": 2 * 2 * 5}


def test_min_tokens_keeps_short_attention_in_16_bit(wan):
    with patch(wan, precision="fp4", min_tokens=7, allow_emulation=True) as patched:
        call_wan(wan)  # 32 video tokens, 6 text tokens
    assert patched.coverage.by_kernel() == {"fp4_emulated": BLOCKS, "fp16": BLOCKS}


def test_models_that_need_gradients_step_aside(wan):
    with patch(wan, precision="fp4", allow_emulation=True) as patched:
        wan(torch.randn(1, 4, 2, 8, 8), torch.tensor([500.0]), torch.randn(1, 6, 8), return_dict=False)[
            0
        ].sum().backward()
    assert patched.coverage.by_kernel() == {"fp16": 2 * BLOCKS}
    assert "gradients" in str(patched.coverage)


def test_flux_blocks_are_numbered_by_type():
    model = FluxTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    names = [str(block) for block, _ in find_blocks(model)]
    assert names == ["block.0", "block.1", "single.0", "single.1", "single.2"]
    with patch(model, precision="int8", fp16_blocks="single.0-1: 1", allow_emulation=True) as patched, torch.no_grad():
        model(
            hidden_states=torch.randn(1, 6, 4), encoder_hidden_states=torch.randn(1, 5, 8),
            pooled_projections=torch.randn(1, 8), timestep=torch.tensor([0.5]),
            img_ids=torch.zeros(6, 3), txt_ids=torch.zeros(5, 3),
        )  # fmt: skip
    assert patched.coverage.by_kernel() == {"int8_emulated": 3, "fp16": 2}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"fp16_blocks": "3-1: 2"}, BlockOverrideError, "backwards"),
        ({"fp16_blocks": "7: 1"}, BlockOverrideError, "no block 7; its blocks are 0-2"),
        ({"precision": "fp2"}, ValueError, "precision must be one of"),
    ],
)
def test_bad_arguments_are_named_and_the_model_stays_usable(wan, arguments, error, message):
    expected = call_wan(wan)
    with pytest.raises(error, match=message):
        patch(wan, **arguments)
    assert torch.equal(call_wan(wan), expected)


def test_a_module_without_blocks_and_other_things_are_refused():
    with pytest.raises(ValueError, match="no transformer blocks"):
        patch(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="diffusers pipeline"):
        patch("model")
