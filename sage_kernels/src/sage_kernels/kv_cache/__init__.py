"""An FP4 cache of keys and values for decoding, where reading them is what attention waits for."""

from sage_kernels.kv_cache.cache import KVCache

__all__ = ["KVCache"]
