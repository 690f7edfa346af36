// NVFP4 quantisation of one group, bit for bit as formats/nvfp4.py, and the power-of-two scale of reference.py.
#pragma once

#include "blackwell_fp4.cuh"

constexpr u32 E4M3_NAN = 0x7F;

struct GroupScale {
  u32 code;          // E4M3
  float value;       // 0 where the group's codes must be 0: its scale rounds to zero or is NaN
  float reciprocal;  // correctly rounded, and 0 where value is
  float rest;        // 1 / value - reciprocal
};

// x / divisor, correctly rounded: one Newton step on the quotient (Markstein), exact because the reciprocal is.
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

// A group's scale from its largest magnitude (NaN or infinite where an element is) over what that becomes: 6 or 4.
template <u32 LARGEST = 6>
__device__ __forceinline__ GroupScale group_scale(float absmax) {
  GroupScale scale = {E4M3_NAN, 0.0f, 0.0f, 0.0f};
  if (absmax <= LARGEST_FLOAT) {
    scale.code = to_e4m3(LARGEST == 4 ? absmax * 0.25f : divide_exactly(absmax, LARGEST, 1.0f / LARGEST));
    scale.value = from_e4m3(scale.code);
    if (scale.value > 0.0f) {
      scale.reciprocal = reciprocal(scale.value);
      scale.rest = fmaf(-scale.reciprocal, scale.value, 1.0f) * scale.reciprocal;
    }
  }
  return scale;
}

// Codes of eight elements of a group, and what they stand for in units of the scale where `values` is asked for. The
// quotient may differ from the correctly rounded one in its last bit, but never at a threshold of E2M1: for all 119
// scales, it lies on the side on which x lies (tests/test_formats.py).
template <class... Values>
__device__ __forceinline__ u32 quantize_elements(const float (&x)[8], const GroupScale& scale, Values&... values) {
  float elements[8];
#pragma unroll
  for (u32 i = 0; i < 8; ++i) elements[i] = fmaf(x[i], scale.reciprocal, x[i] * scale.rest);
  u32 codes = to_e2m1x8(elements, values...);
  return scale.value > 0.0f ? codes : 0;
}

// As quantize_elements for COUNT elements of each word; `missed` is what rounding takes from them. Returns the sum of
// its squares, in pairs of neighbours, pairs of pairs and so on, as formats/nvfp4.py does.
template <u32 COUNT, u32 WORDS>
__device__ __forceinline__ float quantize_and_compare(const float (&x)[WORDS][8], const GroupScale& scale,
                                                      u32 (&codes)[WORDS], float (&missed)[WORDS][8]) {
  float sums[WORDS][COUNT];
#pragma unroll
  for (u32 word = 0; word < WORDS; ++word) {
    float rounded[8];
    codes[word] = quantize_elements(x[word], scale, rounded);
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i) {
      missed[word][i] = fmaf(-rounded[i], scale.value, x[word][i]);
      sums[word][i] = __fmul_rn(missed[word][i], missed[word][i]);
    }
#pragma unroll
    for (u32 width = 1; width < COUNT; width *= 2)
#pragma unroll
      for (u32 i = 0; i < COUNT; i += 2 * width) sums[word][i] = __fadd_rn(sums[word][i], sums[word][i + width]);
  }
  return WORDS == 1 ? sums[0][0] : __fadd_rn(sums[0][0], sums[WORDS - 1][0]);
}

// Four over six: the better of two scales of a group, which LANES neighbouring lanes share, COUNT elements of each word
// in each.
template <u32 LANES, u32 COUNT, u32 WORDS>
__device__ __forceinline__ GroupScale quantize_four_over_six(const float (&x)[WORDS][8], float absmax,
                                                             u32 (&codes)[WORDS], float (&missed)[WORDS][8]) {
  static_assert(WORDS * COUNT * LANES == 16 && WORDS <= 2);
  GroupScale six = group_scale(absmax), four = group_scale<4>(absmax);
  u32 other_codes[WORDS];
  float other_missed[WORDS][8];
  float error = quantize_and_compare<COUNT>(x, six, codes, missed);
  float other_error = quantize_and_compare<COUNT>(x, four, other_codes, other_missed);
#pragma unroll
  for (u32 step = 1; step < LANES; step *= 2) {
    error = __fadd_rn(error, __shfl_xor_sync(ALL_LANES, error, step));
    other_error = __fadd_rn(other_error, __shfl_xor_sync(ALL_LANES, other_error, step));
  }
  bool better = other_error < error;
#pragma unroll
  for (u32 word = 0; word < WORDS; ++word) {
    codes[word] = better ? other_codes[word] : codes[word];
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i) missed[word][i] = better ? other_missed[word][i] : missed[word][i];
  }
  return better ? four : six;
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
