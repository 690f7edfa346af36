// What training_sm90_gradients_16bit.cu and training_sm90_query_16bit.cu add to training_sm90.cuh: products of 16-bit
// numbers, which wgmma adds up itself. HEAD_DIM is 64: a row is the 128 bytes of a swizzle.
#pragma once
#include "training_sm90.cuh"

// Adds a product whose right operand's rows are what it sums over: 16 of them, 2048 bytes, at a time.
template <int kCount, int kLeft>
DEVICE void issue_product(float (&sums)[kCount], u32 (&left)[kLeft], u32 right) {
  const u64 b = operand<128>(right, 0);
  pin_registers(left);
  wgmma_fence(sums);
#pragma unroll
  for (int step = 0; step < kLeft / 4; ++step) multiply_16bit(sums, left + 4 * step, b + 128 * step);
  wgmma_commit();
}

// Accumulators as left operand.
template <int kCount>
DEVICE void pack(u32 (&packed)[kCount / 2], const u32 (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const float low = __uint_as_float(x[2 * i]), high = __uint_as_float(x[2 * i + 1]);
    packed[i] = BFLOAT16 ? pack_bfloat16(low, high) : pack_float16(low, high);
  }
}
