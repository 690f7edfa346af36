// What training_sm90_quantize.cu and training_sm90_rows.cu share. A thread block takes 128 tokens of a head; a thread
// 8 channels of 4 tokens, once or twice: those that are neighbours in transposed tiles, whose rows hold tokens in the
// order in which accumulators become an 8-bit operand (triton_kernels/numbers.permuted).
// Compile-time: HEAD_DIM 64 | 128, to which tiles are padded; BFLOAT16 1 | 0 (float16).
#pragma once
#include "sm90_channels.cuh"

constexpr int kTokens = 128, kThreads = 256, kWarps = kThreads / 32;
constexpr int kQueryTile = 64, kHalves = kTokens / kQueryTile;  // tiles of queries are half as long as those of keys
constexpr int kGroups = HEAD_DIM / 8;                           // of 8 channels
constexpr int kSets = kGroups / 4;                              // of 4 groups, which a warp takes
constexpr int kChunkStep = 2 * kWarps / kSets;                  // chunks are 16 tokens
constexpr int kRounds = kTokens / 16 / kChunkStep;
constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
constexpr float kLimit = 127.f;
constexpr float kSmallest = 2e-36f;  // of tiles that get codes other than 0

// What a thread takes.
struct Place {
  int group, quad, chunk;

  DEVICE Place()
      : group(threadIdx.x / 32 % kSets * 4 + threadIdx.x % 4),
        quad(threadIdx.x / 4 % 4),
        chunk(threadIdx.x / 32 / kSets * 2 + threadIdx.x % 32 / 16) {}

  // The i-th of the four tokens.
  DEVICE int token(int round, int i) const {
    return 16 * (chunk + kChunkStep * round) + 8 * (i / 2) + 2 * quad + i % 2;
  }

  // Which half of the tokens they are in.
  DEVICE int half(int round) const { return (chunk + kChunkStep * round) / 4; }
};

// Zero where there is nothing. Rows of the source start at multiples of 16 bytes, `stride` elements apart.
DEVICE void load_tokens(uint4 (&raw)[kRounds][4], const u16* source, i64 stride, int first, int length, int head_dim,
                        const Place& at) {
#pragma unroll
  for (int round = 0; round < kRounds; ++round)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first + at.token(round, i);
      raw[round][i] = make_uint4(0, 0, 0, 0);
      if (row < length && 8 * at.group < head_dim)
        raw[round][i] = *reinterpret_cast<const uint4*>(source + row * stride + 8 * at.group);
    }
}

// ---- codes ---------------------------------------------------------------------------------------------------------

// Codes times `scale` are the numbers again. It is NaN where they are not all finite, which then have codes of 0.
struct Scale {
  float scale, divisor, inverse;
  bool is_usable;
};

// The next step of an approximate quotient, which rounds it correctly where `inverse` is that of `divisor` (Markstein).
DEVICE float correct_quotient(float estimate, float numerator, float divisor, float inverse) {
  return fmaf(fmaf(-estimate, divisor, numerator), inverse, estimate);
}

DEVICE Scale make_scale(u32 largest) {
  const float absmax = __uint_as_float(largest);
  const bool is_finite = largest < 0x7f800000, is_usable = is_finite && absmax > kSmallest;
  constexpr float kInverse = 1.f / kLimit;
  const float quotient = correct_quotient(absmax * kInverse, absmax, kLimit, kInverse);
  const float scale = is_finite ? quotient : __uint_as_float(0x7fc00000), divisor = is_usable ? scale : 1.f;
  // Not the division operator, whose slow path takes a stack.
  const float inverse = reciprocal_approx(divisor);
  return {scale, divisor, correct_quotient(inverse, 1.f, divisor, inverse), is_usable};
}

// In the low byte. The quotient is correctly rounded, because 16-bit numbers fall between two codes often enough for a
// product with the inverse to tell.
DEVICE u32 find_code(float x, const Scale& s) {
  const float numerator = s.is_usable ? x : 0.f, estimate = numerator * s.inverse;
  return __float_as_uint(correct_quotient(estimate, numerator, s.divisor, s.inverse) + kRound);
}

DEVICE u32 low_bytes(u32 a, u32 b, u32 c, u32 d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// The largest of a thread block, by all its threads; `scratch` is of kWarps words that nothing else uses.
DEVICE u32 block_maximum(u32 largest, u32 scratch) {
#pragma unroll
  for (int lane = 1; lane < 32; lane *= 2) largest = max(largest, u32(__shfl_xor_sync(~0u, int(largest), lane)));
  if (threadIdx.x % 32 == 0) store_shared_word(scratch + threadIdx.x / 32 * 4, largest);
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) largest = max(largest, load_shared_word(scratch + warp * 4));
  return largest;
}

// Of each half, from what a thread found in each round.
DEVICE uint2 half_maxima(const u32 (&largest)[kRounds], const Place& at, u32 scratch, u32 other_scratch) {
  uint2 own = make_uint2(0, 0);
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    if (at.half(round) == 0)
      own.x = max(own.x, largest[round]);
    else
      own.y = max(own.y, largest[round]);
  }
  return make_uint2(block_maximum(own.x, scratch), block_maximum(own.y, other_scratch));
}

// ---- images --------------------------------------------------------------------------------------------------------

// Codes of 8 channels of a token, as a tile with rows of HEAD_DIM bytes.
DEVICE void store_codes(u8* image, int token, int group, const u32 (&codes)[8]) {
  *reinterpret_cast<uint2*>(image + token * HEAD_DIM + ((group / 2 ^ swizzle(token, HEAD_DIM)) << 4) + group % 2 * 8) =
      make_uint2(low_bytes(codes[0], codes[1], codes[2], codes[3]), low_bytes(codes[4], codes[5], codes[6], codes[7]));
}

// 8 channels of a token, as they are, to rows of HEAD_DIM numbers.
DEVICE void store_16bit(u16* rows, int token, int group, const Channels& x) {
  u32 words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    words[i] = BFLOAT16 ? pack_bfloat16(x.x[2 * i], x.x[2 * i + 1]) : pack_float16(x.x[2 * i], x.x[2 * i + 1]);
  *reinterpret_cast<uint4*>(rows + token * HEAD_DIM + group * 8) = make_uint4(words[0], words[1], words[2], words[3]);
}

// A transposed tile of HEAD_DIM rows is gathered in shared memory, where every 8 rows are so far apart that the words
// of a warp lie in different banks.
template <int kTileTokens>
struct Transposed {
  static constexpr int kBytes = HEAD_DIM * kTileTokens + HEAD_DIM / 8 * 32;
  u32 base;

  DEVICE u32 row(int channel) const { return base + channel * kTileTokens + channel / 8 * 32; }

  // Of four tokens that are neighbours.
  DEVICE void put(int channel, int chunk, int quad, u32 codes) const {
    store_shared_word(row(channel) + ((chunk ^ swizzle(channel, kTileTokens)) << 4) + 4 * quad, codes);
  }

  DEVICE void store(u8* image) const {
    constexpr int kChunks = kTileTokens / 16;
#pragma unroll
    for (int i = threadIdx.x; i < HEAD_DIM * kChunks; i += kThreads)
      reinterpret_cast<uint4*>(image)[i] = load_shared_words(row(i / kChunks) + i % kChunks * 16);
  }
};
