// NVFP4 quantisation of one group, bit for bit as formats/nvfp4.py, and the power-of-two scale of reference.py.
#pragma once

#include "blackwell_fp4.cuh"

constexpr float E2M1_MAX = 6.0f;
constexpr u32 E4M3_NAN = 0x7F;

struct GroupScale {
  u32 code;          // E4M3
  float value;       // 0 where the group's codes must be 0: its scale rounds to zero or is NaN
  float reciprocal;  // correctly rounded, and 0 where value is
};

// x / scale, correctly rounded: one Newton step on the quotient (Markstein), exact because the reciprocal is.
__device__ __forceinline__ float divide_exactly(float x, float divisor, float reciprocal) {
  float quotient = x * reciprocal;
  return fmaf(fmaf(-quotient, divisor, x), reciprocal, quotient);
}

// 1 / x, correctly rounded: one Newton step, which is enough unless x has a mantissa of ones (Markstein); E4M3's have 4
// bits.
__device__ __forceinline__ float reciprocal(float x) {
  float guess = reciprocal_approx(x);
  return fmaf(fmaf(-guess, x, 1.0f), guess, guess);
}

// Scale of a group from its largest magnitude, which is NaN or infinite where an element is.
__device__ __forceinline__ GroupScale group_scale(float absmax) {
  GroupScale scale = {E4M3_NAN, 0.0f, 0.0f};
  if (absmax <= LARGEST_FLOAT) {
    scale.code = to_e4m3(divide_exactly(absmax, E2M1_MAX, 1.0f / E2M1_MAX));
    scale.value = from_e4m3(scale.code);
    scale.reciprocal = scale.value > 0.0f ? reciprocal(scale.value) : 0.0f;
  }
  return scale;
}

// Codes of eight elements of a group, and what they stand for in units of the scale where `values` is asked for.
template <class... Values>
__device__ __forceinline__ u32 quantize_elements(const float (&x)[8], const GroupScale& scale, Values&... values) {
  float elements[8];
#pragma unroll
  for (u32 i = 0; i < 8; ++i) elements[i] = divide_exactly(x[i], scale.value, scale.reciprocal);
  u32 codes = to_e2m1x8(elements, values...);
  return scale.value > 0.0f ? codes : 0;
}

// The power of two that brings `absmax` into (672, 1344]; 1 for zero, NaN and infinity. (reference.power_of_two_scale)
__device__ __forceinline__ float power_of_two_scale(float absmax) {
  if (!(absmax > 0.0f && absmax <= LARGEST_FLOAT)) return 1.0f;
  int extra = 0;
  if (absmax < 1.0e-30f) absmax *= 18446744073709551616.0f, extra = 64;  // subnormals have no exponent field
  u32 bits = __float_as_uint(absmax);
  int exponent = int(bits >> 23) - 126;                   // of a mantissa in [0.5, 1)
  int top = 11 - ((bits & 0x7FFFFF) > 0x280000 ? 1 : 0);  // 1344 = 0.65625 * 2^11
  int power = min(top - exponent + extra, 126);
  return __uint_as_float(u32(power + 127) << 23);
}
