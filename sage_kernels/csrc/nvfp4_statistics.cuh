// Means and largest magnitudes of K and V: collected by chunks of tokens, finished by whoever needs them.
#pragma once

#include "nvfp4_operands.cuh"
#include "nvfp4_quantize.cuh"

constexpr u32 SHIFT_ROWS = 64;  // rows of LSE shifts that one block computes

struct ChunkStatistics {
  static constexpr u32 ROWS = THREADS / (HEAD_DIM / 8);  // a thread takes 8 channels of every ROWS-th token
  float sums[ROWS][HEAD_DIM];
  float maxima[WARPS];
};

// Channel sums and the largest magnitude of one chunk of K's or V's tokens.
template <RowForm ROWS>
__device__ void collect_statistics(const Parameters& p, ChunkStatistics& shared, u32 index) {
  constexpr u32 PIECES = HEAD_DIM / 8, STEP = ChunkStatistics::ROWS;
  u32 which = index % 2, chunk = index / 2 % p.chunks, head_index = index / 2 / p.chunks;
  u32 batch = head_index / p.kv_heads, head = head_index % p.kv_heads;
  const Operand& x = which ? p.value : p.key;
  u32 piece = threadIdx.x % PIECES, row = threadIdx.x / PIECES;
  int end = min((chunk + 1) * p.chunk_tokens, valid_keys(p, batch));
  float sum[8] = {}, absmax = 0.0f;
  constexpr u32 IN_FLIGHT = 4;  // loads
  auto add = [&](u32(&words)[4]) {
#pragma unroll
    for (u32 i = 0; i < 8; ++i) {
      float value = to_float<ROWS>(p, words[i / 2] >> (16 * (i & 1)));
      sum[i] += value;
      absmax = max_nan(absmax, fabsf(value));
    }
  };
  int token = chunk * p.chunk_tokens + row;
  if (row < STEP) {
    for (; token + int((IN_FLIGHT - 1) * STEP) < end; token += IN_FLIGHT * STEP) {
      u32 words[IN_FLIGHT][4];
      load_rows<ROWS, STEP, 8>(p, x, batch, head, token, end, piece * 8, words);
#pragma unroll
      for (u32 load = 0; load < IN_FLIGHT; ++load) add(words[load]);
    }
#pragma unroll 1
    for (; token < end; token += STEP) {
      u32 words[1][4];
      load_rows<ROWS, STEP, 8>(p, x, batch, head, token, end, piece * 8, words);
      add(words[0]);
    }
  }
  if (row < STEP)
#pragma unroll
    for (u32 i = 0; i < 8; ++i) shared.sums[row][piece * 8 + i] = sum[i];
  absmax = max_over_lanes(absmax, WARP);
  if (threadIdx.x % WARP == 0) shared.maxima[threadIdx.x / WARP] = absmax;
  __syncthreads();
  u32 out = (head_index * p.chunks + chunk) * 2 + which;
  if (threadIdx.x < HEAD_DIM) {
    float total = 0.0f;
    for (u32 r = 0; r < STEP; ++r) total += shared.sums[r][threadIdx.x];
    p.partial_sums[out * HEAD_DIM + threadIdx.x] = total;
  }
  if (threadIdx.x == 0) {
    for (u32 w = 1; w < WARPS; ++w) absmax = max_nan(absmax, shared.maxima[w]);
    p.partial_maxima[out] = absmax;
  }
}

struct HeadStatistics {
  float means[2][HEAD_DIM];  // of K and of V
  float scales[2];
};

// The chunks' statistics of one key/value head, summed up in the order of the chunks.
__device__ __forceinline__ void finish_statistics(const Parameters& p, u32 head_index, HeadStatistics& statistics) {
  int count = max(1, valid_keys(p, head_index / p.kv_heads));
  for (u32 i = threadIdx.x; i < 2 * HEAD_DIM; i += THREADS) {
    const float* sums = p.partial_sums + i64(head_index) * p.chunks * 2 * HEAD_DIM + i;
    float total = 0.0f;
#pragma unroll 8
    for (int chunk = 0; chunk < p.chunks; ++chunk) total += sums[chunk * 2 * HEAD_DIM];
    statistics.means[i / HEAD_DIM][i % HEAD_DIM] = total / float(count);
  }
  if (threadIdx.x < 2) {
    float absmax = 0.0f;
    for (int chunk = 0; chunk < p.chunks; ++chunk)
      absmax = max_nan(absmax, p.partial_maxima[(head_index * p.chunks + chunk) * 2 + threadIdx.x]);
    statistics.scales[threadIdx.x] = power_of_two_scale(absmax);
  }
  __syncthreads();
}

// q . mean(k): what smoothing K took from the scores of a row.
__device__ void compute_lse_shifts(const Parameters& p, HeadStatistics& statistics, u32 index) {
  u32 blocks = (p.query_length + SHIFT_ROWS - 1) / SHIFT_ROWS;
  u32 first = index % blocks * SHIFT_ROWS, head = index / blocks % p.heads, batch = index / blocks / p.heads;
  finish_statistics(p, batch * p.kv_heads + head / (p.heads / p.kv_heads), statistics);
  u32 lane = threadIdx.x % WARP;
  for (u32 row = first + threadIdx.x / WARP; row < min(first + SHIFT_ROWS, u32(p.query_length)); row += WARPS) {
    const u16* query = row_of(p.query, batch, head, row);
    float sum = 0.0f;
    for (u32 channel = lane; int(channel) < p.head_dim; channel += WARP)
      sum = fmaf(to_float<ANY_ROWS>(p, query[channel * p.query.strides[3]]), statistics.means[0][channel], sum);
    for (u32 step = 16; step; step /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
    if (lane == 0) p.lse_shifts[i64(batch * p.heads + head) * p.query_length + row] = sum;
  }
}
