// Attention of a few query rows to the NVFP4 cache, on tensor cores in 16 bit; reading the cache is what it waits for.
//
// The constraint that shaped it: codes go from global memory to the registers of the lane that multiplies them, with
// no shared memory in between. So keys are the rows of the products, S^T = K Q^T and O^T = V^T P^T, the channels of Q
// are permuted as a lane's load of K has them, and tokens in each 8 as its load of V has them.
//
// Each warp takes every fourth step of its block's share of the keys and keeps a softmax of its own; the four are put
// together at the end, and the blocks' shares by the block that comes last.
#include "kv_cache_loads.cuh"
#include "kv_cache_queries.cuh"

__device__ __forceinline__ void unpack_scaled(u32 codes, u32 scale, u32 (&pairs)[4]) {
  unpack_e2m1(codes, pairs);
#pragma unroll
  for (u32 i = 0; i < 4; ++i) pairs[i] = multiply_f16x2(pairs[i], scale);
}

// scores[tile of 8 rows]: keys lane / 4 and + 8 of a tile of 16, query rows 2 (lane % 4) + {0, 1}.
__device__ __forceinline__ void multiply_keys(float (&scores)[TILES][4], const Keys& keys, u32 tile,
                                              const u32 (&query)[TILES][KEY_WORDS][4], const Loader& loader) {
  u32 scales[2][2];  // [row][half of the lane's channels]
#pragma unroll
  for (u32 row = 0; row < 2; ++row) loader.unpack_key_scales(keys.scales[tile][row], scales[row][0], scales[row][1]);
#pragma unroll
  for (u32 rows = 0; rows < TILES; ++rows)
#pragma unroll
    for (u32 i = 0; i < 4; ++i) scores[rows][i] = 0.0f;
#pragma unroll
  for (u32 word = 0; word < KEY_WORDS; ++word) {
    u32 half = word * 2 / KEY_WORDS, a[4], b[4];
    unpack_scaled(keys.words[tile][0][word], scales[0][half], a);
    unpack_scaled(keys.words[tile][1][word], scales[1][half], b);
#pragma unroll
    for (u32 rows = 0; rows < TILES; ++rows) {
      const u32(&q)[4] = query[rows][word];
      mma_f16(scores[rows], a[0], b[0], a[1], b[1], q[0], q[1]);
      mma_f16(scores[rows], a[2], b[2], a[3], b[3], q[2], q[3]);
    }
  }
}

// outputs[tile of 8 rows][tile of 16 channels]: channels 2 i and 2 i + 1 of the lane's, query rows as in the scores.
__device__ __forceinline__ void multiply_values(float (&outputs)[TILES][OUTPUT_TILES][4], float (&sums)[TILES][4],
                                                const Values& values, u32 tile, const u32 (&weights)[TILES][2]) {
  u32 first = unpack_scales(permute_bytes(values.scales[tile][0], values.scales[tile][1], 0x0040));
  u32 second = unpack_scales(permute_bytes(values.scales[tile][2], values.scales[tile][3], 0x0040));
#pragma unroll
  for (u32 rows = 0; rows < TILES; ++rows)
    mma_f16(sums[rows], ONES, ONES, ONES, ONES, weights[rows][0], weights[rows][1]);
#pragma unroll
  for (u32 word = 0; word < VALUE_WORDS; ++word)
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
      // Four channels of two tokens in one word: nibbles i and i + 4 are a channel of both.
      const u32(&x)[4][VALUE_WORDS] = values.words[tile];
      u32 bytes = half ? 0x7632 : 0x5410, a[4], b[4];
      unpack_scaled(permute_bytes(x[0][word], x[1][word], bytes), first, a);
      unpack_scaled(permute_bytes(x[2][word], x[3][word], bytes), second, b);
#pragma unroll
      for (u32 rows = 0; rows < TILES; ++rows) {
        const u32(&p)[2] = weights[rows];
        mma_f16(outputs[rows][4 * word + 2 * half], a[0], a[1], b[0], b[1], p[0], p[1]);
        mma_f16(outputs[rows][4 * word + 2 * half + 1], a[2], a[3], b[2], b[3], p[0], p[1]);
      }
    }
}

