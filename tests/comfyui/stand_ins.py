"""Small random models under the names of the files that the big templates ask for. Imported inside ComfyUI only.

The diffusion models have the real number of blocks and one head of the real size, so that the texts for FP16 blocks of
the templates fit; ComfyUI detects them by their tensors. VAEs and CLIP-L are whole. Other text encoders say in their
metadata how small they are, for stand_in_pack.
"""

import dataclasses
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import comfy.clip_model
import comfy.model_detection
import comfy.ops
import comfy.text_encoders.llama
import comfy.text_encoders.t5
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL, AutoencodingEngine
from comfy.ldm.wan.vae import WanVAE
from family_models import FAMILIES, TinyFamily
from safetensors.torch import save_file
from tiny_models import build_family, initialise

Tensors = dict[str, torch.Tensor]
WIDTH, TEXT_DIM, LLAMA_DIM = 128, 64, 128  # one head of 128
WAN_TEXT_DIM = 4096  # ComfyUI doesn't read it from the file
# As ComfyUI sets them for the VAEs of Flux and HunyuanVideo.
VAE = {
    "double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
    "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
T5 = {
    "d_ff": 128, "d_kv": 64, "num_heads": 1, "num_layers": 2, "dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True,
    "relative_attention_num_buckets": 32, "layer_norm_epsilon": 1e-6,
}  # fmt: skip
CLIP_L = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "hidden_act": "quick_gelu", "max_position_embeddings": 77, "eos_token_id": 49407,
}  # fmt: skip
LLAMA = {
    "vocab_size": 320, "hidden_size": LLAMA_DIM, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 1, "num_key_value_heads": 1,
}  # fmt: skip


def write_stand_ins(nodes: Any, template: str, folder: str) -> list[str]:
    """Write the files of a template into a `models` folder; names of those that ComfyUI would take for larger ones."""
    unknown = []
    for name, (make, note) in FILES[template].items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {key: tensor.contiguous() for key, tensor in make().items()}
        save_file(tensors, path, {"stand_in": json.dumps(note)} if note else None)
        if name.startswith("diffusion_models/"):
            found = comfy.model_detection.detect_unet_config(tensors, "")
            width = found.get("dim", found.get("hidden_size"))
            unknown += [] if width == WIDTH else [f"{name} ({width} wide)"]
    return unknown


def _diffusion_model(family: str, **unet: Any) -> Callable[[], Tensors]:
    def make() -> Tensors:
        small: TinyFamily = FAMILIES[family]
        return build_family(dataclasses.replace(small, unet={**small.unet, **unet})).diffusion_model.state_dict()

    return make


def _module(make: Callable[[], torch.nn.Module]) -> Callable[[], Tensors]:
    def tensors() -> Tensors:
        model = make()
        initialise(model, torch.Generator().manual_seed(0))
        return {key: tensor.to(torch.float16) for key, tensor in model.state_dict().items()}

    return tensors


def _text_encoder(kind: type, config: Mapping[str, Any]) -> Callable[[], Tensors]:
    return _module(lambda: kind(dict(config), torch.float32, torch.device("cpu"), comfy.ops.manual_cast))


def _umt5() -> Tensors:
    import sentencepiece  # noqa: PLC0415  (one of ComfyUI's requirements)

    model = io.BytesIO()
    letters = ["abcdefghijklmnopqrstuvwxyz .,-"] * 2
    options = {"vocab_size": 40, "model_type": "char", "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(letters), model_writer=model, **options)
    encoder = _text_encoder(comfy.text_encoders.t5.T5, UMT5)()
    return {**encoder, "spiece_model": torch.frombuffer(bytearray(model.getvalue()), dtype=torch.uint8)}


UMT5 = {**T5, "model_type": "umt5", "d_model": WAN_TEXT_DIM, "vocab_size": 64}
T5_XXL = {**T5, "model_type": "t5", "d_model": TEXT_DIM, "vocab_size": 32128}
_WAN = (
    _diffusion_model("wan", dim=WIDTH, num_heads=1, ffn_dim=256, num_layers=40, text_dim=WAN_TEXT_DIM, freq_dim=256),
    None,
)
_CLIP_L = (_text_encoder(comfy.clip_model.CLIPTextModel, CLIP_L), None)
_STREAMS = {"hidden_size": WIDTH, "num_heads": 1, "mlp_ratio": 4.0, "vec_in_dim": 768}
# Template -> file below models/ -> (what makes its tensors, note for stand_in_pack).
FILES: dict[str, dict[str, tuple[Callable[[], Tensors], dict[str, Any] | None]]] = {
    "wan22_t2v_fp4": {
        "diffusion_models/wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors": _WAN,
        "diffusion_models/wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors": _WAN,
        "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors": (
            _umt5,
            {"te_model": "T5_XXL", "model_options": {"umt5xxl_model_config": UMT5, "clip_umt5xxl_model_config": UMT5}},
        ),
        "vae/wan_2.1_vae.safetensors": (
            _module(lambda: WanVAE(dim=96, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[])),
            None,
        ),
    },
    "flux_fp4": {
        "diffusion_models/flux1-dev.safetensors": (
            _diffusion_model("flux", depth=19, depth_single_blocks=38, context_in_dim=TEXT_DIM, **_STREAMS),
            None,
        ),
        "text_encoders/clip_l.safetensors": _CLIP_L,
        "text_encoders/t5xxl_fp16.safetensors": (
            _text_encoder(comfy.text_encoders.t5.T5, T5_XXL),
            {"model_options": {"t5xxl_model_config": T5_XXL}},
        ),
        "vae/ae.safetensors": (
            _module(
                lambda: AutoencodingEngine(
                    regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
                    encoder_config={"target": "comfy.ldm.modules.diffusionmodules.model.Encoder", "params": VAE},
                    decoder_config={"target": "comfy.ldm.modules.diffusionmodules.model.Decoder", "params": VAE},
                )
            ),
            None,
        ),
    },
    "hunyuan_video_fp4": {
        "diffusion_models/hunyuan_video_t2v_720p_bf16.safetensors": (
            _diffusion_model("hunyuan_video", depth=20, depth_single_blocks=40, context_in_dim=LLAMA_DIM, **_STREAMS),
            None,
        ),
        "text_encoders/clip_l.safetensors": _CLIP_L,
        "text_encoders/llava_llama3_fp8_scaled.safetensors": (
            _text_encoder(comfy.text_encoders.llama.Llama2, LLAMA),
            {"model_options": {"llama_model_config": LLAMA}},
        ),
        "vae/hunyuan_video_vae_bf16.safetensors": (
            _module(lambda: AutoencoderKL(ddconfig={**VAE, "conv3d": True, "time_compress": 4}, embed_dim=16)),
            None,
        ),
    },
}  # fmt: skip
