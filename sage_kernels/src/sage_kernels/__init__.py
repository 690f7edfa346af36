"""Low-bit attention for diffusion models: one function, several precisions, every refusal with its reason."""

from sage_kernels.attention import attention, explain, prepare, run
from sage_kernels.attention_call import PreparedAttention
from sage_kernels.capabilities import DeviceCapabilities, capabilities
from sage_kernels.dispatch import Decision, Refusal, UnsupportedAttention
from sage_kernels.training import trainable_attention

__version__ = "0.1.0"

__all__ = [
    "Decision",
    "DeviceCapabilities",
    "PreparedAttention",
    "Refusal",
    "UnsupportedAttention",
    "__version__",
    "attention",
    "capabilities",
    "explain",
    "prepare",
    "run",
    "trainable_attention",
]
