// What a consumer warp does with a key tile: scores, masks, online softmax, quantisation of P, P V.
#pragma once

#include "blackwell_fp4.cuh"
#include "nvfp4_items.cuh"

constexpr float RESCALE_THRESHOLD = 3.0f;  // powers of two that a row's maximum may grow unheeded
constexpr float LOG2_STRETCH = 11.392317422778762f - RESCALE_THRESHOLD;  // log2(448 * 6) less that headroom
constexpr float LOG2_E2M1_MAX = 2.584962500721156f;
constexpr float NO_MAXIMUM = -3.0e38f;  // below every score; finite, so that it can be subtracted
constexpr float LN2 = 0.6931471805599453f;

// 2^x with a straight line between powers of two, as the bits of a float: the sum with 1.5 * 2^23 leaves x in fixed
// point in the low bits. The line is lowered so that E2M1's thresholds come out within 0.5 % (reference.py).
constexpr float FIXED_ONE = 8192.0f;
constexpr float FIXED_ORIGIN = 12582912.0f + 127.0f * FIXED_ONE - 530.0f;
constexpr int FIXED_FLOOR = 0x4B400000 + 107 * 8192;  // 2^-20: rounds to zero, and its bits are a float's
constexpr u32 LINEAR_FROM = 5;                        // of every eight weights, the last three

// What a consumer warp keeps of its 32 query rows: two m-tiles of 16. A lane holds rows g and g + 8 of each; the two
// lanes of a pair share a group of 16 keys, and each looks after the scales of one row: "its" row g + 8 * (lane & 1).
struct Rows {
  u32 query[2][HELD_STEPS][4];
  u32 query_scale[2];
  float output[2][VALUE_COLUMNS][4];
  float sum[2][4];
  float shift[2];  // of its row: log2(stretch) - maximum, in powers of two
  float factor;    // powers of two that one unit of S is worth
};

__device__ __forceinline__ bool odd_lane(u32 lane) { return lane & 1; }

// Exchange within a pair of lanes: `even` of the even lane and `odd` of the odd lane reach both.
__device__ __forceinline__ void share_with_pair(float mine, u32 lane, float& even, float& odd) {
  float other = __shfl_xor_sync(ALL_LANES, mine, 1);
  even = odd_lane(lane) ? other : mine;
  odd = odd_lane(lane) ? mine : other;
}

// Largest of the 16 scores of a group, for the row that this lane looks after.
__device__ __forceinline__ float group_maximum(const float (&scores)[4][4], u32 lane) {
  float low = max_nan(scores[0][0], scores[0][1]), high = max_nan(scores[0][2], scores[0][3]);
#pragma unroll
  for (u32 n = 1; n < 4; ++n) {
    low = max_nan(low, max_nan(scores[n][0], scores[n][1]));
    high = max_nan(high, max_nan(scores[n][2], scores[n][3]));
  }
  float sent = odd_lane(lane) ? low : high, kept = odd_lane(lane) ? high : low;
  return max_nan(kept, __shfl_xor_sync(ALL_LANES, sent, 1));
}

// The rare path: a maximum has grown by more than the threshold. Rows where it has take the new one.
__device__ __forceinline__ void raise_maximum(Rows& rows, const float (&group)[2], float factor, u32 lane) {
#pragma unroll
  for (u32 m = 0; m < 2; ++m) {
    float largest = fmaxf(group[m], __shfl_xor_sync(ALL_LANES, group[m], 2));
    float grown = fmaf(largest, factor, rows.shift[m]);  // log2 of the largest stretched weight
    float alpha = 1.0f;
    if (grown > LOG2_STRETCH + RESCALE_THRESHOLD) {
      float shift = fmaf(-largest, factor, LOG2_STRETCH);
      alpha = exp2_approx(shift - rows.shift[m]);
      rows.shift[m] = shift;
    }
    float low, high;
    share_with_pair(alpha, lane, low, high);
#pragma unroll
    for (u32 n = 0; n < VALUE_COLUMNS; ++n) {
      rows.output[m][n][0] *= low, rows.output[m][n][1] *= low;
      rows.output[m][n][2] *= high, rows.output[m][n][3] *= high;
    }
    rows.sum[m][0] *= low, rows.sum[m][1] *= low, rows.sum[m][2] *= high, rows.sum[m][3] *= high;
  }
}

