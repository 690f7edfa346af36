// What the backward kernels for sm_90a read besides what the forward pass saved: delta = rowsum(dO * O)
// (SageAttention3, algorithm 3) and, but where products take 16 bits, Q and dO in INT8, transposed. Bound by memory
// bandwidth.
#include "training_sm90_rows.cuh"
#include "training_sm90_tiles.cuh"

struct TrainImagesParams {
  const u16* d_output;  // [B, H, Nq, D]; D contiguous, rows aligned to 16 bytes; strides in elements: batch, head, row
  const u16* output;
  const u8* query;            // [B * H, query_tiles][64][HEAD_DIM]: codes
  const float* query_scales;  // [B * H, query_tiles]
  const float* lse;           // [B * H, query_tiles][64]
  u8* query_transposed;       // [B * H, query_tiles][HEAD_DIM][64]
  u8* d_output_transposed;    // [B * H, query_tiles][HEAD_DIM][64]: codes
  float* rows;                // [B * H, query_tiles][kRowFloats]
  const float* key_scales;    // [B * Hkv, key_tiles]: of the codes of K and of V
  const float* value_scales;
  i64 d_output_strides[3];
  i64 output_strides[3];
  int heads, kv_heads, query_length, query_tiles, key_tiles, head_dim;
};

constexpr float kRange = 1073741824.f;  // 2^30 integer steps are the most that dQ can be

struct Shared {
  u32 base;
  DEVICE Transposed<kQueryTile> transposed(int half) const { return {base + half * Transposed<kQueryTile>::kBytes}; }
  DEVICE u32 deltas(int set) const { return base + kHalves * Transposed<kQueryTile>::kBytes + set * kTokens * 4; }
  DEVICE u32 norms(int set) const { return base + set * kTokens * 4; }  // in place of transposed tiles
  DEVICE u32 scratch(int i) const { return deltas(kSets) + 4 * kWarps * i; }
};

// Of both tiles, as far as there are two.
DEVICE void store_transposed(const Shared& shared, u8* image, int tiles) {
  __syncthreads();
  for (int half = 0; half < min(tiles, kHalves); ++half)
    shared.transposed(half).store(image + half * kQueryTile * HEAD_DIM);
}

// The codes of Q, which the forward pass saved.
DEVICE void transpose_queries(const u8* image, const Shared& shared, const Place& at, int tiles) {
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int half = at.half(round);
    if (half >= tiles) continue;
    uint2 raw[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = at.token(round, i) % kQueryTile;
      raw[i] = *reinterpret_cast<const uint2*>(image + (half * kQueryTile + token) * HEAD_DIM +
                                               ((at.group / 2 ^ swizzle(token, HEAD_DIM)) << 4) + at.group % 2 * 8);
    }
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const u32 words[4] = {c < 4 ? raw[0].x : raw[0].y, c < 4 ? raw[1].x : raw[1].y, c < 4 ? raw[2].x : raw[2].y,
                            c < 4 ? raw[3].x : raw[3].y};
      const u32 selector = c % 4 | (4 + c % 4) << 4;
      shared.transposed(half).put(
          8 * at.group + c, (at.chunk + kChunkStep * round) % 4, at.quad,
          __byte_perm(__byte_perm(words[0], words[1], selector), __byte_perm(words[2], words[3], selector), 0x5410));
    }
  }
}

// The codes of dO.
DEVICE void transpose_gradients(const uint4 (&raw)[kRounds][4], uint2 maxima, const Shared& shared, const Place& at) {
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const Scale scale = make_scale(at.half(round) == 0 ? maxima.x : maxima.y);
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      u32 codes[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) codes[i] = find_code(unpack(raw[round][i]).x[c], scale);
      shared.transposed(at.half(round))
          .put(8 * at.group + c, (at.chunk + kChunkStep * round) % 4, at.quad,
               low_bytes(codes[0], codes[1], codes[2], codes[3]));
    }
  }
}

// What a query adds to dQ, dS K summed over keys, is at most |dO|_1 max|V| * 2 max|K|: P sums to one, and neither dP
// nor delta is more than the first factor. With a tenth for rounding, without |dO|_1. NaN where K or V is not finite.
DEVICE float find_largest_term(const TrainImagesParams& p, const Shared& shared, i64 head) {
  const i64 first = head / (p.heads / p.kv_heads) * p.key_tiles;  // heads of all batches
  u32 key = 0, value = 0;
  for (int tile = threadIdx.x; tile < p.key_tiles; tile += kThreads) {
    key = max(key, magnitude(p.key_scales[first + tile]));
    value = max(value, magnitude(p.value_scales[first + tile]));
  }
  key = block_maximum(key, shared.scratch(0));
  value = block_maximum(value, shared.scratch(1));
  return 2.2f * kLimit * kLimit * __uint_as_float(key) * __uint_as_float(value);
}

