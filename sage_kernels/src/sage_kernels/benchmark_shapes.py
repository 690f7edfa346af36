"""The shapes that attention is timed at, by the names that tables and result files use."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BenchmarkShape:
    """Self-attention of one model.

    Attributes:
        name: in tables and result files.
        batch, heads, length, head_dim: B, H, N (queries and keys), D.
        is_causal: whether it is masked causally.
    """

    name: str
    batch: int
    heads: int
    length: int
    head_dim: int
    is_causal: bool = False

    @property
    def flops(self) -> float:
        """Floating-point operations of one forward pass: 4 B H N^2 D, half of it where causal."""
        return 4.0 * self.batch * self.heads * self.length**2 * self.head_dim * (0.5 if self.is_causal else 1.0)

    def __str__(self) -> str:
        return f"{self.name} {self.batch},{self.heads},{self.length},{self.head_dim}" + " causal" * self.is_causal


FORWARD_SHAPES: tuple[BenchmarkShape, ...] = (
    BenchmarkShape("flux", 1, 24, 4608, 128),
    BenchmarkShape("wan480p", 1, 40, 32760, 128),
    BenchmarkShape("wan720p", 1, 40, 75600, 128),
    BenchmarkShape("cogvideox2b", 1, 30, 17776, 64),
    BenchmarkShape("sdxl", 2, 10, 4096, 64),
    BenchmarkShape("llm32k", 1, 32, 32768, 128, is_causal=True),
    BenchmarkShape("hunyuan", 1, 24, 65536, 128),
)

TRAINING_SHAPES: tuple[BenchmarkShape, ...] = (
    BenchmarkShape("train16k_causal", 1, 32, 16384, 128, is_causal=True),
    BenchmarkShape("train16k", 1, 32, 16384, 128),
    BenchmarkShape("train8k_d64", 4, 32, 8192, 64, is_causal=True),
)
