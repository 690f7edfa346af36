"""Timings first, then correctness on random cases, accuracy at length, a sweep. Run: PYTHONPATH=sage_kernels/src python gpu_runs/first.py"""

import itertools, multiprocessing, random, time, warnings
from collections import Counter
from dataclasses import replace

START = time.time()
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sage_kernels.attention_call import make_call
from sage_kernels.kernels import int8_triton
from sage_kernels.kernels.int8_configs import AttentionConfig
from sage_kernels.reference import attention_fp32, quantized_attention

torch.backends.cuda.matmul.allow_tf32 = False
SHAPES = {
    "flux": (1, 24, 4608, 128, False), "wan480p": (1, 40, 32760, 128, False), "sdxl": (2, 10, 4096, 64, False),
    "cogvideox2b": (1, 30, 17776, 64, False), "llm32k": (1, 32, 32768, 128, True),
    "hunyuan": (1, 24, 65536, 128, False), "wan720p": (1, 40, 75600, 128, False),
}
# block_m, block_n, warps, stages, sum, partial_sums
SWEEP = [(128, 128, 8, 3, 1, 0), (128, 128, 8, 2, 1, 0), (128, 64, 8, 3, 1, 0), (128, 64, 4, 3, 1, 0), (64, 128, 4, 3, 1, 0), (64, 64, 4, 3, 1, 0),
         (128, 128, 8, 3, 0, 0), (128, 128, 8, 3, 2, 0), (128, 128, 8, 3, 1, 1), (64, 128, 4, 3, 2, 0), (128, 64, 8, 3, 2, 0), (128, 256, 8, 2, 1, 0)]
KERNEL = {k.precision: k for k in int8_triton.KERNELS}


def config_of(row):
    return AttentionConfig(*row[:4], partial_sums=bool(row[5]), sum=row[4])


def rows_of(precision):
    return [r for r in SWEEP if precision == "int8" or (r[4] == 1 and not r[5])]


def l1(a, b):
    return ((a.float() - b.float()).abs().sum() / b.float().abs().sum()).item()


def say(*words):
    print(f"[{time.time() - START:3.0f}]", *words, flush=True)


def data(b, h, n, d, hkv=None, nk=None, dtype=torch.bfloat16):
    q = torch.randn(b, h, n, d, device="cuda", dtype=dtype)
    k = torch.randn(b, hkv or h, nk or n, d, device="cuda", dtype=dtype) + 2 * torch.randn(1, hkv or h, 1, d, device="cuda", dtype=dtype)
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
        return f"{job}: {str(error)[-150:]}"


def correctness_case(number):
    torch.set_num_threads(1)
    rng = random.Random(number)
    torch.manual_seed(number)
    d = [64, 128, 40, 80, 128, 96, 32, 256][number % 8]
    b, hkv, g = rng.randint(1, 2), rng.randint(1, 3), rng.choice([1, 1, 2])
    nq, nk = rng.choice([1, 77, 128, 300, 1000]), rng.choice([1, 63, 128, 129, 500, 1100])
    kind = ["none", "causal", "bool", "additive", "lengths"][number % 5]
    dtype = [torch.bfloat16, torch.float16, torch.float32][number % 3] if number >= 8 else torch.bfloat16
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
            bad = not e["fp32"] <= (0.06 if precision == "int8" else 0.03) or not torch.equal(finite, lse.isfinite()) or not all(torch.equal(x, y) for x, y in zip(before, (q, k, v)))
            bad |= not max(e.get("ref_16bit", 0), e.get("ref_fp32out", 0)) <= 0.01
        except Exception as error:
            bad, e = True, {"error": str(error)[-200:]}
        rows.append((precision, bad, e, (number, precision, (b, hkv * g, hkv, nq, nk, d), kind, tuple(shape), dtype, o["scale"])))
    return rows


def correctness(results):
    worst, failures = {}, []
    for precision, bad, e, case in itertools.chain(*results):
        if bad:
            failures.append((e.get("error", str({n: f"{v:.1e}" for n, v in e.items() if n != "error"})), case))
        for name, value in e.items():
            if name != "error":
                worst[precision, name] = max(worst.get((precision, name), 0), value)
    say("correctness: cases", 2 * len(results), "failures", len(failures), "worst", {" ".join(n): f"{v:.1e}" for n, v in worst.items()})
    for error, count in Counter(f[0][:120] for f in failures).most_common(10):
        print(f"  BAD x{count}:", error, next(case for e, case in failures if e[:120] == error))