DEVICE void prepare_queries(const TrainImagesParams& p, const Shared& shared, const Place& at, i64 head, int pair) {
  const int tiles = p.query_tiles - pair * kHalves;
  const i64 first_tile = head * p.query_tiles + pair * kHalves;
  const i64 batch = head / p.heads, query_head = head % p.heads;
  uint4 raw[kRounds][4];
  load_tokens(raw, p.d_output + batch * p.d_output_strides[0] + query_head * p.d_output_strides[1],
              p.d_output_strides[2], pair * kTokens, p.query_length, p.head_dim, at);
  u32 largest[kRounds] = {};
  {
    uint4 output[kRounds][4];
    load_tokens(output, p.output + batch * p.output_strides[0] + query_head * p.output_strides[1], p.output_strides[2],
                pair * kTokens, p.query_length, p.head_dim, at);
#pragma unroll
    for (int round = 0; round < kRounds; ++round)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Channels gradient = unpack(raw[round][i]), x = unpack(output[round][i]);
        float delta = 0.f, norm = 0.f;
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          delta = fmaf(gradient.x[c], x.x[c], delta);
          norm += fabsf(gradient.x[c]);
          largest[round] = max(largest[round], magnitude(gradient.x[c]));
        }
        delta += __shfl_xor_sync(~0u, delta, 1);
        delta += __shfl_xor_sync(~0u, delta, 2);
        if (threadIdx.x % 4 == 0)
          store_shared_word(shared.deltas(at.group / 4) + 4 * at.token(round, i), __float_as_uint(delta));
        if (kProductsIn16Bit) {
          norm += __shfl_xor_sync(~0u, norm, 1);
          norm += __shfl_xor_sync(~0u, norm, 2);
          if (threadIdx.x % 4 == 0)
            store_shared_word(shared.norms(at.group / 4) + 4 * at.token(round, i), __float_as_uint(norm));
        }
      }
  }
  uint2 maxima = make_uint2(0, 0);
  float largest_term = 0.f;
  if (kProductsIn16Bit) {
    largest_term = find_largest_term(p, shared, head);
  } else {
    maxima = half_maxima(largest, at, shared.scratch(0), shared.scratch(1));
    transpose_gradients(raw, maxima, shared, at);
    store_transposed(shared, p.d_output_transposed + first_tile * kQueryTile * HEAD_DIM, tiles);
  }
  // A warp for 32 rows each. A NaN of V reaches dK only through delta, and the maxima of the backward kernels pass over
  // it: the scale of dO carries it there.
  if (threadIdx.x < kTokens) {
    const int half = threadIdx.x / kQueryTile, row = threadIdx.x % kQueryTile;
    float delta = 0.f;
#pragma unroll
    for (int set = 0; set < kSets; ++set)
      delta += __uint_as_float(load_shared_word(shared.deltas(set) + 4 * threadIdx.x));
    const bool is_bad = __any_sync(~0u, magnitude(delta) >= 0x7f800000);
    if (threadIdx.x % 32 == 0) store_shared_word(shared.scratch(kHalves) + threadIdx.x / 32 * 4, is_bad);
    if (half < tiles) {
      float* rows = p.rows + (first_tile + half) * kRowFloats;
      rows[lse_place(row)] = p.lse[(first_tile + half) * kQueryTile + row];
      rows[delta_place(row)] = -delta;
#if HEAD_DIM == 64
      rows[delta_place(row) + 2] = -delta;
      float norm = 0.f;
#pragma unroll
      for (int set = 0; set < kSets; ++set)
        norm += __uint_as_float(load_shared_word(shared.norms(set) + 4 * threadIdx.x));
      const float bound = norm * largest_term;
      const bool is_finite = magnitude(bound) < 0x7f800000, is_usable = is_finite && bound > kSmallest;
      rows[kQuanta + row] = is_usable ? kRange / bound : 0.f;
      rows[kSteps + row] = is_usable ? bound / kRange : is_finite ? 0.f : __uint_as_float(0x7fc00000);
#endif
    }
  }
  __syncthreads();  // transposed tiles were read, too
  if (threadIdx.x < min(tiles, kHalves)) {
    float* rows = p.rows + (first_tile + threadIdx.x) * kRowFloats;
    rows[kQueryScale] = p.query_scales[first_tile + threadIdx.x];
#if HEAD_DIM != 64
    const u32 bad = load_shared_word(shared.scratch(kHalves) + threadIdx.x * 8) |
                    load_shared_word(shared.scratch(kHalves) + threadIdx.x * 8 + 4);
    const float scale = make_scale(threadIdx.x == 0 ? maxima.x : maxima.y).scale;
    rows[kGradientScale] = bad ? __uint_as_float(0x7fc00000) : scale;
#endif
  }
  if (kProductsIn16Bit) return;
  transpose_queries(p.query + first_tile * kQueryTile * HEAD_DIM, shared, at, tiles);
  store_transposed(shared, p.query_transposed + first_tile * kQueryTile * HEAD_DIM, tiles);
}

// Grid: B * H * ceil(query_tiles / 2).
extern "C" __global__ void __launch_bounds__(kThreads, HEAD_DIM == 64 ? 3 : 2)
    training_sm90_images(const __grid_constant__ TrainImagesParams p) {
  extern __shared__ __align__(1024) u8 memory[];
  const Shared shared{shared_address(memory)};
  const Place at;
  const int query_pairs = ceil_div(p.query_tiles, kHalves);
  prepare_queries(p, shared, at, blockIdx.x / query_pairs, blockIdx.x % query_pairs);
}
