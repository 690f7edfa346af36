// The instructions that only Blackwell (sm_120a, sm_121a) has, one function each, and their emulation for other GPUs.
//
// Fragment layouts of mma.m16n8k64 mxf4nvf4 (PTX ISA, "Matrix Fragments for mma.m16n8k64"), lane = 4 g + t:
//   A: register 0 row g, k = 8t..8t+7; 1 row g+8; 2 row g, k + 32; 3 row g+8, k + 32. Element i of a register is nibble
//   i. B: register 0 column g, k = 8t..8t+7; 1 k + 32. C: rows g, g, g+8, g+8 at columns 2t, 2t+1, 2t, 2t+1. Scales:
//   four E4M3 for the four groups of 16 along k in one word; A's rows g and g+8 from lanes 2a and 2a+1 of the quad (a =
//   thread-id-a), B's column g from lane b of the quad (b = thread-id-b).
// Of mma.m16n8k32 mxf8f6f4 with E4M3 ("Matrix Fragments for mma.m16n8k32"): a register holds four elements, element i
// is byte i. A: register 0 row g, k = 4t..4t+3; 1 row g+8; 2 row g, k + 16; 3 row g+8, k + 16. B: register 0 column g,
// k = 4t..4t+3; 1 k + 16. C and the lanes of the scales as above; one E8M0 for all 32 along k, byte byte-id of the
// word.
#pragma once

#include "ptx.cuh"

#ifndef SAGE_EMULATE_FP4
#define SAGE_EMULATE_FP4 0
#endif

#if SAGE_EMULATE_FP4

// Tells a build with emulated instructions from a release build.
__device__ __constant__ u32 sage_emulates_fp4 = 1;

// Codes of eight numbers, and the values they stand for. Added to a power of two whose last bit is E2M1's there (which
// is 1/2 below 2), a number is rounded, ties to the even code; times 2^-126, where a float's exponents end as E2M1's
// do, the bits of the value are the code. NaN becomes the largest value, as with the instruction.
__device__ __forceinline__ u32 to_e2m1x8(const float (&x)[8], float (&values)[8]) {
  constexpr float LAST_BIT = 4194304.0f;                      // 2^22
  constexpr float SMALLEST_NORMAL = 1.1754943508222875e-38f;  // 2^-126
  u32 word = 0, signs = 0;
#pragma unroll
  for (int i = 7; i >= 0; --i) {
    float magnitude = fminf(fabsf(x[i]), 6.0f);
    float power = fmaxf(__uint_as_float(__float_as_uint(magnitude) & 0x7F800000u), 1.0f);
    float value = fmaf(power, -LAST_BIT, fmaf(power, LAST_BIT, magnitude));
    u32 code = __float_as_uint(value * SMALLEST_NORMAL);  // in bits 22 to 24
    word += i < 6 ? code >> (22 - 4 * i) : code << (4 * i - 22);
    signs = __funnelshift_l(__float_as_uint(x[i]), signs, 4);
    values[i] = copysignf(value, x[i]);
  }
  return word | (signs & 0x88888888u);
}

__device__ __forceinline__ u32 to_e2m1x8(const float (&x)[8]) {
  float values[8];
  return to_e2m1x8(x, values);
}

// Four E2M1 codes (the low 16 bits) as four signed bytes of twice their value.
__device__ __forceinline__ u32 doubled_values(u32 codes) {
  u32 magnitudes = permute_bytes(0x03020100u, 0x0C080604u, codes & 0x7777u);
  u32 negatives = permute_bytes(0xFDFEFF00u, 0xF4F8FAFCu, codes & 0x7777u);
  u32 sign = permute_bytes(0x0000FF00u, 0, codes >> 3 & 0x1111u);
  return (negatives & sign) | (magnitudes & ~sign);
}

__device__ __noinline__ float4 mma_nvfp4_emulated(uint4 a, uint2 b, float4 c, u32 scale_a, u32 scale_b, u32 lanes) {
  u32 lane = threadIdx.x % WARP, quad = lane & ~3u, column = (lane & 3) * 2;
  u32 thread_a = lanes >> 4, thread_b = lanes & 15;
  u32 mine_a[8] = {doubled_values(a.x), doubled_values(a.x >> 16), doubled_values(a.y), doubled_values(a.y >> 16),
                   doubled_values(a.z), doubled_values(a.z >> 16), doubled_values(a.w), doubled_values(a.w >> 16)};
  u32 mine_b[4] = {doubled_values(b.x), doubled_values(b.x >> 16), doubled_values(b.y), doubled_values(b.y >> 16)};
  float result[4] = {c.x, c.y, c.z, c.w};
  u32 scales_a[2], scales_b[2];
  for (int r = 0; r < 2; ++r) {
    scales_a[r] = __shfl_sync(ALL_LANES, scale_a, quad + 2 * thread_a + r);
    scales_b[r] = __shfl_sync(ALL_LANES, scale_b, 4 * (column + r) + thread_b);
  }
  for (int group = 0; group < 4; ++group) {  // 16 elements along k: two lanes of a quad hold 8 each
    int sums[4] = {0, 0, 0, 0};
    for (int t = 0; t < 2; ++t) {
      u32 holder = 2 * (group & 1) + t;
      for (int word = 0; word < 2; ++word) {
        u32 rows[2], columns[2];
        for (int r = 0; r < 2; ++r) {
          // A shuffle's register must not depend on the lane; `group` is the same in all of them.
          rows[r] = __shfl_sync(ALL_LANES, mine_a[4 * (group >> 1) + 2 * r + word], quad + holder);
          columns[r] = __shfl_sync(ALL_LANES, mine_b[2 * (group >> 1) + word], 4 * (column + r) + holder);
        }
        for (int i = 0; i < 4; ++i) sums[i] = __dp4a(int(rows[i >> 1]), int(columns[i & 1]), sums[i]);
      }
    }
    for (int i = 0; i < 4; ++i) {
      float scale =
          from_e4m3(scales_a[i >> 1] >> (8 * group) & 0xFF) * from_e4m3(scales_b[i & 1] >> (8 * group) & 0xFF);
      result[i] = fmaf(0.25f * float(sums[i]), scale, result[i]);
    }
  }
  return make_float4(result[0], result[1], result[2], result[3]);
}

