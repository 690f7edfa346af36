// The queries of a block: where they are, rotated, in float16.
#pragma once
#include "kv_cache_sizes.cuh"

struct Shared {
  union {
    u16 query[ROWS][D];  // float16
    float outputs[WARPS][ROWS][SUM_STRIDE];
  };
  float factors[ROWS], lse_shifts[ROWS];
  float maxima[WARPS][ROWS], sums[WARPS][ROWS];
  bool is_last;
};

__device__ __forceinline__ float load_float(const void* pointer, i64 index, int dtype) {
  if (dtype == 2) return static_cast<const float*>(pointer)[index];
  u16 bits = static_cast<const u16*>(pointer)[index];
  return dtype == 1 ? from_bf16(bits) : from_f16(bits);
}

__device__ __forceinline__ void store_float(void* pointer, i64 index, int dtype, float x) {
  if (dtype == 2)
    static_cast<float*>(pointer)[index] = x;
  else
    static_cast<u16*>(pointer)[index] = static_cast<u16>(dtype == 1 ? to_bf16x2(x, 0.0f) : to_f16x2(x, 0.0f));
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (u32 lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(ALL_LANES, x, lanes);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (u32 lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, lanes));
  return x;
}

// Where a row of the block is in [B, H, Nq]: query token major, head minor.
struct Row {
  int token, head;
  bool exists;
  __device__ Row(const KvDecodeParams& p, u32 batch, u32 kv_head, u32 index) {
    u32 group_heads = p.heads / p.kv_heads;
    token = index / group_heads;
    head = kv_head % p.kv_heads * group_heads + index % group_heads;
    exists = token < p.query_length;
  }
};

// x times the matrix of signs: flips, then butterflies over the lane's channels and over lanes.
__device__ __forceinline__ void rotate(float (&x)[CHANNELS], const float* signs, u32 lane) {
#pragma unroll
  for (u32 i = 0; i < CHANNELS; ++i) x[i] *= signs[lane * CHANNELS + i] * (1.0f / (D * KEY_ROTATION));
#pragma unroll
  for (u32 stride = 1; stride < CHANNELS; stride *= 2)
#pragma unroll
    for (u32 i = 0; i < CHANNELS; ++i)
      if (!(i & stride)) {
        float a = x[i], b = x[i | stride];
        x[i] = a + b;
        x[i | stride] = a - b;
      }
#pragma unroll
  for (u32 lanes = 1; lanes < WARP; lanes *= 2)
#pragma unroll
    for (u32 i = 0; i < CHANNELS; ++i) {
      float other = __shfl_xor_sync(ALL_LANES, x[i], lanes);
      x[i] = lane & lanes ? other - x[i] : x[i] + other;
    }
}

// The block's queries, rotated, each times a power of two that brings it to float16's range; rows that don't exist:
// 0.
__device__ void stage_queries(const KvDecodeParams& p, Shared& shared, u32 batch, u32 kv_head, u32 first_row, u32 warp,
                              u32 lane) {
  const float* means = p.key_means + static_cast<i64>(kv_head) * D + lane * CHANNELS;
  for (u32 index = warp; index < ROWS; index += WARPS) {
    Row row(p, batch, kv_head, first_row + index);
    i64 start = batch * p.query_strides[0] + row.head * p.query_strides[1] + row.token * p.query_strides[2];
    float x[CHANNELS];
#pragma unroll
    for (u32 i = 0; i < CHANNELS; ++i)
      x[i] = row.exists ? load_float(p.query, start + lane * CHANNELS + i, p.dtype) : 0.0f;
    if (p.signs != nullptr) rotate(x, p.signs, lane);
    float shift = 0.0f, largest = 0.0f;
#pragma unroll
    for (u32 i = 0; i < CHANNELS; ++i) {
      shift += x[i] * means[i];
      largest = fmaxf(largest, fabsf(x[i]));
    }
    shift = warp_sum(shift);
    largest = warp_max(largest);
    u32 exponent = min(max(__float_as_uint(largest) >> 23, 1u), 253u);
    float up = __uint_as_float((254u - exponent) << 23), down = __uint_as_float(exponent << 23);
#pragma unroll
    for (u32 i = 0; i < CHANNELS; ++i)
      shared.query[index][lane * CHANNELS + i] = static_cast<u16>(to_f16x2(x[i] * up, 0.0f));
    if (lane == 0) {
      shared.factors[index] = down * (p.softmax_scale * OPERAND_UNIT * LOG2E / p.key_factors[kv_head]);
      shared.lse_shifts[index] = shift * (p.softmax_scale * LOG2E);
    }
  }
}