// Weights of eight keys of one row: 2^(score * factor + offset), as E2M1 codes.
__device__ __forceinline__ u32 round_weights(const float (&scores)[4][4], u32 row, float factor, float offset) {
  float fixed_offset = fmaf(offset, FIXED_ONE, FIXED_ORIGIN), fixed_factor = factor * FIXED_ONE;
  float weights[8];
#pragma unroll
  for (u32 i = 0; i < 8; ++i) {
    float score = scores[i >> 1][2 * row + (i & 1)];
    if (i < LINEAR_FROM) {
      weights[i] = exp2_approx(fmaf(score, factor, offset));
    } else {
      int fixed = __float_as_int(fmaf(score, fixed_factor, fixed_offset));
      weights[i] = __int_as_float(max(fixed, FIXED_FLOOR) << 10);
    }
  }
  return to_e2m1x8(weights);
}

// Where the consumer is, for masks: work item, query block and key tile.
struct Position {
  u32 index, block, tile;
};

// One mask element, in powers of two.
__device__ __forceinline__ float mask_value(u32 kind, const u8* address) {
  if (kind == MASK_BOOL) return load_global_1(address) ? 0.0f : -INFINITE;
  float value;
  if (kind == MASK_F32)
    value = __uint_as_float(load_global_4(address));
  else if (kind == MASK_F16)
    value = from_f16(load_global_2(address));
  else
    value = from_bf16(load_global_2(address));
  // -3.4e38, which many use for "never", must stay finite in powers of two: a row of nothing else is uniform in torch.
  return value == -INFINITE ? value : fmaxf(value * 1.44269504f, -1.0e38f);
}

__device__ __forceinline__ u32 mask_width(const Parameters& p) {
  return p.mask_kind == MASK_BOOL ? 1 : p.mask_kind == MASK_F32 ? 4 : 2;
}

// Scores that may not be seen become -inf. With a mask tensor the scores become powers of two (their factor is then 1).
__device__ __forceinline__ void mask_scores(const Parameters& p, const Position& at, float factor,
                                            float (&scores)[4][4], u32 m, u32 half, u32 lane) {
#pragma unroll
  for (u32 row_half = 0; row_half < 2; ++row_half) {
    // With a mask tensor there is no register to spare for what is the same in every call: it is computed anew.
    u32 here = MASK ? keep(lane) : lane;
    Item item = get_item(p, MASK ? keep(at.index) : at.index);
    u32 row = item.query_tile * QUERY_TILE + at.block * QUERY_BLOCK + 16 * m + 8 * row_half + (here >> 2);
    u32 first_key = at.tile * KEY_TILE + half * 32 + 8 * (here & 3);
    int limit = item.keys;
    if (p.causal) limit = min(limit, int(row) + 1);
    const u8* address = nullptr;
    if (MASK)
      address = keep(p.mask + (item.batch * p.mask_strides[0] + item.head * p.mask_strides[1] +
                               i64(row) * p.mask_strides[2] + i64(first_key) * p.mask_strides[3]) *
                                  mask_width(p));
#pragma unroll
    for (u32 i = 0; i < 8; ++i) {
      float& score = scores[i >> 1][2 * row_half + (i & 1)];
      bool seen = int(first_key + i) < limit;
      if (MASK) {
        score *= factor;
        if (seen && int(row) < p.query_length) score += mask_value(p.mask_kind, address);
        address += p.mask_strides[3] * mask_width(p);
      }
      if (!seen) score = -INFINITE;
    }
  }
}

// A consumer's lane in one stage: where its words are. Lanes read 16 bytes next to each other.
struct StageView {
  u32 fragments;  // codes, and scales of four words a lane
  u32 pairs;      // scales of two words a lane
  u32 delta;      // delta_s of the warp's rows
};

// Scales of K's 32 keys of one half.
template <u32 HALF>
__device__ __forceinline__ void load_key_scales(u32 (&words)[KEY_SCALES], const StageView& stage) {
  if constexpr (KEY_SCALES == 2) {
    uint2 two = load_shared_8<KEY_CODE_BYTES + 8 * HALF>(stage.fragments);
    words[0] = two.x, words[1] = two.y;
  } else {
    words[0] = load_shared_4<KEY_CODE_BYTES + 4 * HALF>(stage.pairs);
  }
}

__device__ __forceinline__ void load_value_scales(u32 (&words)[VALUE_SCALES], const StageView& stage) {
  if constexpr (VALUE_SCALES == 4) {
    uint4 four = load_shared_16<VALUE_OFFSET + VALUE_CODE_BYTES>(stage.fragments);
    words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
  } else {
    uint2 two = load_shared_8<VALUE_OFFSET + VALUE_CODE_BYTES>(stage.pairs);
    words[0] = two.x, words[1] = two.y;
  }
}

