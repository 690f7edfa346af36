// What the backward kernels for sm_90a read of each query besides its channels (training_sm90_rows.cuh), with
// delta = rowsum(dO * O) (SageAttention3, algorithm 3). Bound by memory bandwidth.
#include "training_sm90_rows.cuh"
#include "training_sm90_tiles.cuh"

struct TrainRowsParams {
  const u16* d_output;  // [B, H, Nq, D]; D contiguous, rows aligned to 16 bytes; strides in elements: batch, head, row
  const u16* output;
  const float* query_scales;  // [B * H, query_tiles]
  const float* lse;           // [B * H, query_tiles][64]
  const float* key_scales;    // [B * Hkv, key_tiles]: of the codes of K and of V
  const float* value_scales;
  float* rows;  // [B * H, query_tiles][kRowFloats]
  i64 d_output_strides[3];
  i64 output_strides[3];
  int heads, kv_heads, query_length, query_tiles, key_tiles, head_dim;
};

constexpr float kRange = 1073741824.f;  // 2^30 integer steps are the most that dQ can be

struct Shared {
  u32 base;
  DEVICE u32 deltas(int set) const { return base + set * kTokens * 4; }
  DEVICE u32 norms(int set) const { return deltas(kSets + set); }
  DEVICE u32 scratch(int i) const { return deltas(2 * kSets) + 4 * kWarps * i; }
};

// What a query adds to dQ, dS K summed over keys, is at most |dO|_1 max|V| * 2 max|K|: P sums to one, and neither dP
// nor delta is more than the first factors. With a tenth for rounding, without |dO|_1. NaN where K or V is not finite.
DEVICE float find_largest_term(const TrainRowsParams& p, const Shared& shared, i64 head) {
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

// Delta and |dO|_1 of 128 queries, by sets of channels.
DEVICE void sum_channels(const TrainRowsParams& p, const Shared& shared, const Place& at, i64 head, int pair) {
  const i64 batch = head / p.heads, query_head = head % p.heads;
  uint4 gradients[kRounds][4], outputs[kRounds][4];
  load_tokens(gradients, p.d_output + batch * p.d_output_strides[0] + query_head * p.d_output_strides[1],
              p.d_output_strides[2], pair * kTokens, p.query_length, p.head_dim, at);
  load_tokens(outputs, p.output + batch * p.output_strides[0] + query_head * p.output_strides[1], p.output_strides[2],
              pair * kTokens, p.query_length, p.head_dim, at);
#pragma unroll
  for (int round = 0; round < kRounds; ++round)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Channels gradient = unpack(gradients[round][i]), output = unpack(outputs[round][i]);
      float delta = 0.f, norm = 0.f;
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        delta = fmaf(gradient.x[c], output.x[c], delta);
        norm += fabsf(gradient.x[c]);
      }
#pragma unroll
      for (int lane = 1; lane < 4; lane *= 2) {
        delta += __shfl_xor_sync(~0u, delta, lane);
        norm += __shfl_xor_sync(~0u, norm, lane);
      }
      if (threadIdx.x % 4 == 0) {
        store_shared_word(shared.deltas(at.group / 4) + 4 * at.token(round, i), __float_as_uint(delta));
        store_shared_word(shared.norms(at.group / 4) + 4 * at.token(round, i), __float_as_uint(norm));
      }
    }
}

// Grid: B * H * ceil(query_tiles / 2).
extern "C" __global__ void __launch_bounds__(kThreads, HEAD_DIM == 64 ? 3 : 2)
    training_sm90_rows(const __grid_constant__ TrainRowsParams p) {
  extern __shared__ __align__(1024) u8 memory[];
  const Shared shared{shared_address(memory)};
  const Place at;
  const int pairs = ceil_div(p.query_tiles, kHalves), pair = blockIdx.x % pairs;
  const i64 head = blockIdx.x / pairs;
  sum_channels(p, shared, at, head, pair);
  const float largest_term = find_largest_term(p, shared, head);  // its barriers are for the sums, too
  const int tile = pair * kHalves + threadIdx.x / kQueryTile, row = threadIdx.x % kQueryTile;
  if (threadIdx.x >= kTokens || tile >= p.query_tiles) return;
  float delta = 0.f, norm = 0.f;
#pragma unroll
  for (int set = 0; set < kSets; ++set) {
    delta += __uint_as_float(load_shared_word(shared.deltas(set) + 4 * threadIdx.x));
    norm += __uint_as_float(load_shared_word(shared.norms(set) + 4 * threadIdx.x));
  }
  const i64 index = head * p.query_tiles + tile;
  float* rows = p.rows + index * kRowFloats;
  rows[lse_place(row)] = p.lse[index * kQueryTile + row];
  rows[delta_place(row)] = rows[delta_place(row) + 2] = -delta;
  const float bound = norm * largest_term;
  const bool is_finite = magnitude(bound) < 0x7f800000, is_usable = is_finite && bound > kSmallest;
  rows[kQuanta + row] = is_usable ? kRange / bound : 0.f;
  rows[kSteps + row] = is_usable ? bound / kRange : is_finite ? 0.f : __uint_as_float(0x7fc00000);
  if (row == 0) rows[kQueryScale] = p.query_scales[index];
}
