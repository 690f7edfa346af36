"""Figures of the paper and of its authors' answers to the reviewers, by the names of our rows."""

# Smoothing, all layers of CogVideoX-2B: cosine, relative L1, RMSE.
SMOOTHING = {
    "none": (0.915642, 0.33586, 0.30348),
    "SmoothQuant": (0.930125, 0.26761, 0.25288),
    "Hadamard": (0.941222, 0.26207, 0.22397),
    "smooth Q": (0.982848, 0.11565, 0.12586),
    "smooth K": (0.991176, 0.09483, 0.09766),
    "smooth Q and K (SageAttention3)": (0.99551, 0.06923, 0.07748),
}
# Precisions of the operands. The reviews' text lost the symbols of two rows in INT8; they are taken as P V and Q K.
PRECISIONS = {
    "P, V in FP4": (0.997848, 0.03883, 0.04104),
    "Q, K in FP4": (0.998853, 0.04044, 0.03976),
    "P, V in INT8": (0.999958, 0.00778, 0.00986),
    "Q, K in INT8": (0.999953, 0.00813, 0.01510),
    "all FP4 (SageAttention3)": (0.99551, 0.06923, 0.07748),
    "Q, K INT8, P, V FP8 (SageAttention2)": (0.99995, 0.00849, 0.00915),
}
# Accumulated L1 of CogVideoX-2B's layers: directly, and with the three most sensitive in FP16.
DRIFT = {1: (0.0076, 0.0076), 10: (0.0922, 0.0447), 20: (0.1146, 0.0773), 30: (0.0571, 0.0429)}
# Method: TOPS on an RTX 5090, on an H100, accuracy (cosine in percent).
TRADE_OFF = {
    "FlashAttention2": (214, 338, 100.0),
    "FlashAttention3 (16bit)": (None, 470, 100.0),
    "SageAttention1": (479, 518, 99.996),
    "SageAttention2 (8bit)": (643, 885, 99.995),
    "FlashAttention3 (8bit)": (None, 890, 98.570),
    "SageAttention3 (4bit)": (1038, None, 99.551),
}
# Theoretical TOPS: B300, B200, RTX 5090.
THEORETICAL = {
    "16 bit (FlashAttention3)": (2500, 2500, 209.5),
    "FP8 (FlashAttention3)": (5000, 5000, 419),
    "FP4 (SageAttention3)": (15000, 10000, 1676),
}
# 4-bit caches, Qwen2.5: wikitext perplexity, LAMBADA.
CACHES = {"QServe": (10.90296, 0.631), "Atom": (10.89669, 0.631), "SageAttention3": (9.56827, 0.726)}
# What needs checkpoints, data or GPUs that a clean clone has not: the table, and why it isn't here.
NOT_REPRODUCED = {
    "INT8 and BF16 fine-tuning followed by FP4 inference (GSM8K, MMLU of Qwen2.5)": "needs Qwen2.5's weights and data",
    "wikitext perplexity and LAMBADA of Qwen2.5 and Llama 3.2": "needs their weights; the sentence model stands in",
    "CLIPSIM, VQA, FScore of CogVideoX, Hunyuan and Mochi": "needs their weights; end to end uses the demo model",
    "prefill latency and speed on the RTX 5090": "no RTX 5090 was at hand; nothing measured elsewhere is shown for it",
    "training latency of Llama 3.1 and Qwen 3": "needs their weights; attention's own times are in results/",
    "gradient accuracy of SageBwd by matmul and format": "belongs to trainable_attention's own tests and benchmarks",
}
