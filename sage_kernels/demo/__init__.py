"""A small trained Wan-architecture video model of moving handwritten digits, with its data, sampler and training."""
