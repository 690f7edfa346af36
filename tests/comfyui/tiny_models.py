"""Small random models of ComfyUI's own classes, and their sampling. Imported inside ComfyUI only."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import torch
from family_models import CONTEXT_TOKENS, FAMILIES, TinyFamily
from torch import Tensor, nn


@dataclasses.dataclass
class TinyModel:
    """A model with what it takes to sample it.

    Attributes:
        patcher: ComfyUI's MODEL.
        noise: [B, C, ...] float32.
        positive, negative: ComfyUI's CONDITIONING.
    """

    family: TinyFamily
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
            *(self.positive, self.negative, self.noise * 0),
            callback=callback,
            disable_pbar=True,
            seed=1,
        )


def build(name: str) -> TinyModel:
    """A model of one of family_models.FAMILIES; the same weights every time."""
    return build_family(FAMILIES[name])


def build_family(family: TinyFamily) -> TinyModel:
    """A model of a family; the same weights every time."""
    config = family.model_config()
    config.unet_config["dtype"] = torch.float32
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    generator = torch.Generator().manual_seed(0)
    initialise(model, generator)
    device = comfy.model_management.get_torch_device()
    positive, negative = (_conditioning(family, generator) for _ in range(2))
    noise = _noise(family, generator)
    return TinyModel(family, comfy.model_patcher.ModelPatcher(model, device, device), noise, positive, negative)


def transformer_blocks(model: TinyModel) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every transformer block in running order, found without the pack."""
    for kind, attribute in model.family.blocks.items():
        container = getattr(model.diffusion_model, attribute)
        block_class = model.family.block_class
        if block_class is not None:
            blocks = [module for module in container.modules() if type(module).__name__ == block_class]
        else:
            blocks = list(container.children())
        for index, block in enumerate(blocks):
            yield f"{kind}.{index}", block


def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Fill the weights that ComfyUI leaves uninitialised: full-size ones, so that attention matters to the result."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
            else:
                parameter.fill_(1.0 if name.endswith(("weight", "scale")) else 0.0)  # of norms, or a bias
    model.eval()


def _noise(family: TinyFamily, generator: torch.Generator) -> Tensor:
    if isinstance(family.latent[0], int):
        return torch.randn(family.latent, generator=generator)
    import comfy.nested_tensor  # noqa: PLC0415  (not in 0.3.64)

    return comfy.nested_tensor.NestedTensor([torch.randn(shape, generator=generator) for shape in family.latent])


def _conditioning(family: TinyFamily, generator: torch.Generator) -> list[Any]:
    context = torch.randn(1, CONTEXT_TOKENS, family.context_dim, generator=generator)
    further = {
        name: torch.ones(shape, dtype=torch.long)
        if name == "attention_mask"
        else torch.randn(shape, generator=generator)
        for name, shape in family.conditioning.items()
    }
    return [[context, further]]
