// SageAttention3's attention (algorithm 1, lines 4 to 16) on packed NVFP4 operands.
//
// A thread block owns 256 query rows: eight consumer warps of 32 rows each. Four correction warps, one on each quadrant
// of the multiprocessor, load the key/value tiles (one bulk copy each), and multiply the eight means of the query blocks
// with both digits of K: delta_s, the start value of the consumers' accumulators, never leaves shared memory.
#include "blackwell_fp4.cuh"
#include "nvfp4_images.cuh"

#ifndef MASK
#error "compile with -DMASK=0 or 1"
#endif

enum MaskKind : u32 { MASK_BOOL = 0, MASK_F32 = 1, MASK_F16 = 2, MASK_BF16 = 3 };

struct Parameters {
    const u8* queries;           // [B, H, query tiles, BLOCKS] images
    const u8* means;             // [B, H, query tiles] images
    const u8* keys_values;       // [B, Hkv, key tiles] images
    const float* query_factors;  // [B, H, query tiles, BLOCKS]: what one unit of the packed Q is worth
    const float* key_factors;    // [B, Hkv]
    const float* value_factors;  // [B, Hkv]
    const float* value_means;    // [B, Hkv, HEAD_DIM]
    const float* lse_shifts;     // [B, H, Nq] q . mean(k), or null
    const int* key_lengths;      // [B], or null
    const u8* mask;              // or null
    const u8* tile_seen;         // [mask B, mask H, query tiles, key tiles]: 0 where the mask hides all, or null
    void* output;                // [B, H, Nq, head_dim], bf16 or fp16
    float* lse;                  // [B, H, Nq], or null
    i64 output_strides[3];       // of B, H and N, in elements; head_dim is contiguous
    i64 mask_strides[4];         // in elements
    i64 tile_seen_strides[2];    // of B and H
    int batch, heads, kv_heads, query_length, key_length, head_dim, query_tiles, key_tiles;
    int causal, output_is_bf16, mask_kind;
    float scale_log2e;           // |softmax scale| * log2(e)
    float scale;                 // softmax scale, for LSE
};

constexpr u32 CORRECTION_WARPS = 4;
constexpr u32 THREADS = (CORRECTION_WARPS + BLOCKS) * WARP;
constexpr u32 DELTA_BYTES = BLOCKS * KEY_TILE * 8;  // each value twice: a whole accumulator fragment is one 16-byte load
constexpr u32 STAGE_BYTES = TILE_BYTES + DELTA_BYTES;
constexpr u32 STAGES = HEAD_DIM > 64 ? 5 : 9;
constexpr u32 CORRECTION_REGISTERS = 40;
constexpr u32 CONSUMER_REGISTERS = 232;

constexpr float RESCALE_THRESHOLD = 3.0f;                    // powers of two that a row's maximum may grow unheeded
constexpr float LOG2_STRETCH = 11.392317422778762f - RESCALE_THRESHOLD;  // log2(448 * 6) less that headroom
constexpr float LOG2_E2M1_MAX = 2.584962500721156f;
constexpr float NO_MAXIMUM = -3.0e38f;                       // below every score; finite, so that it can be subtracted
constexpr float LN2 = 0.6931471805599453f;

// 2^x with a straight line between powers of two, as the bits of a float: the sum with 1.5 * 2^23 leaves x in fixed
// point in the low bits. The line is lowered so that E2M1's thresholds come out within 0.5 % (reference.py).
constexpr float FIXED_ONE = 8192.0f;
constexpr float FIXED_ORIGIN = 12582912.0f + 127.0f * FIXED_ONE - 530.0f;
constexpr int FIXED_FLOOR = 0x4B400000 + 107 * 8192;         // 2^-20: rounds to zero, and its bits are a float's
constexpr u32 LINEAR_FROM = 5;                               // of every eight weights, the last three

struct Pipeline {
    u32 stage = 0, phase = 0;
    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
};

struct Shared {
    u8* stages;
    u64* full;        // key/value tile has arrived
    u64* corrected;   // and delta_s beside it
    u64* empty;       // consumers are done with both
};

// One work item: 256 query rows of one head.
struct Item {
    u32 batch, head, kv_head, query_tile, tiles;
    int keys;
    const u8* tile_seen;
};

__device__ __forceinline__ u32 item_count(const Parameters& p) { return u32(p.batch) * p.heads * p.query_tiles; }