// Q K^T of one n-tile (8 keys) for both m-tiles, on top of delta_s.
template <u32 COLUMN>
__device__ __forceinline__ void multiply_qk_column(const Rows& rows, const StageView& stage,
                                                   const u32 (&key_scale)[KEY_SCALES], u32 b0, u32 b1, u32 b2, u32 b3,
                                                   float (&low)[4], float (&high)[4]) {
  constexpr u32 word = COLUMN % 4 * K_STEPS;  // of the half
  uint4 delta = load_shared_16<TILE_BYTES + COLUMN * BLOCKS * 64>(stage.delta);
  float start[4] = {__uint_as_float(delta.x), __uint_as_float(delta.y), __uint_as_float(delta.z),
                    __uint_as_float(delta.w)};
  mma_nvfp4<0, (word & 3)>(low, rows.query[0][0], b0, b1, start, rows.query_scale[0], key_scale[word >> 2]);
  mma_nvfp4<0, (word & 3)>(high, rows.query[1][0], b0, b1, start, rows.query_scale[1], key_scale[word >> 2]);
  if constexpr (K_STEPS == 2) {
    constexpr u32 next = word + 1;
    mma_nvfp4<1, (next & 3)>(low, rows.query[0][1], b2, b3, low, rows.query_scale[0], key_scale[next >> 2]);
    mma_nvfp4<1, (next & 3)>(high, rows.query[1][1], b2, b3, high, rows.query_scale[1], key_scale[next >> 2]);
  }
}

// Operand A of one step, both m-tiles: from registers or from where start_rows put it.
template <u32 STEP>
__device__ __forceinline__ void load_query_step(u32 (&query)[2][4], const Rows& rows, const StageView& stage) {
  if constexpr (STEP < HELD_STEPS) {
#pragma unroll
    for (u32 m = 0; m < 2; ++m)
#pragma unroll
      for (u32 i = 0; i < 4; ++i) query[m][i] = rows.query[m][STEP][i];
  } else {
    constexpr u32 OFFSET = (STEP - HELD_STEPS) * 2 * WARP * 16;
    u32 parked = parked_address(thread_index());  // no register for what is the same in every call
    uint4 low = load_shared_16<OFFSET>(parked), high = load_shared_16<OFFSET + WARP * 16>(parked);
    query[0][0] = low.x, query[0][1] = low.y, query[0][2] = low.z, query[0][3] = low.w;
    query[1][0] = high.x, query[1][1] = high.y, query[1][2] = high.z, query[1][3] = high.w;
  }
}

// S of four n-tiles in MXFP8, on top of delta_s, from step STEP along head_dim on. Bytes of the scale words belong to
// steps, lanes of a quad to n-tiles.
template <u32 HALF, u32 STEP>
__device__ __forceinline__ void multiply_qk_step(const Rows& rows, const StageView& stage, u32 key_scale,
                                                 float (&low)[4][4], float (&high)[4][4]) {
  if constexpr (PARKED_STEPS > 0) __syncwarp();  // loads stay behind it: made earlier, they would need registers
  u32 query[2][4];
  load_query_step<STEP>(query, rows, stage);
  uint4 first = load_shared_16<(2 * HALF * QK_STEPS + STEP) * WARP * 16>(stage.fragments);
  mma_mxfp8<STEP, 0, STEP, 0>(low[0], query[0], first.x, first.y, low[0], rows.query_scale[0], key_scale);
  mma_mxfp8<STEP, 0, STEP, 0>(high[0], query[1], first.x, first.y, high[0], rows.query_scale[1], key_scale);
  mma_mxfp8<STEP, 0, STEP, 1>(low[1], query[0], first.z, first.w, low[1], rows.query_scale[0], key_scale);
  mma_mxfp8<STEP, 0, STEP, 1>(high[1], query[1], first.z, first.w, high[1], rows.query_scale[1], key_scale);
  uint4 second = load_shared_16<((2 * HALF + 1) * QK_STEPS + STEP) * WARP * 16>(stage.fragments);
  mma_mxfp8<STEP, 0, STEP, 2>(low[2], query[0], second.x, second.y, low[2], rows.query_scale[0], key_scale);
  mma_mxfp8<STEP, 0, STEP, 2>(high[2], query[1], second.x, second.y, high[2], rows.query_scale[1], key_scale);
  mma_mxfp8<STEP, 0, STEP, 3>(low[3], query[0], second.z, second.w, low[3], rows.query_scale[0], key_scale);
  mma_mxfp8<STEP, 0, STEP, 3>(high[3], query[1], second.z, second.w, high[3], rows.query_scale[1], key_scale);
  if constexpr (STEP + 1 < QK_STEPS) multiply_qk_step<HALF, STEP + 1>(rows, stage, key_scale, low, high);
}

