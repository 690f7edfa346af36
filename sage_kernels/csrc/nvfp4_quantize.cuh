// NVFP4 quantisation of one group, bit for bit as formats/nvfp4.py, and the power-of-two scale of reference.py.
#pragma once

#include "blackwell_fp4.cuh"

constexpr float E2M1_MAX = 6.0f;
constexpr u32 E4M3_NAN = 0x7F;

struct GroupScale {
    u32 code;          // E4M3
    float value;       // 0 where the group's codes must be 0: its scale rounds to zero or is NaN
    float reciprocal;  // correctly rounded
};

// x / scale, correctly rounded: one Newton step on the quotient (Markstein), exact because the reciprocal is.
__device__ __forceinline__ float divide_exactly(float x, float divisor, float reciprocal) {
    float quotient = x * reciprocal;
    return fmaf(fmaf(-quotient, divisor, x), reciprocal, quotient);
}

// Scale of a group from its largest magnitude, which is NaN or infinite where an element is.
__device__ __forceinline__ GroupScale group_scale(float absmax) {
    GroupScale scale = {E4M3_NAN, 0.0f, 0.0f};
    if (absmax <= LARGEST_FLOAT) {
        scale.code = to_e4m3(divide_exactly(absmax, E2M1_MAX, 1.0f / E2M1_MAX));
        scale.value = from_e4m3(scale.code);
        scale.reciprocal = scale.value > 0.0f ? __frcp_rn(scale.value) : 0.0f;
    }
    return scale;
}

__device__ __forceinline__ float scaled_element(float x, const GroupScale& scale) {
    return scale.value > 0.0f ? divide_exactly(x, scale.value, scale.reciprocal) : 0.0f;
}

// What E2M1 code `index` of `word` stands for.
__device__ __forceinline__ float decode_e2m1(u32 word, u32 index) {
    u32 code = word >> (4 * index);
    u32 magnitude = code & 7;
    // 2 exponent bits and 1 mantissa bit, moved to a half's; the bias is 1 there and 15 here.
    float value = from_f16(u16(magnitude << 9)) * 16384.0f;
    return code & 8 ? -value : value;
}

// The power of two that brings `absmax` into (672, 1344]; 1 for zero, NaN and infinity. (reference.power_of_two_scale)
__device__ __forceinline__ float power_of_two_scale(float absmax) {
    if (!(absmax > 0.0f && absmax <= LARGEST_FLOAT)) return 1.0f;
    int extra = 0;
    if (absmax < 1.0e-30f) absmax *= 18446744073709551616.0f, extra = 64;  // subnormals have no exponent field
    u32 bits = __float_as_uint(absmax);
    int exponent = int(bits >> 23) - 126;                     // of a mantissa in [0.5, 1)
    int top = 11 - ((bits & 0x7FFFFF) > 0x280000 ? 1 : 0);    // 1344 = 0.65625 * 2^11
    int power = min(top - exponent + extra, 126);
    return __uint_as_float(u32(power + 127) << 23);
}
