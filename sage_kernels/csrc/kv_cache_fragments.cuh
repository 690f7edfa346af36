// E2M1 codes to float16 in registers, as the operands of mma.m16n8k16.
#pragma once
#include "ptx.cuh"

// 4, 2 or 1 words that no other thread wants, kept where they are written.
template <u32 WORDS, u32 OFFSET>
__device__ __forceinline__ void load_once(u32 (&x)[WORDS], const u8* address) {
  if constexpr (WORDS == 4)
    asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "l"(address), "n"(OFFSET));
  else if constexpr (WORDS == 2)
    asm volatile("ld.global.nc.L1::no_allocate.v2.b32 {%0, %1}, [%2 + %3];"
                 : "=r"(x[0]), "=r"(x[1])
                 : "l"(address), "n"(OFFSET));
  else
    asm volatile("ld.global.nc.L1::no_allocate.b32 %0, [%1 + %2];" : "=r"(x[0]) : "l"(address), "n"(OFFSET));
}

// (a & mask) | (b & ~mask)
__device__ __forceinline__ u32 select_bits(u32 a, u32 b, u32 mask) {
  u32 y;
  asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(y) : "r"(a), "r"(b), "r"(mask));
  return y;
}

__device__ __forceinline__ u32 multiply_f16x2(u32 a, u32 b) {
  u32 y;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

// Eight codes of a word as four pairs of float16, times 2^-14: pair i holds nibbles i and i + 4. A code's sign and its
// exponent and mantissa bits go where float16 has its sign, its lowest exponent bits and its highest mantissa bit;
// E2M1's subnormal 0.5 then is one of float16's. The byte masks are applied once for two pairs.
__device__ __forceinline__ void unpack_e2m1(u32 codes, u32 (&pairs)[4]) {
  constexpr u32 SIGNS = 0x80808080u, KEPT = 0x8E008E00u;
  u32 low = select_bits(codes << 4, codes << 1, SIGNS);
  u32 high = select_bits(codes, codes >> 3, SIGNS);
  pairs[0] = (low << 8) & KEPT;
  pairs[1] = (high << 8) & KEPT;
  pairs[2] = low & KEPT;
  pairs[3] = high & KEPT;
}

// Two E4M3 scales as float16 times 2^7, which with unpack_e2m1's 2^-14 makes operands of 2^-7 the value: exact, and at
// most 21. NaN stays NaN.
__device__ __forceinline__ u32 unpack_scales(u32 bytes) {
  u32 y;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(y) : "h"(static_cast<u16>(bytes)));
  return multiply_f16x2(y, 0x58005800u);
}

// D += A B: A [16, 16], rows lane / 4 and + 8, columns 2 (lane % 4) + {0, 1} and + 8; B [16, 8] likewise, transposed;
// D [16, 8] float32.
__device__ __forceinline__ void mma_f16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// An 8 x 8 matrix of float16, of which a lane holds two neighbours of row lane / 4, transposed.
__device__ __forceinline__ u32 transpose_8x8(u32 x) {
  u32 y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}
