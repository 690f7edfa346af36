"""A small configuration of ComfyUI's own class for every model family; head dims are those of the real models.

Imported inside ComfyUI only.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

import comfy.supported_models

CONTEXT_DIM = 64
CONTEXT_TOKENS = 5


class FamilyMissingError(Exception):
    """A family that this version of ComfyUI lacks."""


@dataclasses.dataclass(frozen=True)
class TinyFamily:
    """What it takes to build and sample a small model of a family.

    Attributes:
        config: class in comfy.supported_models.
        unet: its unet_config.
        latent: shape of the noise; of a tuple of noises where there are several (video and audio).
        blocks: block type -> attribute that holds the blocks, in running order.
        block_class: class name of the blocks, where they lie deeper inside that attribute; None: its entries.
        parameters: dataclass that takes `unet`; entries that it doesn't know in this version are left out.
        conditioning: name -> shape of what the model is given beside the context.
        context_dim: width of the context.
    """

    config: str
    unet: Mapping[str, Any]
    latent: tuple[Any, ...]
    blocks: Mapping[str, str]
    block_class: str | None = None
    parameters: str | None = None
    conditioning: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    context_dim: int = CONTEXT_DIM

    def model_config(self) -> Any:
        """ComfyUI's configuration object.

        Raises:
            FamilyMissingError: this ComfyUI has no such class.
        """
        if not hasattr(comfy.supported_models, self.config):
            raise FamilyMissingError(f"this ComfyUI has no supported_models.{self.config}")
        unet = dict(self.unet)
        if self.parameters is not None:
            module, _, name = self.parameters.rpartition(".")
            known = {field.name for field in dataclasses.fields(getattr(importlib.import_module(module), name))}
            unet = {key: value for key, value in unet.items() if key in known or key == "image_model"}
        return getattr(comfy.supported_models, self.config)(unet)


TEXT_MASK = {"attention_mask": (1, CONTEXT_TOKENS)}  # all ones, as for a prompt without padding
POOLED = {"pooled_output": (1, 64)}
DOUBLE_SINGLE = {"double": "double_blocks", "single": "single_blocks"}
UNET_PARTS = {"input": "input_blocks", "middle": "middle_block", "output": "output_blocks"}
UNET_BLOCK = "BasicTransformerBlock"

WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 256, "ffn_dim": 512, "num_heads": 2, "num_layers": 3,
    "text_dim": CONTEXT_DIM, "freq_dim": 64, "in_dim": 16, "out_dim": 16, "patch_size": (1, 2, 2),
    "window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6,
}  # fmt: skip
FLUX = {
    "image_model": "flux", "guidance_embed": True, "in_channels": 16, "out_channels": 16, "vec_in_dim": 64,
    "context_in_dim": CONTEXT_DIM, "hidden_size": 256, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2,
    "depth_single_blocks": 3, "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True,
    "txt_ids_dims": [],
}  # fmt: skip
CHROMA = {
    **FLUX, "image_model": "chroma", "in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 256,
    "hidden_dim": 64, "n_layers": 1,
}  # fmt: skip
HUNYUAN_VIDEO = {
    **FLUX, "image_model": "hunyuan_video", "theta": 256, "patch_size": [1, 2, 2], "byt5": False, "meanflow": False,
    "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False,
}  # fmt: skip
# ComfyUI's UNet takes the depths of the output blocks from the end of the list.
UNET = {
    "use_checkpoint": False, "image_size": 32, "in_channels": 4, "out_channels": 4, "legacy": False,
    "use_spatial_transformer": True, "context_dim": CONTEXT_DIM, "use_temporal_attention": False,
    "use_temporal_resblock": False,
}  # fmt: skip
SD15 = {
    **UNET, "model_channels": 160, "num_classes": None, "adm_in_channels": None, "num_res_blocks": [1, 1],
    "channel_mult": [1, 2], "transformer_depth": [1, 1], "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1], "use_linear_in_transformer": False, "num_heads": 4,
    "num_head_channels": -1,
}  # fmt: skip
SDXL = {
    **UNET, "model_channels": 64, "num_classes": "sequential", "adm_in_channels": 2816, "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 2, 2], "transformer_depth": [0, 1, 2], "transformer_depth_middle": 2,
    "transformer_depth_output": [0, 0, 1, 1, 2, 2], "use_linear_in_transformer": True, "num_head_channels": 64,
}  # fmt: skip
SD3 = {
    "in_channels": 16, "patch_size": 2, "depth": 2, "input_size": None, "adm_in_channels": 64, "num_patches": 1024,
    "context_embedder_config": {
        "target": "torch.nn.Linear", "params": {"in_features": CONTEXT_DIM, "out_features": 128},
    },
    "pos_embed_max_size": 32, "pos_embed_scaling_factor": None, "qk_norm": "rms",
}  # fmt: skip
LTXV = {
    "image_model": "ltxv", "in_channels": 128, "cross_attention_dim": 128, "attention_head_dim": 64,
    "num_attention_heads": 2, "caption_channels": CONTEXT_DIM, "num_layers": 2,
}  # fmt: skip
LTX2 = {
    **LTXV, "image_model": "ltxav", "cross_attention_dim": 256, "attention_head_dim": 128,
    "audio_in_channels": 128, "audio_cross_attention_dim": 128, "audio_attention_head_dim": 64,
    "audio_num_attention_heads": 2,
}  # fmt: skip
QWEN_IMAGE = {
    "image_model": "qwen_image", "in_channels": 64, "out_channels": 16, "num_layers": 2, "attention_head_dim": 128,
    "num_attention_heads": 2, "joint_attention_dim": CONTEXT_DIM,
}  # fmt: skip
LUMINA2 = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 192, "cap_feat_dim": CONTEXT_DIM,
    "n_layers": 3, "n_refiner_layers": 2, "n_heads": 2, "n_kv_heads": 1, "qk_norm": True, "axes_dims": [32, 32, 32],
    "axes_lens": [300, 512, 512], "ffn_dim_multiplier": 1.0,
}  # fmt: skip
Z_IMAGE = {
    **LUMINA2, "dim": 256, "n_kv_heads": 2, "axes_dims": [32, 48, 48], "rope_theta": 256.0,
    "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32,
}  # fmt: skip
COSMOS_PREDICT2 = {
    "image_model": "cosmos_predict2", "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16,
    "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "model_channels": 256, "num_blocks": 3,
    "num_heads": 2, "concat_padding_mask": True, "crossattn_emb_channels": CONTEXT_DIM, "pos_emb_cls": "rope3d",
    "pos_emb_learnable": True, "pos_emb_interpolation": "crop",
}  # fmt: skip
COSMOS = {
    **COSMOS_PREDICT2, "image_model": "cosmos", "block_config": "FA-CA-MLP", "block_x_format": "THWBD",
    "extra_per_block_abs_pos_emb": True, "extra_per_block_abs_pos_emb_type": "learnable",
}  # fmt: skip
# ComfyUI asserts the full-size width of the MLP, 12288.
MOCHI = {
    "image_model": "mochi_preview", "depth": 2, "patch_size": 2, "num_heads": 2, "hidden_size_x": 256,
    "hidden_size_y": 128, "mlp_ratio_x": 48.0, "mlp_ratio_y": 2.0, "learn_sigma": False, "in_channels": 12,
    "qk_norm": True, "qkv_bias": False, "out_bias": True, "attn_drop": 0.0, "patch_embed_bias": True,
    "posenc_preserve_area": True, "timestep_mlp_bias": True, "attend_to_padding": False, "timestep_scale": 1000.0,
    "use_t5": True, "t5_feat_dim": CONTEXT_DIM, "t5_token_length": CONTEXT_TOKENS, "rope_theta": 10000.0,
}  # fmt: skip
HIDREAM = {
    "image_model": "hidream", "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 2,
    "num_single_layers": 3, "attention_head_dim": 128, "num_attention_heads": 2, "text_emb_dim": 64,
    "caption_channels": [CONTEXT_DIM, CONTEXT_DIM], "num_routed_experts": 2, "num_activated_experts": 1,
    "axes_dims_rope": [64, 32, 32], "max_resolution": [32, 32], "llama_layers": [0, 1, 0, 1, 0],
}  # fmt: skip
AURA = {
    "in_channels": 4, "out_channels": 4, "patch_size": 2, "dim": 256, "n_layers": 4, "n_double_layers": 2,
    "n_heads": 1, "global_conddim": 256, "cond_seq_dim": CONTEXT_DIM, "max_seq": 32 * 32,
}  # fmt: skip

IMAGE = (1, 16, 8, 8)
VIDEO = (1, 16, 2, 8, 8)

FAMILIES = {
    "sd15": TinyFamily("SD15", SD15, (1, 4, 16, 16), UNET_PARTS, UNET_BLOCK),
    "sdxl": TinyFamily("SDXL", SDXL, (1, 4, 16, 16), UNET_PARTS, UNET_BLOCK, conditioning={"pooled_output": (1, 1280)}),
    "sd3": TinyFamily("SD3", SD3, IMAGE, {"joint": "joint_blocks"}, conditioning=POOLED),
    "flux": TinyFamily(
        "Flux", FLUX, IMAGE, DOUBLE_SINGLE, parameters="comfy.ldm.flux.model.FluxParams", conditioning=POOLED
    ),
    "chroma": TinyFamily(
        "Chroma", CHROMA, IMAGE, DOUBLE_SINGLE, parameters="comfy.ldm.chroma.model.ChromaParams", conditioning=POOLED
    ),
    "hunyuan_video": TinyFamily(
        *("HunyuanVideo", HUNYUAN_VIDEO, VIDEO, DOUBLE_SINGLE),
        parameters="comfy.ldm.hunyuan_video.model.HunyuanVideoParams",
        conditioning=POOLED,
    ),
    "wan": TinyFamily("WAN21_T2V", WAN, VIDEO, {"double": "blocks"}),
    "wan22_5b": TinyFamily("WAN22_T2V", {**WAN, "in_dim": 48, "out_dim": 48}, (1, 48, 2, 8, 8), {"double": "blocks"}),
    "wan_vace": TinyFamily(
        "WAN21_Vace",
        {**WAN, "model_type": "vace", "num_layers": 4, "vace_layers": 2, "vace_in_dim": 96},
        VIDEO,
        {"double": "blocks", "vace": "vace_blocks"},
    ),
    "ltxv": TinyFamily("LTXV", LTXV, (1, 128, 2, 4, 4), {"block": "transformer_blocks"}, conditioning=TEXT_MASK),
    "ltx2": TinyFamily(
        *("LTXAV", LTX2, ((1, 128, 2, 4, 4), (1, 8, 4, 16)), {"block": "transformer_blocks"}),
        conditioning=TEXT_MASK,
        context_dim=2 * CONTEXT_DIM,
    ),
    "qwen_image": TinyFamily("QwenImage", QWEN_IMAGE, (1, 16, 1, 8, 8), {"double": "transformer_blocks"}),
    "lumina2": TinyFamily(
        *("Lumina2", LUMINA2, IMAGE),
        {"double": "layers", "context_refiner": "context_refiner", "noise_refiner": "noise_refiner"},
        conditioning=TEXT_MASK,
    ),
    "z_image": TinyFamily(
        *("ZImage", Z_IMAGE, IMAGE),
        {"double": "layers", "context_refiner": "context_refiner", "noise_refiner": "noise_refiner"},
        conditioning=TEXT_MASK,
    ),
    "cosmos": TinyFamily("CosmosT2V", COSMOS, VIDEO, {"block": "blocks"}),
    "cosmos_predict2": TinyFamily("CosmosT2IPredict2", COSMOS_PREDICT2, VIDEO, {"block": "blocks"}),
    "mochi": TinyFamily(
        *("GenmoMochi", MOCHI, (1, 12, 2, 8, 8), {"block": "blocks"}),
        conditioning=TEXT_MASK,
    ),
    "hidream": TinyFamily(
        *("HiDream", HIDREAM, IMAGE, {"double": "double_stream_blocks", "single": "single_stream_blocks"}),
        conditioning={**POOLED, "conditioning_llama3": (1, 2, CONTEXT_TOKENS, CONTEXT_DIM)},
    ),
    "aura": TinyFamily("AuraFlow", AURA, (1, 4, 16, 16), {"double": "double_layers", "single": "single_layers"}),
}
