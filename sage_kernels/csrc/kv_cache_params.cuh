// The parameter of the kernels of kv_cache_decode.cu; _Parameters in kv_cache/cuda_decode.py.
#pragma once
#include "ptx.cuh"

struct KvDecodeParams {
  const void* query;         // [B, H, Nq, D], D contiguous; strides in elements: batch, head, row
  const int* lengths;        // [B]
  const u8* key_codes;       // [B, Hkv, N', D / 2], the even channel in the low nibble
  const u8* key_scales;      // [B, Hkv, N', D / group], E4M3
  const float* key_means;    // [B, Hkv, D]
  const float* key_factors;  // [B, Hkv], what the keys less their mean were multiplied by
  const u8* value_codes;
  const u8* value_scales;
  const float* value_means;
  const float* value_factors;
  const float* signs;  // [D] of the rotation of queries, or null
  float* partial;      // [splits, B, H, Nq, D] of one split's keys, in units of the value head's factor
  float* partial_lse;  // [splits, B, H, Nq], in log2
  int* arrivals;       // blocks of each (block of rows, B, Hkv) that are done: 0 before and after
  void* output;        // [B, H, Nq, D] contiguous, in the query's dtype
  float* lse;          // [B, H, Nq], natural logarithm
  i64 query_strides[3];
  int heads, kv_heads, query_length, rows;  // rows of [B, H, Nq]
  int padded_capacity, splits, group, is_causal;
  int dtype;  // 0: fp16, 1: bf16, 2: float32
  float softmax_scale;
};
