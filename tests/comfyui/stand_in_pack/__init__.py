"""A node pack without nodes: lets small text encoders stand in for those that take gigabytes.

A file says in its safetensors metadata, as "stand_in", what ComfyUI can't see in its tensors: {"model_options": as
comfy.sd.load_clip takes them, "te_model": name in comfy.sd.TEModel, or null for what ComfyUI detects}.
"""

import json
from typing import Any

import comfy.sd
import comfy.text_encoders.hunyuan_video
import safetensors

NODE_CLASS_MAPPINGS: dict[str, Any] = {}
_load_clip, _detect = comfy.sd.load_clip, comfy.sd.detect_te_model
_START, _FIRST_BYTE = 0, 1


class ByteTokenizer:
    """Stands in for the tokenizer of Llama 3, whose vocabulary some checkouts leave out: a token is a byte."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def tokenize_with_weights(self, text: str, *_: Any, **__: Any) -> list[list[tuple[int, float]]]:
        return [[(token, 1.0) for token in (_START, *(_FIRST_BYTE + byte for byte in text.encode()))]]


def load_clip(ckpt_paths: list[str], *args: Any, **kwargs: Any) -> Any:
    """comfy.sd.load_clip for files of which some are stand-ins."""
    model_options = dict(kwargs.pop("model_options", {}))
    te_models: list[str] = []
    for path in ckpt_paths:
        with safetensors.safe_open(path, framework="pt") as file:
            note = json.loads((file.metadata() or {}).get("stand_in", "{}"))
        model_options.update(note.get("model_options", {}))
        te_models += [note["te_model"]] if note.get("te_model") else []
    comfy.sd.detect_te_model = lambda sd: comfy.sd.TEModel[te_models[0]] if te_models else _detect(sd)
    try:
        return _load_clip(ckpt_paths, *args, model_options=model_options, **kwargs)
    finally:
        comfy.sd.detect_te_model = _detect


comfy.sd.load_clip = load_clip
comfy.text_encoders.hunyuan_video.LLAMA3Tokenizer = ByteTokenizer
