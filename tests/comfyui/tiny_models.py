"""Small random models of ComfyUI's own classes, and their sampling. Imported inside ComfyUI only."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import comfy.ldm.flux.model
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.supported_models
import torch
from torch import Tensor, nn

WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 256, "ffn_dim": 512, "num_heads": 2, "num_layers": 3,
    "text_dim": 64, "freq_dim": 64, "in_dim": 16, "out_dim": 16, "patch_size": (1, 2, 2), "window_size": (-1, -1),
    "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6,
}  # fmt: skip
FLUX = {
    "image_model": "flux", "guidance_embed": True, "in_channels": 16, "out_channels": 16, "vec_in_dim": 64,
    "context_in_dim": 64, "hidden_size": 256, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 3,
    "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True,
}  # fmt: skip
# ComfyUI's UNet takes the depths of the output blocks from the end of the list.
SDXL = {
    "use_checkpoint": False, "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 64,
    "legacy": False, "num_classes": "sequential", "adm_in_channels": 2816, "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 2, 2], "transformer_depth": [0, 1, 2], "transformer_depth_middle": 2,
    "transformer_depth_output": [0, 0, 1, 1, 2, 2], "use_spatial_transformer": True, "context_dim": 64,
    "use_linear_in_transformer": True, "num_head_channels": 64, "use_temporal_attention": False,
    "use_temporal_resblock": False,
}  # fmt: skip
CONTEXT_DIM = 64
POOLED_DIM = {"wan": 64, "flux": 64, "sdxl": 1280}
LATENT_SHAPE = {"wan": (1, 16, 2, 8, 8), "flux": (1, 16, 8, 8), "sdxl": (1, 4, 16, 16)}


@dataclasses.dataclass
class TinyModel:
    """A model with what it takes to sample it.

    Attributes:
        patcher: ComfyUI's MODEL.
        noise: [B, C, ...] float32.
        positive, negative: ComfyUI's CONDITIONING.
    """

    family: str
    patcher: Any
    noise: Tensor
    positive: list[Any]
    negative: list[Any]

    @property
    def diffusion_model(self) -> nn.Module:
        """The network."""
        return self.patcher.model.diffusion_model

    def sample(self, patcher: Any = None, *, sampler: str = "euler", steps: int = 2, callback: Any = None) -> Tensor:
        """Latents of this model, or of a patched clone, for the same noise every time."""
        return comfy.sample.sample(
            *(patcher or self.patcher, self.noise, steps, 2.0, sampler, "simple"),
            *(self.positive, self.negative, torch.zeros_like(self.noise)),
            callback=callback,
            disable_pbar=True,
            seed=1,
        )


def build(family: str) -> TinyModel:
    """A model of the family "wan", "flux" or "sdxl"; the same weights every time."""
    config = _config(family)
    config.unet_config["dtype"] = torch.float32
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    generator = torch.Generator().manual_seed(0)
    _initialise(model, generator)
    device = comfy.model_management.get_torch_device()
    positive, negative = (_conditioning(family, generator) for _ in range(2))
    noise = torch.randn(LATENT_SHAPE[family], generator=generator)
    return TinyModel(family, comfy.model_patcher.ModelPatcher(model, device, device), noise, positive, negative)


def transformer_blocks(model: TinyModel) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every transformer block in running order, found without the pack."""
    network = model.diffusion_model
    if model.family == "wan":
        lists = {"double": network.blocks}
    elif model.family == "flux":
        lists = {"double": network.double_blocks, "single": network.single_blocks}
    else:
        stacks = {"input": network.input_blocks, "middle": network.middle_block, "output": network.output_blocks}
        lists = {
            name: [module for module in stack.modules() if type(module).__name__ == "BasicTransformerBlock"]
            for name, stack in stacks.items()
        }
    for kind, blocks in lists.items():
        for index, block in enumerate(blocks):
            yield f"{kind}.{index}", block


def _config(family: str) -> Any:
    if family == "wan":
        return comfy.supported_models.WAN21_T2V(WAN)
    if family == "sdxl":
        return comfy.supported_models.SDXL(SDXL)
    parameters = {field.name for field in dataclasses.fields(comfy.ldm.flux.model.FluxParams)}
    newer = {"txt_ids_dims": []} if "txt_ids_dims" in parameters else {}  # since Flux 2
    return comfy.supported_models.Flux({**FLUX, **newer})


def _initialise(model: nn.Module, generator: torch.Generator) -> None:
    # ComfyUI leaves weights uninitialised. Full-size ones, so that attention matters to the result.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
            else:
                parameter.fill_(1.0 if name.endswith(("weight", "scale")) else 0.0)  # of norms, or a bias
    model.eval()


def _conditioning(family: str, generator: torch.Generator) -> list[Any]:
    context = torch.randn(1, 5, CONTEXT_DIM, generator=generator)
    return [[context, {"pooled_output": torch.randn(1, POOLED_DIM[family], generator=generator)}]]
