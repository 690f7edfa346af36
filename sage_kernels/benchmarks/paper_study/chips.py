"""Peak rates of chips, and the memory that attention takes: arithmetic, nothing measured."""

# Dense FLOPs a cycle and processor of the tensor cores with float32 accumulation, processors, boost clock in GHz, from
# NVIDIA's architecture papers.
RTX_5090 = {"16 bit": 512, "FP8": 1024, "FP4": 4096}
RTX_5090_PROCESSORS, RTX_5090_GHZ = 170, 2.407
H100 = {"16 bit": 4096, "FP8": 8192}
H100_PROCESSORS, H100_GHZ = 132, 1.83
# Dense TOPS as NVIDIA's data sheets have them for one GPU of the boards with the most power (GB200, GB300).
DATA_SHEET = {"B200": {"16 bit": 2500, "FP8": 5000, "FP4": 10000}, "B300": {"16 bit": 2500, "FP8": 5000, "FP4": 15000}}

NVFP4_BITS = 4 + 8 / 16
MXFP8_BITS = 8 + 8 / 32


def peak(operand: str) -> dict[str, float | None]:
    """Dense TOPS of each chip."""
    return {
        "B300": DATA_SHEET["B300"][operand],
        "B200": DATA_SHEET["B200"][operand],
        "RTX 5090": round(RTX_5090[operand] * RTX_5090_PROCESSORS * RTX_5090_GHZ / 1000, 1),
        "H100": round(H100[operand] * H100_PROCESSORS * H100_GHZ / 1000, 1) if operand in H100 else None,
    }


def attention_gigabytes(heads: int, tokens: int, head_dim: int) -> dict[str, float]:
    """What stands in memory while one attention runs, besides its output, in GB."""
    numbers = heads * tokens * head_dim
    operands = 3 * numbers * 2
    public_delta = heads * (tokens // 128) * tokens * 4
    codes = 3 * numbers * NVFP4_BITS / 8
    second_digit = numbers * NVFP4_BITS / 8
    means = numbers / 32 * NVFP4_BITS / 8
    return {
        "16-bit Q, K, V (FlashAttention)": operands / 1e9,
        "public SageAttention3: operands, codes, delta_s": (operands + codes + public_delta * 1.5) / 1e9,
        "ours, fp4: operands and codes": (operands + codes + second_digit + means) / 1e9,
        "ours, fp4, after prepare() with Q, K, V freed": (codes + second_digit + means) / 1e9,
    }


def cache_gigabytes(kv_heads: int, tokens: int, head_dim: int, layers: int) -> dict[str, float]:
    """Keys and values of all layers in GB."""
    numbers = 2 * kv_heads * tokens * head_dim * layers
    return {
        "bf16": numbers * 2 / 1e9,
        "4-bit codes alone (the paper's 75 %)": numbers / 2 / 1e9,
        "ours, groups of 16": numbers * NVFP4_BITS / 8 / 1e9,
        "ours, groups of 32": numbers * (4 + 8 / 32) / 8 / 1e9,
        "QServe, Atom: INT4, scale and zero per token and head": numbers * (4 + 32 / head_dim) / 8 / 1e9,
    }
