// MXFP8 quantisation of one group, bit for bit as formats/mxfp8.py.
#pragma once

#include "ptx.cuh"

constexpr u32 MXFP8_GROUP = 32;
constexpr u32 E8M0_NAN = 255;

struct BlockScale {
  u32 code;          // E8M0
  float value;       // a power of two, or NaN
  float reciprocal;  // likewise, exact
};

// The smallest power of two that brings a group's largest magnitude (NaN or infinite where an element is) to at most
// 448 = 1.75 * 2^8.
__device__ __forceinline__ BlockScale block_scale(float absmax) {
  if (!(absmax <= LARGEST_FLOAT)) return {E8M0_NAN, __uint_as_float(0x7FFFFFFFu), 0.0f};
  u32 bits = __float_as_uint(absmax);
  int exponent = max(int(bits >> 23) - 135 + ((bits & 0x7FFFFFu) > 0x600000u ? 1 : 0), -127);
  float value = __uint_as_float(exponent == -127 ? 0x00400000u : u32(exponent + 127) << 23);
  return {u32(exponent + 127), value, __uint_as_float(u32(127 - exponent) << 23)};
}

// E4M3 codes of eight elements of a group; `missed` is what rounding takes from them.
__device__ __forceinline__ uint2 quantize_elements(const float (&x)[8], const BlockScale& scale, float (&missed)[8]) {
  u32 pairs[4];
#pragma unroll
  for (u32 i = 0; i < 4; ++i) {
    pairs[i] = to_e4m3x2(x[2 * i] * scale.reciprocal, x[2 * i + 1] * scale.reciprocal);
    if (scale.code == E8M0_NAN) pairs[i] = 0;
    float low, high;
    from_e4m3x2(pairs[i], low, high);
    missed[2 * i] = fmaf(-low, scale.value, x[2 * i]);
    missed[2 * i + 1] = fmaf(-high, scale.value, x[2 * i + 1]);
  }
  return make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16);
}