__device__ __forceinline__ Item get_item(const Parameters& p, u32 index) {
    Item item;
    u32 head_index = index / p.query_tiles;
    item.query_tile = index % p.query_tiles;
    if (p.causal) item.query_tile = p.query_tiles - 1 - item.query_tile;  // the longest first
    item.batch = head_index / p.heads;
    item.head = head_index % p.heads;
    item.kv_head = item.batch * p.kv_heads + item.head / (p.heads / p.kv_heads);
    item.keys = p.key_length;
    if (p.key_lengths) item.keys = max(0, min(item.keys, p.key_lengths[item.batch]));
    int last = item.keys;
    if (p.causal) last = min(last, int((item.query_tile + 1) * QUERY_TILE));
    item.tiles = (last + KEY_TILE - 1) / KEY_TILE;
    item.tile_seen = nullptr;
    if (MASK)
        item.tile_seen = p.tile_seen + item.batch * p.tile_seen_strides[0] + item.head * p.tile_seen_strides[1] +
                         i64(item.query_tile) * p.key_tiles;
    return item;
}

__device__ __forceinline__ bool is_skipped(const Item& item, u32 tile) { return MASK && item.tile_seen[tile] == 0; }

// Walks over all tiles of all items of this thread block, some tiles ahead of the correction.
struct Loader {
    u32 index, tile, issued;
    Item item;
    Pipeline pipeline;

    __device__ __forceinline__ void start(const Parameters& p) {
        index = blockIdx.x, tile = 0, issued = 0;
        if (index < item_count(p)) item = get_item(p, index);
        find(p);
    }
    __device__ __forceinline__ bool done(const Parameters& p) const { return index >= item_count(p); }
    // The next tile that isn't skipped, from `tile` on.
    __device__ __forceinline__ void find(const Parameters& p) {
        while (!done(p)) {
            while (tile < item.tiles && is_skipped(item, tile)) ++tile;
            if (tile < item.tiles) return;
            index += gridDim.x, tile = 0;
            if (!done(p)) item = get_item(p, index);
        }
    }
    __device__ __forceinline__ bool has_room(const Shared& shared) const {
        return barrier_test(shared.empty[pipeline.stage], pipeline.phase ^ 1);
    }
    __device__ __forceinline__ void issue(const Parameters& p, const Shared& shared) {
        u64& barrier = shared.full[pipeline.stage];
        barrier_expect_bytes(barrier, TILE_BYTES);
        bulk_copy(shared.stages + pipeline.stage * STAGE_BYTES,
                  p.keys_values + (i64(item.kv_head) * p.key_tiles + tile) * TILE_BYTES, TILE_BYTES, barrier);
        pipeline.advance();
        ++tile, ++issued;
        find(p);
    }
};

// delta_s of two n-tiles: (means of the eight query blocks) x (16 keys), against both digits of K.
__device__ __forceinline__ void correct_tile(u8* stage, const u32 (&mean)[K_STEPS][4], u32 mean_scale, u32 warp, u32 lane) {
    constexpr u32 WORDS = 2 * K_STEPS;  // scale words of two n-tiles, one a lane of the quad
    u32 word = WORDS * warp + (lane & (WORDS - 1));
    u32 scale_offset = ((lane & ~3u) + (word & 3)) * (WORDS * 4) + (word >> 2) * 4;
    float delta[2][4] = {};
#pragma unroll
    for (u32 digit = 0; digit < 2; ++digit) {
        const u8* key = stage + digit * KEY_BYTES;
        u32 scale = *reinterpret_cast<const u32*>(key + KEY_CODE_BYTES + scale_offset);
        u32 codes[2 * K_STEPS * 2];
#pragma unroll
        for (u32 chunk = 0; chunk < K_STEPS; ++chunk) {
            uint4 four = *reinterpret_cast<const uint4*>(key + ((warp * K_STEPS + chunk) * WARP + lane) * 16);
            codes[4 * chunk] = four.x, codes[4 * chunk + 1] = four.y, codes[4 * chunk + 2] = four.z, codes[4 * chunk + 3] = four.w;
        }
        mma_nvfp4<0, 0>(delta[0], mean[0], codes[0], codes[1], delta[0], mean_scale, scale);
        if constexpr (K_STEPS == 2) {
            mma_nvfp4<1, 1>(delta[0], mean[1], codes[2], codes[3], delta[0], mean_scale, scale);
            mma_nvfp4<0, 2>(delta[1], mean[0], codes[4], codes[5], delta[1], mean_scale, scale);
            mma_nvfp4<1, 3>(delta[1], mean[1], codes[6], codes[7], delta[1], mean_scale, scale);
        } else {
            mma_nvfp4<0, 1>(delta[1], mean[0], codes[2], codes[3], delta[1], mean_scale, scale);
        }
    }
#pragma unroll
    for (u32 n = 0; n < 2; ++n)
        *reinterpret_cast<float4*>(stage + TILE_BYTES + ((2 * warp + n) * WARP + lane) * 16) =
            make_float4(delta[n][0], delta[n][1], delta[n][0], delta[n][1]);
}

