"""SageBwd: attention in INT8 that can be trained through (SageAttention3, section 4)."""

from sage_kernels.training.attention import emulated_attention, trainable_attention

__all__ = ["emulated_attention", "trainable_attention"]
