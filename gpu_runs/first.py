"""Correctness on random cases, accuracy at length, timings, a small sweep. Run: PYTHONPATH=sage_kernels/src python gpu_runs/first.py"""

import itertools, multiprocessing, random, sys, time, warnings
from dataclasses import replace

START = time.time()
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import sage_kernels
from sage_kernels.attention_call import make_call
from sage_kernels.kernels import int8_triton
from sage_kernels.kernels.int8_configs import AttentionConfig
from sage_kernels.reference import attention_fp32, quantized_attention

torch.backends.cuda.matmul.allow_tf32 = False
SHAPES = {
    "flux": (1, 24, 4608, 128, False), "wan480p": (1, 40, 32760, 128, False), "wan720p": (1, 40, 75600, 128, False),
    "cogvideox2b": (1, 30, 17776, 64, False), "sdxl": (2, 10, 4096, 64, False), "llm32k": (1, 32, 32768, 128, True),
    "hunyuan": (1, 24, 65536, 128, False),
}
SWEEP = [(bm, bn, w, st, sm, pt) for bm, bn, w, st in [(128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3), (64, 128, 4, 3), (64, 64, 4, 3), (64, 64, 4, 4)] for sm in (1,) for pt in (False,)]
SWEEP += [(128, 128, 8, 3, 0, False), (128, 128, 8, 3, 2, False), (128, 128, 8, 3, 1, True), (64, 128, 4, 3, 2, False), (128, 64, 4, 3, 0, False), (128, 64, 8, 3, 2, False)]
KERNEL = {k.precision: k for k in int8_triton.KERNELS}


def config_of(row):
    return AttentionConfig(*row[:4], partial_sums=row[5], sum=row[4])


def l1(a, b):
    return ((a.float() - b.float()).abs().sum() / b.float().abs().sum()).item()


def data(b, h, n, d, hkv=None, nk=None, dtype=torch.bfloat16, bias=True):
    q = torch.randn(b, h, n, d, device="cuda", dtype=dtype)
    k = torch.randn(b, hkv or h, nk or n, d, device="cuda", dtype=dtype)
    if bias:
        k += 2 * torch.randn(1, hkv or h, 1, d, device="cuda", dtype=dtype)
    return q, k, torch.randn(b, hkv or h, nk or n, d, device="cuda", dtype=dtype)


def call_of(q, k, v, precision, **o):
    g = q.shape[1] != k.shape[1]
    return make_call(q, k, v, o.get("attn_mask"), o.get("is_causal", False), o.get("scale"), g, o.get("key_lengths"), "BHND", precision, o.get("lse", False), False)


def warm(job):
    torch.set_num_threads(1)
    d, precision, row, causal = job
    try:
        state = KERNEL[precision].prepare(call_of(*data(1, 2, 256, d), precision, is_causal=causal))
        KERNEL[precision].run(replace(state, config=config_of(row) if row else state.config))
        torch.cuda.synchronize()
    except Exception as error:
        return f"{job}: {str(error)[:150]}"


def correctness_case(number):
    torch.set_num_threads(1)
    rng = random.Random(number)
    torch.manual_seed(number)
    d = [64, 128, 40, 256, 80, 128, 96, 32][number % 8]
    b, hkv, g = rng.randint(1, 2), rng.randint(1, 3), rng.choice([1, 1, 2])
    nq, nk = rng.choice([1, 77, 128, 300, 1000]), rng.choice([1, 63, 128, 129, 500, 1100])
    kind = ["none", "causal", "bool", "additive", "lengths"][number % 5]
    dtype = [torch.bfloat16, torch.float16, torch.float32][number % 3] if number >= 16 else torch.bfloat16
    q, k, v = data(b, hkv * g, nq, d, hkv, nk, dtype)
    if number % 4 == 1:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    o = {"is_causal": kind == "causal"}
    shape = rng.choice([(b, hkv * g, nq, nk), (b, 1, 1, nk), (nq, nk), (1, 1, nq, 1)])
    if kind == "bool":
        o["attn_mask"] = torch.rand(shape, device="cuda") > 0.3
    if kind == "additive":
        o["attn_mask"] = torch.randn(shape, device="cuda", dtype=dtype).masked_fill(torch.rand(shape, device="cuda") > 0.9, -torch.inf)
    if kind == "lengths":
        o["key_lengths"] = torch.tensor([rng.randint(0, nk) for _ in range(b)], dtype=torch.int32, device="cuda")
    o["scale"] = rng.choice([None, None, -0.1])
    rows = []
    for precision, kernel in KERNEL.items():
        try:
            call = call_of(q, k, v, precision, lse=True, **o)
            before = [x.clone() for x in (q, k, v)]
            out, lse = kernel.run(kernel.prepare(call))
            inputs = [x.bfloat16() if dtype == torch.float32 else x for x in (q, k, v)]
            ref, ref_lse = quantized_attention(*inputs, kernel.recipe(call), **o)
            exact, _ = attention_fp32(*inputs, **o)
            finite = ref_lse.isfinite()
            e = {"lse": (lse - ref_lse)[finite].abs().max().item() if finite.any() else 0.0}
            e["ref_fp32out" if dtype == torch.float32 else "ref_16bit"] = l1(out, ref) if ref.any() else out.float().abs().max().item()
            e["fp32"] = l1(out, exact) if exact.any() else 0.0
            bad = e["fp32"] > (0.06 if precision == "int8" else 0.03) or not torch.equal(finite, lse.isfinite()) or not all(torch.equal(x, y) for x, y in zip(before, (q, k, v)))
            bad |= max(e.get("ref_16bit", 0), e.get("ref_fp32out", 0)) > 0.01
        except Exception as error:
            bad, e = True, {"error": str(error)[:300]}
        rows.append((precision, bad, e, (number, precision, (b, hkv * g, hkv, nq, nk, d), kind, shape, dtype, o["scale"])))
    return rows