__device__ __forceinline__ void correct(const Parameters& p, const Shared& shared, u32 warp, u32 lane) {
    bool loads = warp == 0 && lane == 0;
    Loader loader;
    if (loads) loader.start(p);
    Pipeline pipeline;
    u32 corrected = 0;
    for (u32 index = blockIdx.x; index < item_count(p); index += gridDim.x) {
        Item item = get_item(p, index);
        const u8* image = p.means + ((i64(item.batch) * p.heads + item.head) * p.query_tiles + item.query_tile) * MEAN_BYTES;
        u32 mean[K_STEPS][4];
#pragma unroll
        for (u32 step = 0; step < K_STEPS; ++step) {
            uint2 codes = *reinterpret_cast<const uint2*>(image + (step * WARP + lane) * 8);
            mean[step][0] = codes.x, mean[step][1] = 0, mean[step][2] = codes.y, mean[step][3] = 0;
        }
        u32 mean_scale = *reinterpret_cast<const u32*>(image + MEAN_CODE_BYTES + lane * 4);
        for (u32 tile = 0; tile < item.tiles; ++tile) {
            if (is_skipped(item, tile)) continue;
            if (loads) {
                while (!loader.done(p) && (loader.issued <= corrected || loader.has_room(shared))) {
                    if (loader.issued <= corrected) barrier_wait(shared.empty[loader.pipeline.stage], loader.pipeline.phase ^ 1);
                    loader.issue(p, shared);
                }
            }
            __syncwarp();
            barrier_wait(shared.full[pipeline.stage], pipeline.phase);
            correct_tile(shared.stages + pipeline.stage * STAGE_BYTES, mean, mean_scale, warp, lane);
            __syncwarp();
            if (lane == 0) barrier_arrive(shared.corrected[pipeline.stage]);
            pipeline.advance();
            ++corrected;
        }
    }
}

// What a consumer warp keeps of its 32 query rows: two m-tiles of 16. A lane holds rows g and g + 8 of each; the two
// lanes of a pair share a group of 16 keys, and each looks after the scales of one row: "its" row g + 8 * (lane & 1).
struct Rows {
    u32 query[2][K_STEPS][4];
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

// Where the consumer is, for masks.
struct Position {
    u32 first_row, first_key;  // of the warp and of the key tile
    int keys;                  // valid keys
    const u8* mask;            // of (batch, head), or null
};

__device__ __forceinline__ float mask_value(const Parameters& p, const u8* mask, i64 index) {
    if (p.mask_kind == MASK_BOOL) return mask[index] ? 0.0f : -INFINITY;
    float value;
    if (p.mask_kind == MASK_F32) value = reinterpret_cast<const float*>(mask)[index];
    else if (p.mask_kind == MASK_F16) value = from_f16(reinterpret_cast<const u16*>(mask)[index]);
    else value = from_bf16(reinterpret_cast<const u16*>(mask)[index]);
    // -3.4e38, which many use for "never", must stay finite in powers of two: a row of nothing else is uniform in torch.
    return value == -INFINITY ? value : fmaxf(value * 1.44269504f, -1.0e38f);
}

// Scores that may not be seen become -inf. With a mask tensor the scores become powers of two (their factor is then 1).
__device__ __forceinline__ void mask_scores(const Parameters& p, const Position& at, float factor, float (&scores)[4][4],
                                            u32 m, u32 half, u32 lane) {
    u32 first_key = at.first_key + half * 32 + 8 * (lane & 3);
#pragma unroll
    for (u32 row_half = 0; row_half < 2; ++row_half) {
        u32 row = at.first_row + 16 * m + 8 * row_half + (lane >> 2);
        int limit = at.keys;
        if (p.causal) limit = min(limit, int(row) + 1);
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
            float& score = scores[i >> 1][2 * row_half + (i & 1)];
            u32 key = first_key + i;
            if (MASK) {
                score *= factor;
                if (int(key) < limit && int(row) < p.query_length)
                    score += mask_value(p, at.mask, i64(row) * p.mask_strides[2] + i64(key) * p.mask_strides[3]);
            }
            if (int(key) >= limit) score = -INFINITY;
        }
    }
}