template <u32 HALF, u32 COLUMN = 0>
__device__ __forceinline__ void start_scores(const StageView& stage, float (&low)[4][4], float (&high)[4][4]) {
  uint4 delta = load_shared_16<TILE_BYTES + (4 * HALF + COLUMN) * BLOCKS * 64>(stage.delta);
  low[COLUMN][0] = high[COLUMN][0] = __uint_as_float(delta.x);
  low[COLUMN][1] = high[COLUMN][1] = __uint_as_float(delta.y);
  low[COLUMN][2] = high[COLUMN][2] = __uint_as_float(delta.z);
  low[COLUMN][3] = high[COLUMN][3] = __uint_as_float(delta.w);
  if constexpr (COLUMN < 3) start_scores<HALF, COLUMN + 1>(stage, low, high);
}

// S of two n-tiles.
template <u32 COLUMN>
__device__ __forceinline__ void multiply_qk_pair(const Rows& rows, const StageView& stage,
                                                 const u32 (&key_scale)[KEY_SCALES], float (&low)[4][4],
                                                 float (&high)[4][4]) {
  constexpr u32 n = COLUMN % 4, chunk = COLUMN * K_STEPS / 2;
  uint4 first = load_shared_16<chunk * WARP * 16>(stage.fragments);
  if constexpr (K_STEPS == 2) {
    uint4 second = load_shared_16<(chunk + 1) * WARP * 16>(stage.fragments);
    multiply_qk_column<COLUMN>(rows, stage, key_scale, first.x, first.y, first.z, first.w, low[n], high[n]);
    multiply_qk_column<COLUMN + 1>(rows, stage, key_scale, second.x, second.y, second.z, second.w, low[n + 1],
                                   high[n + 1]);
  } else {
    multiply_qk_column<COLUMN>(rows, stage, key_scale, first.x, first.y, 0, 0, low[n], high[n]);
    multiply_qk_column<COLUMN + 1>(rows, stage, key_scale, first.z, first.w, 0, 0, low[n + 1], high[n + 1]);
  }
}

// P V of two n-tiles (16 dims) for both m-tiles.
template <u32 COLUMN>
__device__ __forceinline__ void multiply_pv_pair(Rows& rows, const StageView& stage,
                                                 const u32 (&value_scale)[VALUE_SCALES], const u32 (&weights)[2][4],
                                                 const u32 (&weight_scale)[2]) {
  if constexpr (COLUMN < VALUE_COLUMNS) {
    uint4 codes = load_shared_16<VALUE_OFFSET + COLUMN / 2 * WARP * 16>(stage.fragments);
#pragma unroll
    for (u32 m = 0; m < 2; ++m)
      mma_nvfp4<0, (COLUMN & 3)>(rows.output[m][COLUMN], weights[m], codes.x, codes.y, rows.output[m][COLUMN],
                                 weight_scale[m], value_scale[COLUMN >> 2]);
    constexpr u32 next = COLUMN + 1;
#pragma unroll
    for (u32 m = 0; m < 2; ++m)
      mma_nvfp4<0, (next & 3)>(rows.output[m][next], weights[m], codes.z, codes.w, rows.output[m][next],
                               weight_scale[m], value_scale[next >> 2]);
  }
}

// P V and the row sum of P. `scales`: of the groups that a lane shares with its pair, byte 2 * half + m.
__device__ __forceinline__ void multiply_pv(Rows& rows, const StageView& stage, const u32 (&weights)[2][4],
                                            u32 scales) {
  u32 weight_scale[2], value_scale[VALUE_SCALES];
  load_value_scales(value_scale, stage);
  // Lanes 0 and 1 of a quad hold keys 0..15, lanes 2 and 3 keys 16..31 of both halves.
  u32 others = __shfl_xor_sync(ALL_LANES, scales, 2);
  weight_scale[0] = permute_bytes(scales, others, 0x6240);
  weight_scale[1] = permute_bytes(scales, others, 0x7351);
  multiply_pv_pair<0>(rows, stage, value_scale, weights, weight_scale);
  multiply_pv_pair<2>(rows, stage, value_scale, weights, weight_scale);
  multiply_pv_pair<4>(rows, stage, value_scale, weights, weight_scale);
  multiply_pv_pair<6>(rows, stage, value_scale, weights, weight_scale);
  multiply_pv_pair<8>(rows, stage, value_scale, weights, weight_scale);
  multiply_pv_pair<10>(rows, stage, value_scale, weights, weight_scale);
  multiply_pv_pair<12>(rows, stage, value_scale, weights, weight_scale);
  multiply_pv_pair<14>(rows, stage, value_scale, weights, weight_scale);
  constexpr u32 ONES = 0x22222222u, ONE_SCALES = 0x38383838u;
#pragma unroll
  for (u32 m = 0; m < 2; ++m)
    mma_nvfp4<0, 0>(rows.sum[m], weights[m], ONES, ONES, rows.sum[m], weight_scale[m], ONE_SCALES);
}