// By one warp: the output of row `place` of [B, H, Nq] from all shares, with the value head's mean and factor put back.
__device__ void combine_row(const KvDecodeParams& p, i64 place, u32 kv_head, u32 lane) {
  constexpr u32 LANES = D / 4;  // of a share: four channels each
  const u32 splits = p.splits;
  float largest = NO_MAXIMUM, total = 0.0f;
  for (u32 split = lane; split < splits; split += WARP)
    largest = fmaxf(largest, __ldcg(&p.partial_lse[static_cast<i64>(split) * p.rows + place]));
  largest = warp_max(largest);
  for (u32 split = lane; split < splits; split += WARP)
    total += exp2_approx(__ldcg(&p.partial_lse[static_cast<i64>(split) * p.rows + place]) - largest);
  total = warp_sum(total);
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 16
  for (u32 split = lane / LANES; split < splits; split += WARP / LANES) {
    i64 part = static_cast<i64>(split) * p.rows + place;
    float weight = exp2_approx(__ldcg(&p.partial_lse[part]) - largest);
    float4 x = __ldcg(reinterpret_cast<const float4*>(p.partial) + part * LANES + lane % LANES);
    sum.x += weight * x.x;
    sum.y += weight * x.y;
    sum.z += weight * x.z;
    sum.w += weight * x.w;
  }
  float outputs[4] = {sum.x, sum.y, sum.z, sum.w};
  bool empty = total == 0.0f;
  float factor = 1.0f / p.value_factors[kv_head] / total;
#pragma unroll
  for (u32 i = 0; i < 4; ++i) {
    if constexpr (LANES < WARP) outputs[i] += __shfl_xor_sync(ALL_LANES, outputs[i], LANES);
    u32 channel = lane % LANES * 4 + i;
    float mean = p.value_means[static_cast<i64>(kv_head) * D + channel];
    float output = empty ? 0.0f : outputs[i] * factor + mean;
    if (lane < LANES) store_float(p.output, place * D + channel, p.dtype, output);
  }
  if (lane == 0) p.lse[place] = empty ? -INFINITE : (largest + log2f(total)) * LN2;
}

// One share of the keys of one key head, for the rows of one block.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    kv_cache_decode(const __grid_constant__ KvDecodeParams p) {
  __shared__ Shared shared;
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  u32 split = blockIdx.x % p.splits, rest = blockIdx.x / p.splits;
  u32 kv_heads = p.rows / (p.heads * p.query_length) * p.kv_heads;  // of all sequences
  u32 kv_head = rest % kv_heads, batch = kv_head / p.kv_heads, first_row = rest / kv_heads * ROWS;
  int length = p.lengths[batch];
  int share = (length + p.splits - 1) / p.splits;
  share = (share + static_cast<int>(STEP) - 1) / static_cast<int>(STEP) * static_cast<int>(STEP);
  int begin = split * share, end = min(begin + share, length);

  Loader loader(p, kv_head, lane);
  Keys keys;
  Values values;
  int start = begin + warp * STEP;
  if (start < end) {
    loader.load(keys, start);
    loader.load(values, start);
  }
  stage_queries(p, shared, batch, kv_head, first_row, warp, lane);
  __syncthreads();

  u32 query[TILES][KEY_WORDS][4];
  float factor[TILES][2], maximum[TILES][2], sums[TILES][4], outputs[TILES][OUTPUT_TILES][4];
  int limit[TILES][2];
  // Causal: query token i of Nq sees the first length - Nq + 1 + i keys.
  int least =
      p.is_causal ? min(length, max(0, length - p.query_length + 1 + Row(p, batch, kv_head, first_row).token)) : length;
#pragma unroll
  for (u32 rows = 0; rows < TILES; ++rows) {
#pragma unroll
    for (u32 word = 0; word < KEY_WORDS; ++word) {
      const u16* x = &shared.query[8 * rows + lane / 4][lane % 4 * (D / 4) + 8 * word];
#pragma unroll
      for (u32 i = 0; i < 4; ++i) query[rows][word][i] = x[i] | static_cast<u32>(x[i + 4]) << 16;
    }
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
      u32 row = 8 * rows + 2 * (lane % 4) + i;
      factor[rows][i] = shared.factors[row];
      maximum[rows][i] = NO_MAXIMUM;
      int token = Row(p, batch, kv_head, first_row + row).token;
      limit[rows][i] = p.is_causal ? min(length, max(0, length - p.query_length + 1 + token)) : length;
    }
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      sums[rows][i] = 0.0f;
#pragma unroll
      for (u32 tile = 0; tile < OUTPUT_TILES; ++tile) outputs[rows][tile][i] = 0.0f;
    }
  }

  for (; start < end; start += WARPS * STEP) {
    int next = start + static_cast<int>(WARPS * STEP);
    float scores[2][TILES][4];
    multiply_keys(scores[0], keys, 0, query, loader);
    multiply_keys(scores[1], keys, 1, query, loader);
    if (next < end) loader.load(keys, next);

    bool is_edge = start + static_cast<int>(STEP) > least;
    bool grows = false;
    float largest[TILES][2];
#pragma unroll
    for (u32 rows = 0; rows < TILES; ++rows)
#pragma unroll
      for (u32 i = 0; i < 2; ++i) {
        largest[rows][i] = NO_MAXIMUM;
#pragma unroll
        for (u32 tile = 0; tile < 2; ++tile)
#pragma unroll
          for (u32 half = 0; half < 2; ++half) {
            float& score = scores[tile][rows][2 * half + i];
            score *= factor[rows][i];
            if (is_edge) {
              int key = start + 16 * tile + 8 * half + lane / 8 + lane / 4 % 2 * 4;
              if (key >= limit[rows][i]) score = -INFINITE;
            }
            largest[rows][i] = fmaxf(largest[rows][i], score);
          }
        grows |= largest[rows][i] > maximum[rows][i] + HEADROOM;
      }
    if (__any_sync(ALL_LANES, grows)) {
#pragma unroll
      for (u32 rows = 0; rows < TILES; ++rows)
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
          float found = largest[rows][i];
#pragma unroll
          for (u32 lanes = 4; lanes < WARP; lanes *= 2) found = fmaxf(found, __shfl_xor_sync(ALL_LANES, found, lanes));
          found = fmaxf(found, maximum[rows][i]);
          float rescale = exp2_approx(maximum[rows][i] - found);
          maximum[rows][i] = found;
#pragma unroll
          for (u32 half = 0; half < 2; ++half) {
            sums[rows][2 * half + i] *= rescale;
#pragma unroll
            for (u32 tile = 0; tile < OUTPUT_TILES; ++tile) outputs[rows][tile][2 * half + i] *= rescale;
          }
        }
    }

    if (is_edge) {
      // What lies beyond the end may be stale: a NaN would outlive its weight of 0.
#pragma unroll
      for (u32 i = 0; i < 8; ++i)
        if (start + static_cast<int>(4 * i + lane % 4) >= length) values.scales[i / 4][i % 4] = 0;
    }
