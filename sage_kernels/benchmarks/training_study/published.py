"""What the paper's authors report of SageBwd, in the paper and in its reviews."""

SPEED_UP = 1.67  # forward and backward pass over FlashAttention 2, at most, RTX 4090

# L1 / cosine of dQ, dK and dV over all layers of CogVideoX-2B (reviews, tables 5 and 6).
GRADIENTS = {
    "int8": ("0.0290 / 0.9987", "0.0317 / 0.9993", "0.0423 / 0.9995"),
    "fp8": ("0.0696 / 0.9880", "0.0999 / 0.9910", "0.0873 / 0.9955"),
}
GOALS = {"dq": 0.0290, "dk": 0.0317, "dv": 0.0423}

# L1 of dQ, dK and dV where every backward matmul is quantised but one (reviews, table 2), and our row of the same.
ALL_BUT_ONE = {
    "(1) dO V^T": ("0.3308", "0.1826", None),
    "(2) dS K": ("0.6326", None, None),
    "(3) dS^T Q": (None, "0.2003", None),
    "(4) P^T dO": (None, None, "0.0901"),
    "none": ("0.6399", "0.2014", "0.1220"),
}
ALL_BUT_ONE_METHODS = {
    "(1) dO V^T": "int8, every matmul but dp",
    "(2) dS K": "int8, every matmul but dq",
    "(3) dS^T Q": "int8, every matmul but dk",
    "(4) P^T dO": "int8, every matmul but dv",
    "none": "int8, every matmul",
}

# Change of the total training latency by SageBwd (reviews, table 3), by our name of the shape.
LAYER = {
    "llama3.1-8b_16384": 766.3 / 885.18 - 1,
    "llama3.1-8b_32768": 2754.5 / 3224.5 - 1,
    "qwen3-8b_16384": 755.51 / 876.29 - 1,
    "qwen3-8b_32768": 2724.2 / 3192.3 - 1,
}