def accuracy():
    for n in (4096, 32760):
        torch.manual_seed(1)
        q, k, v = data(1, 4, n, 128)
        q = q[:, :, :1024].contiguous()
        exact, _ = attention_fp32(q, k, v)
        words = []
        for precision, rows in (("int8", [(128, 128, 8, 3, s, p) for s, p in ((0, 0), (1, 0), (2, 0), (1, 1))]), ("int8_fp16", [None])):
            for row in rows:
                state = KERNEL[precision].prepare(call_of(q, k, v, precision))
                out, _ = KERNEL[precision].run(replace(state, config=config_of(row) if row else state.config))
                words.append(f"{precision} {row and row[4:]} {l1(out, exact):.5f}")
        reference = quantized_attention(q, k, v, KERNEL["int8"].recipe(call_of(q, k, v, "int8")))[0]
        say(f"rel L1 N={n}:", "; ".join(words), f"reference int8 {l1(reference, exact):.5f}")


def bench(function, seconds=0.2):
    function()
    torch.cuda.synchronize()
    a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    a.record(); function(); b.record(); torch.cuda.synchronize()
    repeats = max(2, min(30, int(seconds * 1e3 / max(a.elapsed_time(b), 1e-3))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for a, b in events:
        a.record(); function(); b.record()
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in events)[repeats // 2]


def timed(row, label, function):
    try:
        row[label] = bench(function)
    except Exception as error:
        row[label] = str(error)[-60:]


def sdpa(backend, q, k, v, causal):
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def timings():
    for name, (b, h, n, d, causal) in SHAPES.items():
        if time.time() - START > 75:
            return say("timings cut before", name)
        q, k, v = data(b, h, n, d)
        flops = 4 * b * h * n * n * d / (2 if causal else 1)
        row = {}
        timed(row, "flash", lambda: sdpa(SDPBackend.FLASH_ATTENTION, q, k, v, causal))
        timed(row, "cudnn", lambda: sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v, causal))
        for precision, kernel in KERNEL.items():
            call = call_of(q, k, v, precision, is_causal=causal)
            timed(row, precision, lambda: kernel.run(kernel.prepare(call)))
            timed(row, precision + "/prep", lambda: kernel.prepare(call))
        print(f"{name:12}", " ".join(f"{m} {t if isinstance(t, str) else format(t, '.3f') + 'ms'}" + ("" if "prep" in m or isinstance(t, str) else f" {flops / t / 1e9:.0f}T") + ";" for m, t in row.items()), flush=True)


def sweep():
    for name, precision in (("wan480p", "int8"), ("cogvideox2b", "int8"), ("llm32k", "int8"), ("flux", "int8"), ("wan480p", "int8_fp16"), ("sdxl", "int8")):
        b, h, n, d, causal = SHAPES[name]
        h = h if n < 8000 else h // 2
        flops = 4 * b * h * n * n * d / (2 if causal else 1)
        state = KERNEL[precision].prepare(call_of(*data(b, h, n, d), precision, is_causal=causal))
        results = []
        for row in rows_of(precision):
            if time.time() - START > 88:
                break
            try:
                results.append((bench(lambda: KERNEL[precision].run(replace(state, config=config_of(row))), 0.06), row))
            except Exception as error:
                results.append((9e9, (row, str(error)[-40:])))
        say("sweep", name, precision, " ".join(f"{row}:{flops / t / 1e9:.0f}" for t, row in sorted(results, key=lambda r: r[0])))


def guarded(section, *arguments):
    try:
        section(*arguments)
    except Exception as error:
        say(section.__name__, "FAILED:", str(error)[-300:])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    defaults = [(d, p, None, c) for d in (128, 64) for p in KERNEL for c in (False, True)]
    jobs = [(d, "int8", row, causal) for d, causal in ((128, False), (64, False), (128, True)) for row in SWEEP]
    jobs += [(128, "int8_fp16", row, False) for row in rows_of("int8_fp16")]
    with multiprocessing.get_context("spawn").Pool(15) as pool:
        warming = [pool.apply_async(warm, (job,)) for job in defaults + jobs]
        checking = [pool.apply_async(correctness_case, (number,)) for number in range(30)]
        results, problems, late = [], Counter(), 0
        for handle in warming + checking:
            try:
                result = handle.get(max(0.01, START + 48 - time.time()))
            except multiprocessing.TimeoutError:
                late += 1
                continue
            if isinstance(result, list):
                results.append(result)
            elif result:
                problems[result[-110:]] += 1
        pool.terminate()
    say(torch.cuda.get_device_name(), torch.__version__, f"not finished {late}; problems:", dict(problems.most_common(5)))
    guarded(timings)
    guarded(correctness, results)
    guarded(accuracy)
    guarded(sweep)
    say("total")
