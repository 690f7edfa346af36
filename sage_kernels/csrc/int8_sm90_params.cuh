// The parameter of the kernels of int8_sm90_prepare.cu and int8_sm90_attention.cu; _Parameters in int8_sm90.py.
#pragma once
#include "sm90.cuh"

struct Int8Params {
  const u16* query;  // [B, H, Nq, D]; D contiguous, rows aligned to 16 bytes; strides in elements: batch, head, row
  const u16* key;    // [B, Hkv, Nk, D]
  const u16* value;
  const int* key_lengths;  // [B] or null
  u8* query_codes;         // [B, H, query_rows][HEAD_DIM], swizzled rows
  u8* key_codes;           // [B, Hkv, key_blocks][KEYS][HEAD_DIM], swizzled rows
  u8* value_codes;         // [B, Hkv, key_blocks][HEAD_DIM][KEYS], swizzled rows
  float* query_scale;      // [B, H, query_rows], times |softmax scale| * log2(e)
  float* key_scale;        // [B, Hkv, key_blocks]
  float* key_mean;         // [B, Hkv, HEAD_DIM]
  float* value_scale;      // [B, Hkv, HEAD_DIM]
  float* value_mean;       // [B, Hkv, HEAD_DIM]
  int* value_error;        // [B, Hkv, HEAD_DIM], summed V minus codes, in 1/16 of a code unit
  float* lse_shift;        // [B, H, query_rows], q . mean(k) * softmax scale, or null
  void* output;            // [B, H, Nq, D], D contiguous
  float* lse;              // [B, H, Nq] or null, as lse_shift
  i64 query_strides[3];
  i64 key_strides[3];
  i64 value_strides[3];
  i64 output_strides[3];
  int batch, heads, kv_heads, query_length, key_length, head_dim, query_rows, key_blocks;
  int is_causal, is_bfloat16;
  int even_shares;  // of rows for all thread blocks, rather than tiles in turns; not for causal attention
  float softmax_scale;
};
