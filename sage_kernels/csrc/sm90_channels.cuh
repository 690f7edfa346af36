// Eight 16-bit channels, what a thread loads at once where operands are quantised. Compile-time: BFLOAT16 1 | 0
// (float16).
#pragma once
#include "sm90.cuh"

struct Channels {
  float x[8];
};

DEVICE Channels unpack(uint4 raw) {
  const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
  Channels out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#if BFLOAT16
    out.x[2 * i] = __uint_as_float(words[i] << 16);
    out.x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000);
#else
    out.x[2 * i] = from_float16(static_cast<u16>(words[i]));
    out.x[2 * i + 1] = from_float16(static_cast<u16>(words[i] >> 16));
#endif
  }
  return out;
}

// Largest magnitude as the bits of a float, so that infinities and NaN win.
DEVICE u32 magnitude(float x) { return __float_as_uint(x) & 0x7fffffff; }

// Chunks of 16 bytes of an operand's row are exchanged so that wgmma finds them without bank conflicts.
DEVICE int swizzle(int row, int row_bytes) {
  return row_bytes == 128 ? row & 7 : row_bytes == 64 ? row >> 1 & 3 : row >> 2 & 1;
}
