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
# Every table of the authors' answers, by the reviewer whom it answers: what it shows, and where it is here or why not.
REVIEW_TABLES = (
    ("wcep 1, 2; VcmM 1, 2", "BF16 or INT8 fine-tuning, then FP4 inference: GSM8K, MMLU of Qwen2.5",
     "not with Qwen2.5, which needs its weights and data; `TRAINING.md` does it with a small language model"),
    ("wcep 3; Czmu 1", "QServe, Atom, SageAttention3: wikitext perplexity, LAMBADA, prefill latency, decoding",
     "4-bit caches of keys and values: accuracy on the tensors here, decoding measured on an H100; perplexities and "
     "prefill on an RTX 5090 need Qwen2.5's weights and that GPU"),
    ("wcep 4; Czmu 2", "QServe, Atom, SageAttention3 on CogVideoX: CLIPSIM, VQA, FScore, latency",
     "not with CogVideoX, which needs its weights; end to end scores the demo model's videos instead"),
    ("wcep 5, 6", "INT8 and FP8 SageBwd: L1 and cosine of dQ, dK, dV", "`TRAINING.md`"),
    ("wcep 7, 8", "INT8 or FP8 fine-tuning, then FP4 inference: GSM8K, MMLU of Qwen2.5", "as wcep 1, 2"),
    ("Czmu 3", "theoretical TOPS by chip", "theoretical TOPS by chip"),
    ("Czmu 4", "accuracy by the precision of Q, K, P, V", "precision of Q K and of P V"),
    ("Czmu 5", "speed and accuracy of all methods", "speed against accuracy"),
    ("DSm8 1", "BF16 and SageAttention3 on Llama 3.2: perplexity, LAMBADA, prefill latency",
     "needs Llama's weights; the causal kernel's accuracy is in tests/gpu/evidence"),
    ("DSm8 2", "gradients by which matmul stays in 16 bit", "`TRAINING.md`"),
    ("DSm8 3", "accumulated error by layer, with sensitive layers in FP16", "accumulated error by layer"),
    ("DSm8 4", "accuracy by smoothing", "smoothing, everything in FP4"),
    ("VcmM 3", "training latency of Llama 3.1 and Qwen 3 by part",
     "needs their weights; forward and backward of attention alone are in results/training.json"),
    ("VcmM Q1", "memory for long sequences (in words)", "memory for long sequences"),
    ("Czmu Q1", "why P is stretched to 448 x 6 (in words)", "two-level against direct quantisation of P"),
)  # fmt: skip