def correctness(results):
    worst, failures = {}, 0
    for precision, bad, e, case in itertools.chain(*results):
        if bad:
            failures += 1
            print("BAD", case, e)
        for name, value in e.items():
            if name != "error":
                worst[precision, name] = max(worst.get((precision, name), 0), value)
    print("correctness: failures", failures, "worst", {" ".join(n): f"{v:.1e}" for n, v in worst.items()}, f"{time.time() - START:.0f} s")


def accuracy():
    for n in (4096, 32760):
        torch.manual_seed(1)
        q, k, v = data(1, 4, n, 128)
        q = q[:, :, :1024].contiguous()
        exact, _ = attention_fp32(q, k, v)
        for precision, rows in (("int8", [(128, 128, 8, 3, s, p) for s, p in ((0, False), (1, False), (2, False), (1, True))]), ("int8_fp16", [None])):
            for row in rows:
                state = KERNEL[precision].prepare(call_of(q, k, v, precision))
                out, _ = KERNEL[precision].run(replace(state, config=config_of(row) if row else state.config))
                print(f"accuracy N={n} {precision} {row}: rel L1 {l1(out, exact):.5f}", end=" | ")
        call = call_of(q, k, v, "int8")
        print("reference", f"{l1(quantized_attention(q, k, v, KERNEL['int8'].recipe(call))[0], exact):.5f}")


def bench(function, seconds=0.25):
    function()
    torch.cuda.synchronize()
    a, b = torch.cuda.Event(True), torch.cuda.Event(True)
    a.record(); function(); b.record(); torch.cuda.synchronize()
    repeats = max(3, min(30, int(seconds * 1e3 / max(a.elapsed_time(b), 1e-3))))
    events = [(torch.cuda.Event(True), torch.cuda.Event(True)) for _ in range(repeats)]
    for a, b in events:
        a.record(); function(); b.record()
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in events)[repeats // 2]


def timings():
    for name, (b, h, n, d, causal) in SHAPES.items():
        q, k, v = data(b, h, n, d)
        flops = 4 * b * h * n * n * d / (2 if causal else 1)
        row = {}
        for label, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
            with sdpa_kernel(backend):
                row[label] = bench(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal))
        for precision, kernel in KERNEL.items():
            call = call_of(q, k, v, precision, is_causal=causal)
            row[precision] = bench(lambda: kernel.run(kernel.prepare(call)))
            state = kernel.prepare(call)
            row[precision + "/kernel"] = bench(lambda: kernel.run(state))
            row[precision + "/prepare"] = bench(lambda: kernel.prepare(call))
        print(f"{name:12}", " ".join(f"{m} {t:.3f}ms" + ("" if "prepare" in m else f" {flops / t / 1e9:.0f}T") + ";" for m, t in row.items()), flush=True)


def sweep():
    for name in ("flux", "wan480p", "sdxl", "cogvideox2b", "llm32k"):
        b, h, n, d, causal = SHAPES[name]
        h = h if n < 8000 else h // 2
        q, k, v = data(b, h, n, d)
        flops = 4 * b * h * n * n * d / (2 if causal else 1)
        for precision in ("int8", "int8_fp16"):
            state = KERNEL[precision].prepare(call_of(q, k, v, precision, is_causal=causal))
            results = []
            for row in SWEEP if precision == "int8" else [r for r in SWEEP if r[4] == 1 and not r[5]]:
                if precision == "int8_fp16" and name not in ("wan480p", "sdxl"):
                    continue
                try:
                    results.append((bench(lambda: KERNEL[precision].run(replace(state, config=config_of(row))), 0.1), row))
                except Exception as error:
                    results.append((9e9, (row, str(error)[:60])))
            if results:
                print("sweep", name, precision, " ".join(f"{row}:{flops / t / 1e9:.0f}" for t, row in sorted(results, key=lambda r: r[0])), flush=True)
        print(f"{time.time() - START:.0f} s")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    jobs = [(d, "int8", row, causal) for d, causal in ((128, False), (64, False), (128, True)) for row in SWEEP]
    jobs += [(d, "int8_fp16", row, False) for d in (128, 64) for row in SWEEP if row[4] == 1 and not row[5]]
    jobs += [(d, p, None, c) for d in (128, 64) for p in KERNEL for c in (False, True)]
    random.Random(0).shuffle(jobs)
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        results = pool.map_async(correctness_case, range(44), chunksize=1)
        problems = [r for r in pool.imap_unordered(warm, jobs, chunksize=1) if r]
        results = results.get()
    print(torch.cuda.get_device_name(), torch.__version__, f"compiled {len(jobs)} in {time.time() - START:.0f} s; problems:", problems)
    correctness(results)
    accuracy()
    timings()
    sweep()
    print(f"total {time.time() - START:.0f} s")
