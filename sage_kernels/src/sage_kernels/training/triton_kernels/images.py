"""What the backward kernels for sm_90a read: tiles in the order in which Hopper's tensor cores find them in memory.

Rows of 64 or 128 bytes, their chunks of 16 bytes swizzled, so that a tile is one contiguous copy to shared memory.
Shapes and order are those of csrc/training_sm90.cuh; codes of Q and K are such tiles since the forward pass.
"""

import triton
import triton.language as tl

from sage_kernels.training.triton_kernels.numbers import load_rows, permuted, quantize_tile, store_tile, swizzled

ROW_FLOATS = tl.constexpr(132)  # LSE and -delta of 64 queries, the scales of Q and of dO, two unused


@triton.jit
def _load_tile(image, rows, ROWS: tl.constexpr, ROW_BYTES: tl.constexpr):
    """Codes [ROWS, ROW_BYTES] of a tile in the order of `rows`."""
    chunks, lanes = tl.arange(0, ROW_BYTES // 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    codes = tl.load(image + swizzled(rows[:, None, None], chunks, ROW_BYTES) + lanes)
    return tl.reshape(codes, [ROWS, ROW_BYTES])


@triton.jit(do_not_specialize=["heads", "query_length", "query_tiles"])
def prepare_images(
    d_output,
    output,
    query,
    query_scales,
    lse,
    query_transposed,
    d_output_transposed,
    row_image,
    d_output_batch_stride,
    d_output_head_stride,
    d_output_row_stride,
    d_output_column_stride,
    output_batch_stride,
    output_head_stride,
    output_row_stride,
    output_column_stride,
    heads,
    query_length,
    query_tiles,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERY_TILE: tl.constexpr,
):
    """One tile of dO, O and Q; as quantize.prepare_backward."""
    index = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    tile, head = (index % query_tiles).to(tl.int32), index // query_tiles
    batch, query_head = head // heads, head % heads
    lanes = permuted(tl.arange(0, QUERY_TILE))
    rows = tile * QUERY_TILE + lanes
    valid = rows < query_length
    d_output += batch * d_output_batch_stride + query_head * d_output_head_stride
    output += batch * output_batch_stride + query_head * output_head_stride
    d_out = load_rows(d_output, rows, d_output_row_stride, columns, d_output_column_stride, valid, HEAD_DIM)
    out = load_rows(output, rows, output_row_stride, columns, output_column_stride, valid, HEAD_DIM)
    row_sums = tl.sum(d_out * out, 1)
    codes, scale = quantize_tile(d_out, False)
    # A NaN of V reaches dK only through delta, and the maxima of the backward kernels pass over it.
    scale += tl.sum(row_sums, 0) * 0.0
    row_image += index * ROW_FLOATS
    tl.store(row_image + lanes, tl.load(lse + index * QUERY_TILE + lanes))
    tl.store(row_image + QUERY_TILE + lanes, -row_sums)
    one = tl.arange(0, 1)
    tl.store(row_image + 2 * QUERY_TILE + one, tl.load(query_scales + index + one))
    tl.store(row_image + 2 * QUERY_TILE + 1 + one, scale)
    base = index * (QUERY_TILE * BLOCK_D)
    store_tile(tl.trans(codes), d_output_transposed + base, BLOCK_D, QUERY_TILE, True)
    q = _load_tile(query + base, lanes, QUERY_TILE, BLOCK_D)
    store_tile(tl.trans(q), query_transposed + base, BLOCK_D, QUERY_TILE, True)