template <u32 N>
__device__ __forceinline__ void load_words(u32 (&words)[N], const u8* from) {
    static_assert(N == 2 || N == 4);
    if constexpr (N == 2) {
        uint2 two = *reinterpret_cast<const uint2*>(from);
        words[0] = two.x, words[1] = two.y;
    } else {
        uint4 four = *reinterpret_cast<const uint4*>(from);
        words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
    }
}

// S of 32 keys for both m-tiles, on top of delta_s.
template <u32 HALF>
__device__ __forceinline__ void multiply_qk(const Rows& rows, const u8* stage, const u32 (&key_scale)[2 * K_STEPS],
                                            float (&scores)[2][4][4], u32 block, u32 lane) {
    u32 codes[4 * K_STEPS * 2];
#pragma unroll
    for (u32 chunk = 0; chunk < 2 * K_STEPS; ++chunk) {
        uint4 four = *reinterpret_cast<const uint4*>(stage + ((HALF * 2 * K_STEPS + chunk) * WARP + lane) * 16);
        codes[4 * chunk] = four.x, codes[4 * chunk + 1] = four.y, codes[4 * chunk + 2] = four.z, codes[4 * chunk + 3] = four.w;
    }
    float start[4][4];
#pragma unroll
    for (u32 n = 0; n < 4; ++n) {
        float4 delta = *reinterpret_cast<const float4*>(stage + TILE_BYTES + ((HALF * 4 + n) * BLOCKS + block) * 64 + (lane & 3) * 16);
        start[n][0] = delta.x, start[n][1] = delta.y, start[n][2] = delta.z, start[n][3] = delta.w;
    }
    auto multiply = [&](auto column) {
        constexpr u32 n = decltype(column)::value, word = (HALF * 4 + n) * K_STEPS;
#pragma unroll
        for (u32 m = 0; m < 2; ++m)
            mma_nvfp4<0, (word & 3)>(scores[m][n], rows.query[m][0], codes[n * K_STEPS * 2], codes[n * K_STEPS * 2 + 1],
                                     start[n], rows.query_scale[m], key_scale[word >> 2]);
        if constexpr (K_STEPS == 2) {
#pragma unroll
            for (u32 m = 0; m < 2; ++m)
                mma_nvfp4<1, ((word + 1) & 3)>(scores[m][n], rows.query[m][1], codes[n * 4 + 2], codes[n * 4 + 3],
                                               scores[m][n], rows.query_scale[m], key_scale[(word + 1) >> 2]);
        }
    };
    multiply(Constant<0>()), multiply(Constant<1>()), multiply(Constant<2>()), multiply(Constant<3>());
}

// P V and the row sum of P, for both m-tiles.
__device__ __forceinline__ void multiply_pv(Rows& rows, const u8* stage, const u32 (&weights)[2][4], const u32 (&weight_scale)[2],
                                            u32 lane) {
    const u8* values = stage + VALUE_OFFSET;
    u32 value_scale[VALUE_SCALES];
    load_words(value_scale, values + VALUE_CODE_BYTES + lane * (VALUE_SCALES * 4));
    auto multiply = [&](auto pair) {
        constexpr u32 n = 2 * decltype(pair)::value;
        if constexpr (n < VALUE_COLUMNS) {
            uint4 codes = *reinterpret_cast<const uint4*>(values + (n / 2 * WARP + lane) * 16);
#pragma unroll
            for (u32 m = 0; m < 2; ++m)
                mma_nvfp4<0, (n & 3)>(rows.output[m][n], weights[m], codes.x, codes.y, rows.output[m][n], weight_scale[m],
                                      value_scale[n >> 2]);
#pragma unroll
            for (u32 m = 0; m < 2; ++m)
                mma_nvfp4<0, ((n + 1) & 3)>(rows.output[m][n + 1], weights[m], codes.z, codes.w, rows.output[m][n + 1],
                                            weight_scale[m], value_scale[(n + 1) >> 2]);
        }
    };
    multiply(Constant<0>()), multiply(Constant<1>()), multiply(Constant<2>()), multiply(Constant<3>());
    multiply(Constant<4>()), multiply(Constant<5>()), multiply(Constant<6>()), multiply(Constant<7>());
    constexpr u32 ONES = 0x22222222u, ONE_SCALES = 0x38383838u;
#pragma unroll
    for (u32 m = 0; m < 2; ++m) mma_nvfp4<0, 0>(rows.sum[m], weights[m], ONES, ONES, rows.sum[m], weight_scale[m], ONE_SCALES);
}

