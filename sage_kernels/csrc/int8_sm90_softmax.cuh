// The online softmax of int8_sm90_attention.cu: scores of a key block, integers as wgmma left them, to weights in E4M3.
// Compile-time names as there.
#pragma once
#include "int8_sm90_tiles.cuh"

constexpr int kEarly = SPLIT ? kScores / 8 * SPLIT : kScores;
static_assert(!LINE || ONES, "weights of a line exist as codes only");
constexpr u32 kMagicBits = 0x4B400000;
constexpr float kMagic = 12582912.f;
// The product of kMagic and a score's factor is rounded by up to 0.75 factors, by which a block's exponents are off. Up
// to this factor that is 0.375 codes of E4M3 and can't lead beyond the largest, which is followed by NaN. From there on
// a step from one score to the next is so large that few weights count: the block's largest score is subtracted first.
constexpr float kSteep = 1.f / 16.f;
constexpr float kLog2Stretch = 8.807354922f - HEADROOM;  // log2(448): the row maximum becomes E4M3's largest value
// 2^x by a straight line between powers of two (Schraudolph), within 6 %: 8 x counts E4M3's codes.
constexpr float kCodeUnit = 1.f / 16777216.f;  // of pack_integers
constexpr float kLineUnits = 8.f * kCodeUnit;
constexpr float kLineShift = (7.f - 0.0564f) * kLineUnits;  // E4M3's bias, less what the line exceeds 2^x on average

// Of 64 rows and KEYS keys. A thread holds rows lane / 4 and lane / 4 + 8 of its warp's 16: index 0 and 1 of the pairs.
struct Softmax {
  const Int8Params& p;
  const int lane = threadIdx.x % 32;
  u32 scores[kScores];
  u32 weights[kScores / 4];
  float maximum[2], row_sum[2], rescale[2], query_scale[2];
  float factor[2], offset[2], line_factor[2], line_offset[2];
  bool grown;

  DEVICE explicit Softmax(const Int8Params& p) : p(p) {}

  // Volatile, so that it comes before the turn with the tensor cores begins.
  DEVICE void start_scores() {
#pragma unroll
    for (int i = 0; i < kScores; ++i) asm volatile("mov.u32 %0, %1;" : "=r"(scores[i]) : "n"(kMagicBits));
  }

  // Keys beyond the end, and beyond the diagonal where causal, become -inf.
  DEVICE void mask_scores(int first_key, int row, int key_length) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const int key = first_key + i / 4 * 8 + lane % 4 * 2 + i % 2;
      const int limit = p.is_causal ? min(key_length, row + (i / 2 % 2) * 8 + 1) : key_length;
      if (key >= limit) scores[i] = 0xFF800000;
    }
  }

  // The running maximum, and what the exponents of this block's scores are. Where it grew, as it seldom does, O must be
  // rescaled.
  DEVICE void start_softmax(float key_scale) {
    // Bits of positive floats, and -inf, order as integers do, for which there is a three-input maximum.
    constexpr int kChains = 2;  // a row, so that one need not wait for the other
    int largest[2][kChains];
#pragma unroll
    for (int i = 0; i < kScores; i += 4) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int a = scores[i + 2 * r], b = scores[i + 2 * r + 1];
        int& chain = largest[r][i / 4 % kChains];
        chain = i < 4 * kChains ? max(a, b) : max(max(chain, a), b);
      }
    }
    bool grows = false, steep = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      largest[r][0] = max(largest[r][0], largest[r][1]);
      factor[r] = query_scale[r] * key_scale;
      if (factor[r] < 1e-35f) factor[r] = 1e-35f;  // keeps 0 * -inf away; a NaN passes
      steep |= factor[r] > kSteep;
      grows |= !(to_exponent(largest[r][0], r) <= maximum[r] + HEADROOM);
    }
    grown = __any_sync(~0u, grows || steep);
    float center = kMagic, start[2] = {0.f, 0.f};  // the float that a score is counted from, and its exponent
    if (grown) {
      steep = __any_sync(~0u, steep);
      if (steep) center = 0.f;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        int row_largest = max(largest[r][0], __shfl_xor_sync(~0u, largest[r][0], 1));
        row_largest = max(row_largest, __shfl_xor_sync(~0u, row_largest, 2));
        const float previous = maximum[r];
        const float scaled = to_exponent(row_largest, r);
        maximum[r] = scaled <= previous + (steep ? 0 : HEADROOM) ? previous : scaled;
        rescale[r] = exp2_approx(previous - (maximum[r] == -infinity() ? 0.f : maximum[r]));
        if (!ONES) row_sum[r] *= rescale[r];
        if (steep && scaled != -infinity()) start[r] = scaled;
        if (steep) subtract(scaled == -infinity() ? kMagic : __int_as_float(row_largest), r);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float shift = maximum[r] == -infinity() ? 0.f : maximum[r];
      offset[r] = fmaf(-center, factor[r], kLog2Stretch - (shift - start[r]));
      line_factor[r] = factor[r] * kLineUnits;
      line_offset[r] = fmaf(offset[r], kLineUnits, kLineShift);
    }
  }

  // Exact: differences of integers below 2^23.
  DEVICE void subtract(float reference, int r) {
#pragma unroll
    for (int i = 0; i < kScores; ++i)
      if (i / 2 % 2 == r) scores[i] = __float_as_uint(__uint_as_float(scores[i]) - reference);
  }

  DEVICE float to_exponent(int score, int r) const { return (__int_as_float(score) - kMagic) * factor[r]; }

  // Scores to weights in place: floats, or pairs of codes.
  template <int kBegin, int kEnd>
  DEVICE void exponentials() {
#pragma unroll
    for (int i = kBegin; i < kEnd; ++i) {
      const int r = i / 2 % 2;
      const float score = __uint_as_float(scores[i]);
      if (on_line(i)) {
        if (i % 2 == 0) continue;
        scores[i - 1] = pack_integers(fmaf(__uint_as_float(scores[i - 1]), line_factor[r], line_offset[r]),
                                      fmaf(score, line_factor[r], line_offset[r]));
      } else {
        const float weight = exp2_approx(fmaf(score, factor[r], offset[r]));
        if (!ONES) row_sum[r] += weight;
        scores[i] = __float_as_uint(weight);
      }
    }
  }

  // Whether a score's weight comes from the line: all 16 keys of a packed word's row do, or none.
  static DEVICE constexpr bool on_line(int i) { return i / 8 * LINE % 8 + LINE >= 8; }

  // S's accumulator layout is P's operand layout up to an order of keys that V's tiles have.
  DEVICE void pack_weights() {
#pragma unroll
    for (int i = 0; i < kScores; i += 16) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const u32* s = scores + i + 2 * r;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const u32* t = s + 8 * half;
          weights[i / 4 + r + 2 * half] = on_line(i + 8 * half)
                                              ? __byte_perm(t[0], t[4], 0x6420)
                                              : pack_e4m3(__uint_as_float(t[0]), __uint_as_float(t[1]),
                                                          __uint_as_float(t[4]), __uint_as_float(t[5]));
        }
      }
    }
  }
};
