"""One training run: batches, optimiser, learning rate; on a GPU every step is one replay of a CUDA graph."""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .attention_methods import Attention
from .language_model import LanguageModel

EAGER_STEPS = 3  # before a graph is captured: they allocate what the optimiser and the kernels keep


@dataclass(frozen=True)
class RunConfig:
    """Length, batch and learning rate: linear warm-up, then a cosine down to a tenth."""

    steps: int
    batch: int = 8
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0

    def rate(self, step: int) -> float:
        """Learning rate of a step, from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


@dataclass(frozen=True)
class RunResult:
    """float32 [steps] each, on the CPU, and seconds of the run without its first steps' compilation."""

    losses: Tensor
    gradient_norms: Tensor
    seconds: float
    steps_per_second: float


class Trainer:
    """Trains a model in place.

    Args:
        model: on the device of `text`; its `attend` computes the attention.
        text: uint8 [bytes] to draw from.
        seed: of the places that batches are taken from; the same for every method.
    """

    def __init__(self, model: LanguageModel, text: Tensor, config: RunConfig, seed: int) -> None:
        self.model, self.text, self.config = model, text, config
        device = text.device
        self._on_gpu = device.type == "cuda"
        span = model.config.context + 1
        generator = torch.Generator().manual_seed(seed)
        self._starts = torch.randint(len(text) - span, (config.steps, config.batch), generator=generator).to(device)
        self._span = torch.arange(span, device=device)
        self._start = self._starts[0].clone()
        self._rate = torch.zeros((), device=device)
        decayed = [p for p in model.parameters() if p.ndim == 2]
        plain = [p for p in model.parameters() if p.ndim != 2]
        options: dict[str, Any] = {"fused": True, "capturable": True} if self._on_gpu else {}
        self._optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=self._rate if self._on_gpu else 1.0,
            betas=(0.9, 0.95),
            **options,
        )
        self._losses = torch.zeros(config.steps, device=device)
        self._norms = torch.zeros(config.steps, device=device)

    def run(self, name: str) -> RunResult:
        """All steps."""
        graph, began = None, time.perf_counter()
        for step in tqdm(range(self.config.steps), desc=name, mininterval=2, ncols=80):
            self._prepare(step)
            if step == EAGER_STEPS:
                if self._on_gpu:
                    graph, outputs = self._capture()
                began = time.perf_counter()
            if graph is None:
                outputs = self._step_apart()
            else:
                graph.replay()
            self._losses[step], self._norms[step] = outputs
        losses, norms = self._losses.cpu(), self._norms.cpu()  # waits for the GPU
        seconds = time.perf_counter() - began
        return RunResult(losses, norms, seconds, max(1, self.config.steps - EAGER_STEPS) / max(seconds, 1e-9))

    def _prepare(self, step: int) -> None:
        """Batch and learning rate of a step, where the step reads them."""
        self._start.copy_(self._starts[step])
        self._rate.fill_(self.config.rate(step))
        if not self._on_gpu:
            for group in self._optimizer.param_groups:
                group["lr"] = self.config.rate(step)

    def _capture(self) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]:
        """A step as a graph, and the tensors that hold its results after each replay."""
        torch.cuda.synchronize()
        self._optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self._step()
        return graph, outputs

    def _step_apart(self) -> tuple[Tensor, Tensor]:
        """A step outside of a graph, on a stream of its own as a capture wants it."""
        if not self._on_gpu:
            return self._step()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outputs = self._step()
        torch.cuda.current_stream().wait_stream(stream)
        return outputs

    def _step(self) -> tuple[Tensor, Tensor]:
        """Loss and gradient norm of the batch at `_start`, after which the model has moved."""
        self._optimizer.zero_grad(set_to_none=True)
        batch = self.text[self._start[:, None] + self._span].long()
        with autocast(self._on_gpu):
            loss = self.model.loss(batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self._optimizer.step()
        return loss.detach(), norm


def autocast(on_gpu: bool) -> torch.autocast:
    """bfloat16 on a GPU; on a CPU, where its products are slow, float32. Casts are not kept, for CUDA graphs."""
    return torch.autocast("cuda" if on_gpu else "cpu", torch.bfloat16, enabled=on_gpu, cache_enabled=False)


@torch.no_grad()
def evaluate(model: LanguageModel, text: Tensor, attend: Attention, batch: int = 8) -> Tensor:
    """Mean nats a byte of each window of a context's length with `attend` as attention; float64 [windows], CPU."""
    span = model.config.context
    windows = (len(text) - 1) // span
    starts = torch.arange(windows, device=text.device) * span
    reach = torch.arange(span + 1, device=text.device)
    trained_with, model.attend = model.attend, attend
    found = []
    try:
        for some in starts.split(batch):
            rows = text[some[:, None] + reach].long()
            with autocast(text.is_cuda):
                logits = model(rows[:, :-1])
            losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), rows[:, 1:], reduction="none")
            found.append(losses.double().mean(1))
    finally:
        model.attend = trained_with
    return torch.cat(found).cpu()