#pragma unroll
    for (u32 tile = 0; tile < 2; ++tile) {
      u32 weights[TILES][2];
#pragma unroll
      for (u32 rows = 0; rows < TILES; ++rows)
#pragma unroll
        for (u32 half = 0; half < 2; ++half)
          weights[rows][half] =
              transpose_8x8(to_f16x2(exp2_approx(scores[tile][rows][2 * half] - maximum[rows][0]),
                                     exp2_approx(scores[tile][rows][2 * half + 1] - maximum[rows][1])));
      multiply_values(outputs, sums, values, tile, weights);
    }
    if (next < end) loader.load(values, next);
  }

  __syncthreads();  // the queries' place becomes the outputs'
#pragma unroll
  for (u32 rows = 0; rows < TILES; ++rows)
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
      u32 row = 8 * rows + 2 * (lane % 4) + i;
      if (lane < 4) {
        shared.maxima[warp][row] = maximum[rows][i];
        shared.sums[warp][row] = sums[rows][i];
      }
#pragma unroll
      for (u32 tile = 0; tile < OUTPUT_TILES; ++tile)
        *reinterpret_cast<float2*>(&shared.outputs[warp][row][lane / 4 * (D / 8) + 2 * tile]) =
            make_float2(outputs[rows][tile][i], outputs[rows][tile][2 + i]);
    }
  __syncthreads();

  for (u32 item = threadIdx.x; item < ROWS * D; item += THREADS) {
    u32 index = item / D, channel = item % D;
    Row row(p, batch, kv_head, first_row + index);
    if (!row.exists) continue;
    float largest = NO_MAXIMUM, sum = 0.0f, output = 0.0f;
#pragma unroll
    for (u32 i = 0; i < WARPS; ++i) largest = fmaxf(largest, shared.maxima[i][index]);
#pragma unroll
    for (u32 i = 0; i < WARPS; ++i) {
      float weight = exp2_approx(shared.maxima[i][index] - largest);
      sum += weight * shared.sums[i][index];
      output += weight * shared.outputs[i][index][channel];
    }
    bool empty = sum == 0.0f;
    output = empty ? 0.0f : output * (OPERAND_UNIT / sum);
    float lse = empty ? -INFINITE : largest + log2f(sum) + shared.lse_shifts[index];
    i64 place = (static_cast<i64>(batch) * p.heads + row.head) * p.query_length + row.token;
    if (p.splits == 1) {
      float mean = p.value_means[static_cast<i64>(kv_head) * D + channel];
      store_float(p.output, place * D + channel, p.dtype, empty ? 0.0f : output / p.value_factors[kv_head] + mean);
      if (channel == 0) p.lse[place] = lse * LN2;
    } else {
      place += static_cast<i64>(split) * p.rows;
      p.partial[place * D + channel] = output;
      if (channel == 0) p.partial_lse[place] = lse;
    }
  }
  if (p.splits == 1) return;

  // The block that comes last puts all shares together.
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    shared.is_last = atomicAdd(&p.arrivals[rest], 1) == p.splits - 1;
    if (shared.is_last) p.arrivals[rest] = 0;
  }
  __syncthreads();
  if (!shared.is_last) return;
  __threadfence();
  for (u32 index = warp; index < ROWS; index += WARPS) {
    Row row(p, batch, kv_head, first_row + index);
    if (row.exists)
      combine_row(p, (static_cast<i64>(batch) * p.heads + row.head) * p.query_length + row.token, kv_head, lane);
  }
}