// 32 keys of the tile: their scores, and how far the largest of them lies above what the weights may reach.
struct Half {
  float scores[2][4][4];
  float group[2];    // largest score of the lane's group
  float largest[2];  // and its weight, in powers of two

  template <bool MASKED, u32 HALF>
  __device__ __forceinline__ bool score(const Parameters& p, const Rows& rows, const StageView& stage,
                                        const Position& at, float factor, u32 lane) {
    u32 key_scale[KEY_SCALES];
    load_key_scales<HALF>(key_scale, stage);
    if constexpr (QK_FP8) {
      start_scores<HALF>(stage, scores[0], scores[1]);
      multiply_qk_step<HALF, 0>(rows, stage, key_scale[0], scores[0], scores[1]);
    } else {
      multiply_qk_pair<4 * HALF>(rows, stage, key_scale, scores[0], scores[1]);
      multiply_qk_pair<4 * HALF + 2>(rows, stage, key_scale, scores[0], scores[1]);
    }
#pragma unroll
    for (u32 m = 0; m < 2; ++m) {
      if (MASKED) mask_scores(p, at, rows.factor, scores[m], m, HALF, lane);
      group[m] = group_maximum(scores[m], lane);
    }
    measure(rows, factor);
    return __any_sync(ALL_LANES, fmaxf(largest[0], largest[1]) > LOG2_STRETCH + RESCALE_THRESHOLD);
  }
  __device__ __forceinline__ void measure(const Rows& rows, float factor) {
#pragma unroll
    for (u32 m = 0; m < 2; ++m) largest[m] = fmaf(group[m], factor, rows.shift[m]);
  }
  // Two-level quantisation of the weights (section 3.2). Returns the scales of both m-tiles, a byte each.
  __device__ __forceinline__ u32 quantize(const Rows& rows, float factor, u32 lane, u32 half, u32 (&weights)[2][4]) {
    u32 scales = to_e4m3x2(exp2_approx(largest[0] - LOG2_E2M1_MAX), exp2_approx(largest[1] - LOG2_E2M1_MAX));
    float rounded[2];
    from_e4m3x2(scales, rounded[0], rounded[1]);
#pragma unroll
    for (u32 m = 0; m < 2; ++m) {
      float low, high;
      share_with_pair(rows.shift[m] - log2_approx(rounded[m]), lane, low, high);
      weights[m][2 * half] = round_weights(scores[m], 0, factor, low);
      weights[m][2 * half + 1] = round_weights(scores[m], 1, factor, high);
    }
    return scales;
  }
};

// One key tile of 64: the body of the inner loop. Where a maximum grows in the second half, the first half's weights
// still belong to the old one: then only the first half counts (a late scale is 0), and the tile is to be taken
// again for the second half alone. Returns whether the tile is done with.
template <bool MASKED>
__device__ __forceinline__ bool attend_tile(const Parameters& p, Rows& rows, const StageView& stage, const Position& at,
                                            bool second_time, u32 lane) {
  u32 weights[2][4], first, second;
  float factor = MASKED && MASK ? 1.0f : rows.factor;
  {
    Half half;
    if (half.score<MASKED, 0>(p, rows, stage, at, factor, lane)) {
      raise_maximum(rows, half.group, factor, lane);
      half.measure(rows, factor);
    }
    first = half.quantize(rows, factor, lane, 0, weights);
  }
  Half half;
  bool late = half.score<MASKED, 1>(p, rows, stage, at, factor, lane);
  second = half.quantize(rows, factor, lane, 1, weights);
  // Bytes 0 and 1: the m-tiles of the first half; 2 and 3: of the second.
  multiply_pv(rows, stage, weights, permute_bytes(second_time ? 0 : first, late ? 0 : second, 0x5410));
  if (late) raise_maximum(rows, half.group, factor, lane);
  return !late;
}
