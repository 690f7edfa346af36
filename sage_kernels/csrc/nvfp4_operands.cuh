// What the preparation kernels take, and how their threads load it.
#pragma once

#include "nvfp4_images.cuh"

constexpr u32 THREADS = 256;
constexpr u32 WARPS = THREADS / WARP;
constexpr u32 CONTRACTION = K_STEPS * 64;  // head_dim, padded for Q K^T

struct Operand {
  const u16* data;
  i64 strides[4];  // of B, H, N and D, in elements
};

struct Parameters {
  Operand query, key, value;
  const int* key_lengths;  // [B], or null
  const u8* mask;          // or null
  u8* queries;
  u8* means;
  u8* keys_values;
  float* query_factors;   // [B, H, query tiles, BLOCKS]
  float* key_factors;     // [B, Hkv]
  float* value_factors;   // [B, Hkv]
  float* key_means;       // [B, Hkv, HEAD_DIM]
  float* value_means;     // [B, Hkv, HEAD_DIM]
  float* partial_sums;    // [B, Hkv, chunks, 2, HEAD_DIM]
  float* partial_maxima;  // [B, Hkv, chunks, 2]
  float* lse_shifts;      // [B, H, Nq], or null
  u8* tile_seen;          // [mask B, mask H, query tiles, key tiles], or null
  i64 mask_strides[4];
  int batch, heads, kv_heads, query_length, key_length, head_dim, query_tiles, key_tiles, chunks, chunk_tokens;
  int is_bf16, mask_kind, mask_batch, mask_heads, vectors;  // vectors: rows are contiguous and 16-byte aligned
  float query_sign;                                         // -1 for a negative softmax scale
};

// How rows are read: all cases in one form, which asks for each number, and two forms for whole tiles of contiguous,
// 16-byte aligned rows.
enum RowForm { ANY_ROWS, BF16_ROWS, F16_ROWS };

__device__ __forceinline__ RowForm rows_of(const Parameters& p, bool whole) {
  return !p.vectors || !whole ? ANY_ROWS : p.is_bf16 ? BF16_ROWS : F16_ROWS;
}

template <RowForm ROWS>
__device__ __forceinline__ float to_float(const Parameters& p, u32 bits) {
  bool is_bf16 = ROWS == ANY_ROWS ? p.is_bf16 != 0 : ROWS == BF16_ROWS;
  return is_bf16 ? from_bf16(u16(bits)) : from_f16(u16(bits));
}

__device__ __forceinline__ int valid_keys(const Parameters& p, u32 batch) {
  return p.key_lengths ? max(0, min(p.key_length, p.key_lengths[batch])) : p.key_length;
}

__device__ __forceinline__ const u16* row_of(const Operand& x, u32 batch, u32 head, i64 token) {
  return x.data + batch * x.strides[0] + head * x.strides[1] + token * x.strides[2];
}

// COUNT neighbouring channels of JOBS rows, the first one `token`, STEP apart, as 16-bit words; zeros beyond head_dim
// and, for ANY_ROWS, from token `end` on.
template <RowForm ROWS, u32 STEP, u32 COUNT, u32 JOBS>
__device__ __forceinline__ void load_rows(const Parameters& p, const Operand& x, u32 batch, u32 head, int token,
                                          int end, u32 channel, u32 (&words)[JOBS][COUNT / 2]) {
  const u16* row = row_of(x, batch, head, token);
#pragma unroll
  for (u32 job = 0; job < JOBS; ++job) {
#pragma unroll
    for (u32 i = 0; i < COUNT / 2; ++i) words[job][i] = 0;
    if constexpr (ROWS == ANY_ROWS) {
      if (token + int(job * STEP) < end)
#pragma unroll
        for (u32 i = 0; i < COUNT; ++i)
          if (int(channel + i) < p.head_dim)
            words[job][i / 2] |= u32(row[(channel + i) * x.strides[3]]) << (16 * (i % 2));
    } else if (int(channel) < p.head_dim) {
      if constexpr (COUNT == 8) {
        uint4 four = *reinterpret_cast<const uint4*>(row + channel);
        words[job][0] = four.x, words[job][1] = four.y, words[job][2] = four.z, words[job][3] = four.w;
      } else {
        words[job][0] = *reinterpret_cast<const u32*>(row + channel);
      }
    }
    row += STEP * x.strides[2];
  }
}

__device__ __forceinline__ float max_over_lanes(float x, u32 lanes) {
  for (u32 step = 1; step < lanes; step *= 2) x = max_nan(x, __shfl_xor_sync(ALL_LANES, x, step));
  return x;
}