template <u32 THREAD_A, u32 THREAD_B>
__device__ __forceinline__ void mma_nvfp4(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4],
                                          u32 scale_a, u32 scale_b) {
  float4 result = mma_nvfp4_emulated(make_uint4(a[0], a[1], a[2], a[3]), make_uint2(b0, b1),
                                     make_float4(c[0], c[1], c[2], c[3]), scale_a, scale_b, THREAD_A << 4 | THREAD_B);
  d[0] = result.x, d[1] = result.y, d[2] = result.z, d[3] = result.w;
}

__device__ __forceinline__ float from_e8m0(u32 byte) {
  return __uint_as_float(byte == 255 ? 0x7FFFFFFFu : byte ? byte << 23 : 0x00400000u);
}

// E4M3 fragments lie as in the instruction without scales that this GPU has; its sum of 32 products takes the scales.
template <u32 BYTE_A, u32 THREAD_A, u32 BYTE_B, u32 THREAD_B>
__device__ __forceinline__ void mma_mxfp8(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4],
                                          u32 scale_a, u32 scale_b) {
  float sums[4];
  asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
      : "=f"(sums[0]), "=f"(sums[1]), "=f"(sums[2]), "=f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
  u32 lane = threadIdx.x % WARP, quad = lane & ~3u, column = (lane & 3) * 2;
  float rows[2], columns[2];
#pragma unroll
  for (u32 i = 0; i < 2; ++i) {
    rows[i] = from_e8m0(__shfl_sync(ALL_LANES, scale_a, quad + 2 * THREAD_A + i) >> (8 * BYTE_A) & 0xFF);
    columns[i] = from_e8m0(__shfl_sync(ALL_LANES, scale_b, 4 * (column + i) + THREAD_B) >> (8 * BYTE_B) & 0xFF);
  }
#pragma unroll
  for (u32 i = 0; i < 4; ++i) d[i] = fmaf(sums[i] * rows[i >> 1], columns[i & 1], c[i]);
}

#else

// Eight E2M1 codes, rounded to nearest even and saturated at 6, x[0] in the lowest nibble.
__device__ __forceinline__ u32 to_e2m1x8(const float (&x)[8]) {
  u32 word;
  asm("{\n\t.reg .b8 b0, b1, b2, b3;\n\t"
      "cvt.rn.satfinite.e2m1x2.f32 b0, %2, %1;\n\t"
      "cvt.rn.satfinite.e2m1x2.f32 b1, %4, %3;\n\t"
      "cvt.rn.satfinite.e2m1x2.f32 b2, %6, %5;\n\t"
      "cvt.rn.satfinite.e2m1x2.f32 b3, %8, %7;\n\t"
      "mov.b32 %0, {b0, b1, b2, b3};\n\t}"
      : "=r"(word)
      : "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "f"(x[4]), "f"(x[5]), "f"(x[6]), "f"(x[7]));
  return word;
}

// The same, and the values of the codes.
__device__ __forceinline__ u32 to_e2m1x8(const float (&x)[8], float (&values)[8]) {
  u32 word = to_e2m1x8(x);
  u32 pairs[4];
  asm("{\n\t.reg .b8 b0, b1, b2, b3;\n\t"
      "mov.b32 {b0, b1, b2, b3}, %4;\n\t"
      "cvt.rn.f16x2.e2m1x2 %0, b0;\n\t"
      "cvt.rn.f16x2.e2m1x2 %1, b1;\n\t"
      "cvt.rn.f16x2.e2m1x2 %2, b2;\n\t"
      "cvt.rn.f16x2.e2m1x2 %3, b3;\n\t}"
      : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
      : "r"(word));
#pragma unroll
  for (u32 i = 0; i < 8; ++i) values[i] = from_f16(u16(pairs[i / 2] >> (16 * (i & 1))));
  return word;
}

// d = a b + c, 16x64 by 64x8, E2M1 with an E4M3 scale for every 16 along k.
template <u32 THREAD_A, u32 THREAD_B>
__device__ __forceinline__ void mma_nvfp4(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4],
                                          u32 scale_a, u32 scale_b) {
  asm("mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13}, {%14}, {0, %16}, {%15}, {0, %17};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]),
        "r"(scale_a), "r"(scale_b), "n"(THREAD_A), "n"(THREAD_B));
}

// d = a b + c, 16x32 by 32x8, E4M3 with an E8M0 scale for every 32 along k: bytes BYTE_A and BYTE_B of the scale words.
template <u32 BYTE_A, u32 THREAD_A, u32 BYTE_B, u32 THREAD_B>
__device__ __forceinline__ void mma_mxfp8(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4],
                                          u32 scale_a, u32 scale_b) {
  asm("mma.sync.aligned.m16n8k32.row.col.kind::mxf8f6f4.block_scale.scale_vec::1X.f32.e4m3.e4m3.f32.ue8m0 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13}, {%14}, {%16, %17}, {%15}, {%18, %19};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]),
        "r"(scale_a), "r"(scale_b), "n"(BYTE_A), "n"(THREAD_A), "n"(BYTE_B), "n"(THREAD_B));
}

#endif