// One key tile of 64: the body of the inner loop.
template <bool MASKED>
__device__ __forceinline__ void attend_tile(const Parameters& p, Rows& rows, const u8* stage, const Position& at, u32 block, u32 lane) {
    u32 key_scale[2 * K_STEPS];
    load_words(key_scale, stage + KEY_CODE_BYTES + lane * (2 * K_STEPS * 4));
    u32 weights[2][4], weight_scale[2] = {};
    float factor = MASKED && MASK ? 1.0f : rows.factor;
    auto attend_half = [&](auto which) {
        constexpr u32 half = decltype(which)::value;
        float scores[2][4][4], group[2], largest[2];
        multiply_qk<half>(rows, stage, key_scale, scores, block, lane);
#pragma unroll
        for (u32 m = 0; m < 2; ++m) {
            if (MASKED) mask_scores(p, at, rows.factor, scores[m], m, half, lane);
            group[m] = group_maximum(scores[m], lane);
            largest[m] = fmaf(group[m], factor, rows.shift[m]);
        }
        constexpr float LIMIT = LOG2_STRETCH + RESCALE_THRESHOLD;
        if (__any_sync(ALL_LANES, largest[0] > LIMIT || largest[1] > LIMIT)) {
            raise_maximum(rows, group, factor, lane);
#pragma unroll
            for (u32 m = 0; m < 2; ++m) largest[m] = fmaf(group[m], factor, rows.shift[m]);
        }
#pragma unroll
        for (u32 m = 0; m < 2; ++m) {
            u32 scale = to_e4m3(exp2_approx(largest[m] - LOG2_E2M1_MAX));
            float low, high;
            share_with_pair(rows.shift[m] - log2_approx(from_e4m3(scale)), lane, low, high);
            weights[m][2 * half] = round_weights(scores[m], 0, factor, low);
            weights[m][2 * half + 1] = round_weights(scores[m], 1, factor, high);
            weight_scale[m] = half == 0 ? scale : permute_bytes(weight_scale[m], scale, 0x0040);
        }
    };
    attend_half(Constant<0>());
    attend_half(Constant<1>());
#pragma unroll
    for (u32 m = 0; m < 2; ++m) {  // lanes 0 and 1 of a quad hold keys 0..15, lanes 2 and 3 keys 16..31 of both halves
        u32 other = __shfl_xor_sync(ALL_LANES, weight_scale[m], 2);
        weight_scale[m] = permute_bytes(weight_scale[m], other, 0x5140);
    }
    multiply_pv(rows, stage, weights, weight_scale, lane);
}

__device__ __forceinline__ void start_rows(const Parameters& p, const Item& item, Rows& rows, u32 block, u32 lane) {
    i64 index = ((i64(item.batch) * p.heads + item.head) * p.query_tiles + item.query_tile) * BLOCKS + block;
    const u8* image = p.queries + index * QUERY_BYTES;
#pragma unroll
    for (u32 m = 0; m < 2; ++m) {
#pragma unroll
        for (u32 step = 0; step < K_STEPS; ++step) load_words(rows.query[m][step], image + ((m * K_STEPS + step) * WARP + lane) * 16);
        rows.query_scale[m] = *reinterpret_cast<const u32*>(image + QUERY_CODE_BYTES + (m * WARP + lane) * 4);
        rows.shift[m] = LOG2_STRETCH - NO_MAXIMUM;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) rows.sum[m][i] = 0.0f;
#pragma unroll
        for (u32 n = 0; n < VALUE_COLUMNS; ++n)
#pragma unroll
            for (u32 i = 0; i < 4; ++i) rows.output[m][n][i] = 0.0f;
    }
    rows.factor = p.query_factors[index] * p.key_factors[item.kv_head] * p.scale_log2e;
}

