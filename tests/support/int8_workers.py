"""What tests of the INT8 kernels run on all cores, because most of their time goes into compiling.

Apart from the tests, so that processes which are started afresh can import it.
"""

import torch

import sage_kernels
from int8_cases import call_of, make_options, make_qkv, make_view, random_case, relative_l1, run
from sage_kernels.kernels import find_kernel
from sage_kernels.kernels.int8_triton import KERNELS
from sage_kernels.reference import attention_fp32, quantized_attention

# Relative L1 to the quantised reference. Few weights make up a short row, and each that rounds the other way moves it
# by up to 1/16; a mask, a length or a stride that was not honoured moves it by far more.
BOUND = 0.03
# Relative L1 to exact attention: that of the reference by this factor, and this much more.
EXACT_FACTOR, EXACT_MARGIN = 1.2, 0.01


def call_once(index, device, kind, head_dim, dtype, view="contiguous", rows=100, keys=112):
    """Leave a compiled kernel in Triton's cache on disk."""
    torch.set_num_threads(1)
    q, k, v = make_view(view, *make_qkv(2, 4, 2, rows, keys, head_dim, dtype, device))
    run(KERNELS[index], call_of(q, k, v, KERNELS[index].precision, **make_options(kind, 2, 4, rows, keys, device)))


def run_random_case(number, device):
    """What happened: (description, None or what is wrong, error, bound)."""
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    precision, (q, k, v), options, description = random_case(number, device)
    arguments = {**options, "precision": precision, "enable_gqa": True}
    decision = sage_kernels.explain(q, k, v, return_lse=True, **arguments)
    description = f"{number}: {decision.kernel} {description} scale {options.get('scale')}"
    output, lse = sage_kernels.attention(q, k, v, return_lse=True, **arguments)
    recipe = find_kernel(decision.kernel).recipe(call_of(q, k, v, precision, **options))
    operands = [x.bfloat16() for x in (q, k, v)] if q.dtype == torch.float32 else (q, k, v)
    expected, expected_lse = quantized_attention(*operands, recipe, **options)
    exact, _ = attention_fp32(*operands, **options)
    if not torch.isfinite(output).all():
        return description, "output is not finite", 0.0, BOUND
    if not torch.equal(lse == -torch.inf, expected_lse == -torch.inf):
        return description, "LSE marks other rows as empty", 0.0, BOUND
    finite = torch.isfinite(expected_lse)
    lse_error = (lse - expected_lse)[finite].abs().max().item() if finite.any() else 0.0
    limit = EXACT_FACTOR * relative_l1(expected, exact) + EXACT_MARGIN
    errors = ((relative_l1(output, expected), BOUND), (lse_error, 0.05), (relative_l1(output, exact), limit))
    return (description, None, *max(errors, key=lambda pair: pair[0] / pair[1]))
