"""What each idea costs on sm_120 and what became of it. Costs are a model; gains are in results/paper.json.

A tile is 16 query rows by 128 keys of one warp at head_dim 128; the FP4 kernel's budget is 560 instructions for it, 64
of them MMAs. "Preparation" is the pass that smooths and quantises; what it costs once is no cost of the inner loop.
"""

# Row of the table "ideas": (cost model, verdict)
VERDICTS = {
    "+ P divided by the rounded scale": (
        "none: the exponent's argument holds the division",
        "adopted: it is what the products use, so the error has no bias",
    ),
    "row sum of quantised P (without V mean removal)": (
        "2 MMAs a tile against a column of ones, in place of 64 FADD",
        "adopted for its cost; with V's mean in place it also removes a bias",
    ),
    "+ V mean removed": (
        "none in the loop; 1 FADD an output element; V's mean in the pass that takes K's",
        "adopted: the largest gain wherever V has means",
    ),
    "+ row sum of quantised P": (
        "2 MMAs a tile against a column of ones, in place of 64 FADD",
        "adopted for its cost: with V centred it is 2 to 4 % less accurate than the plain sum",
    ),
    "+ 64 rows per Q mean, exact delta_s": ("delta_s of N / 64 x N floats a head in memory", "rejected: its memory"),
    "+ 32 rows per Q mean, exact delta_s": ("delta_s of N / 32 x N floats a head in memory", "rejected: its memory"),
    "+ 16 rows per Q mean, exact delta_s": ("delta_s of N / 16 x N floats a head in memory", "rejected: its memory"),
    "+ 32 rows, delta_s from FP4 digits": (
        "a second FP4 digit of K: 4.5 bits more for each of its numbers; 1/8 to 1/4 of the Q K MMAs more; no delta_s "
        "in memory",
        "adopted: the accuracy of exact delta_s without its matrix",
    ),
    "+ headroom of 3 powers of two, steps of 32 keys": (
        "saves the rescaling of O in most steps: 64 FMUL",
        "adopted: free accuracy-wise",
    ),
    "+ 3 of 8 exponentials by a line": (
        "24 MUFU fewer of 64 a tile; as many integer instructions more",
        "adopted: P keeps three significant bits, the line is within its rounding",
    ),
    "that + four over six for V alone": ("none in the loop; a second rounding of V in preparation", "see K, V"),
    "that + four over six for K alone": ("none in the loop; a second rounding of K in preparation", "see K, V"),
    "+ four over six for K, V = ours (fp4)": (
        "none in the loop, no bytes; a second rounding of K's first digit and of V in preparation",
        "adopted in the format, the reference, the FP4 kernel's preparation and the FP4 cache",
    ),
    "ours with the row sum of P before rounding": (
        "64 FADD a tile in place of 2 MMAs",
        "not adopted: a few percent of accuracy for 11 % of the instructions",
    ),
    "ours + the mean that rounded V lacks": (
        "none in the loop; a sum of V less rounded V for each channel in preparation",
        "open: INT8 does so; a few percent where V has means",
    ),
    "ours + four over six for Q": (
        "none in the loop; a second rounding of Q in preparation",
        "open: Q's preparation would take it too; measured in the reference only",
    ),
    "ours + four over six for Q, P": (
        "P is rounded twice and compared in the loop: about 200 of 560 instructions more",
        "rejected: the gain is far below its cost",
    ),
    "ours + rotation after smoothing": (
        "none in the loop; 7 butterfly stages for each row of Q and K in preparation",
        "not in the FP4 kernel: much on the trained model, nothing on the synthetic sets; adopted in the FP4 cache",
    ),
    "ours + four over six for Q + rotation": ("both", "the next step for the FP4 kernel's preparation"),
    "ours with 16 rows per Q mean": (
        "8 means for 128 rows instead of 4: the same m16 MMA tile, twice the mean's preparation",
        "open: gains where neighbours are alike; the kernel's tile has room for it",
    ),
    "ours with 64 rows per Q mean": ("no fewer MMAs than 32", "rejected: less accurate at the same cost"),
    "rank 4 of the means of 128 rows, exact delta_s": ("a decomposition of the means in preparation", "rejected"),
    "rank 16 of the means of 128 rows, exact delta_s": (
        "a decomposition of the means in preparation; 1/8 of Q K MMAs more",
        "rejected: small blocks of exact means do better without a decomposition",
    ),
    "fp8_fp4 (Q, K in MXFP8)": (
        "Q K at half the FP4 rate, 16 products a tile for K's rounding error; K at 12.75 bits with that error",
        "adopted as a rung of its own",
    ),
    "fp8_fp4 without four over six for V": ("the same in the loop", "rejected: four over six is free there"),
    "fp8_fp4 + rotation after smoothing": (
        "none in the loop; 7 butterfly stages for each row of Q and K in preparation",
        "open, as for fp4",
    ),
    "Q, K in MXFP8, no smooth Q": (
        "no delta_s at all",
        "rejected: with sharp attention K's rounding error costs too much",
    ),
    "Q, K in MXFP8, 128 rows per Q mean, exact delta_s": (
        "delta_s of N / 128 x N floats a head in memory",
        "rejected: its memory",
    ),
    "Q, K in MXFP8, 32 rows per Q mean, exact delta_s": (
        "delta_s of N / 32 x N floats a head in memory",
        "rejected: its memory",
    ),
    "Q, K in FP4 as ours, P, V in FP8": (
        "P V at half the FP4 rate: 1.5 x the MMA time; V at 8 bits",
        "rejected: with sharp attention Q K is what errs, and fp8_fp4 costs the same",
    ),
}