__device__ __forceinline__ void store_rows(const Parameters& p, const Item& item, Rows& rows, u32 block, u32 lane) {
    const float* means = p.value_means + i64(item.kv_head) * HEAD_DIM;
    float value_factor = p.value_factors[item.kv_head];
    i64 head_index = i64(item.batch) * p.heads + item.head;
#pragma unroll
    for (u32 m = 0; m < 2; ++m) {
        float shifts[2];
        share_with_pair(rows.shift[m], lane, shifts[0], shifts[1]);
#pragma unroll
        for (u32 row_half = 0; row_half < 2; ++row_half) {
            u32 row = item.query_tile * QUERY_TILE + block * QUERY_BLOCK + 16 * m + 8 * row_half + (lane >> 2);
            if (int(row) >= p.query_length) continue;
            float sum = rows.sum[m][2 * row_half];
            bool seen = sum != 0.0f;  // rows that may see nothing give zeros
            float factor = seen ? divide_approx(value_factor, sum) : 0.0f;
            u16* out = static_cast<u16*>(p.output) + item.batch * p.output_strides[0] + item.head * p.output_strides[1] +
                       row * p.output_strides[2];
#pragma unroll
            for (u32 n = 0; n < VALUE_COLUMNS; ++n) {
                u32 column = 8 * n + 2 * (lane & 3);
                float low = fmaf(rows.output[m][n][2 * row_half], factor, seen ? means[column] : 0.0f);
                float high = fmaf(rows.output[m][n][2 * row_half + 1], factor, seen ? means[column + 1] : 0.0f);
                u32 pair = p.output_is_bf16 ? to_bf16x2(low, high) : to_f16x2(low, high);
                if (int(column) < p.head_dim) out[column] = u16(pair);
                if (int(column) + 1 < p.head_dim) out[column + 1] = u16(pair >> 16);
            }
            if (p.lse && (lane & 3) == 0) {
                float lse = (log2_approx(sum) - shifts[row_half]) * LN2;
                if (p.lse_shifts) lse += p.scale * p.lse_shifts[head_index * p.query_length + row];
                p.lse[head_index * p.query_length + row] = seen ? lse : -INFINITY;
            }
        }
    }
}

__device__ __forceinline__ void consume(const Parameters& p, const Shared& shared, u32 block, u32 lane) {
    Pipeline pipeline;
    Rows rows;
    auto take_tile = [&](auto&& attend) {
        barrier_wait(shared.full[pipeline.stage], pipeline.phase);
        barrier_wait(shared.corrected[pipeline.stage], pipeline.phase);
        attend(shared.stages + pipeline.stage * STAGE_BYTES);
        __syncwarp();
        if (lane == 0) barrier_arrive(shared.empty[pipeline.stage]);
        pipeline.advance();
    };
    for (u32 index = blockIdx.x; index < item_count(p); index += gridDim.x) {
        Item item = get_item(p, index);
        start_rows(p, item, rows, block, lane);
        Position at;
        at.first_row = item.query_tile * QUERY_TILE + block * QUERY_BLOCK;
        at.keys = item.keys;
        at.mask = p.mask;
        u32 open = item.keys / KEY_TILE, seen = item.tiles;
        if (p.causal) {  // tiles that every row of the warp sees, and tiles that any row sees
            open = min(open, (at.first_row + 1) / KEY_TILE);
            seen = min(seen, (at.first_row + QUERY_BLOCK - 1) / KEY_TILE + 1);
        }
        u32 tile = 0;
        if (MASK) {
            u32 width = p.mask_kind == MASK_BOOL ? 1 : p.mask_kind == MASK_F32 ? 4 : 2;
            at.mask += (item.batch * p.mask_strides[0] + item.head * p.mask_strides[1]) * width;
            open = 0;
        }
        for (; tile < open; ++tile) take_tile([&](const u8* stage) { attend_tile<false>(p, rows, stage, at, block, lane); });
        for (; tile < seen; ++tile) {
            if (is_skipped(item, tile)) continue;
            at.first_key = tile * KEY_TILE;
            take_tile([&](const u8* stage) { attend_tile<true>(p, rows, stage, at, block, lane); });
        }
        for (; tile < item.tiles; ++tile) take_tile([](const u8*) {});
        store_rows(p, item, rows, block, lane);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) nvfp4_attention(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(128) u8 memory[];
    __shared__ u64 barriers[3 * STAGES];
    Shared shared = {memory, barriers, barriers + STAGES, barriers + 2 * STAGES};
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < STAGES; ++i) {
            barrier_init(shared.full[i], 1);
            barrier_init(shared.corrected[i], CORRECTION_WARPS);
            barrier_init(shared.empty[i], BLOCKS);
        }
        barrier_init_fence();
    }
    __syncthreads();
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (warp < CORRECTION_WARPS) {
        lower_registers<CORRECTION_REGISTERS>();
        correct(p, shared, warp, lane);
    } else {
        raise_registers<CONSUMER_REGISTERS>();
        consume(p, shared, warp - CORRECTION_WARPS, lane);
    }
}
