// Q, K and V to the INT8 tiles of training_sm90_forward.cu (SageAttention3, section 4), and K without its mean in 16
// bits for dQ. Bound by memory bandwidth: each is read once.
#include "training_sm90_tiles.cuh"

struct TrainQuantizeParams {
  const u16* query;  // [B, H, Nq, D]; D contiguous, rows aligned to 16 bytes; strides in elements: batch, head, row
  const u16* key;    // [B, Hkv, Nk, D]
  const u16* value;
  const float* sums;    // [B * Hkv, pieces, HEAD_DIM]: of each channel of K
  u8* query_codes;      // [B * H, query_tiles][64][HEAD_DIM]
  float* query_scales;  // [B * H, query_tiles]
  u8* key_codes;        // [B * Hkv, key_tiles][128][HEAD_DIM], of K without its mean
  float* key_scales;    // [B * Hkv, key_tiles]
  u16* key_16bit;       // [B * Hkv, key_tiles * 128, HEAD_DIM], likewise
  u8* value_codes;      // [B * Hkv, key_tiles][HEAD_DIM][128]
  float* value_scales;  // [B * Hkv, key_tiles]
  i64 query_strides[3];
  i64 key_strides[3];
  i64 value_strides[3];
  int batch, heads, kv_heads, query_length, key_length, query_tiles, key_tiles, head_dim, pieces;
  float query_sign;  // of the softmax scale
};

struct Shared {
  u32 base;
  DEVICE Transposed<kTokens> transposed() const { return {base}; }
  DEVICE u32 means() const { return base + Transposed<kTokens>::kBytes; }  // of K's channels
  DEVICE u32 scratch(int i = 0) const { return means() + 4 * HEAD_DIM + 4 * kWarps * i; }
};

DEVICE void quantize_queries(const TrainQuantizeParams& p, const Shared& shared, const Place& at, i64 head, int pair) {
  const u16* source = p.query + head / p.heads * p.query_strides[0] + head % p.heads * p.query_strides[1];
  uint4 raw[kRounds][4];
  load_tokens(raw, source, p.query_strides[2], pair * kTokens, p.query_length, p.head_dim, at);
  u32 largest[kRounds] = {};
#pragma unroll
  for (int round = 0; round < kRounds; ++round)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Channels x = unpack(raw[round][i]);
#pragma unroll
      for (int c = 0; c < 8; ++c) largest[round] = max(largest[round], magnitude(x.x[c]));
    }
  const uint2 maxima = half_maxima(largest, at, shared.scratch(0), shared.scratch(1));
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int half = at.half(round), tile = pair * kHalves + half;
    if (tile >= p.query_tiles) continue;
    const Scale scale = make_scale(half == 0 ? maxima.x : maxima.y);
    u8* image = p.query_codes + (head * p.query_tiles + tile) * kQueryTile * HEAD_DIM;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Channels x = unpack(raw[round][i]);
      u32 codes[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) codes[c] = find_code(x.x[c] * p.query_sign, scale);
      store_codes(image, at.token(round, i) % kQueryTile, at.group, codes);
    }
    // One thread of each half has its first token.
    if (at.group == 0 && at.token(round, 0) % kQueryTile == 0)
      p.query_scales[head * p.query_tiles + tile] = scale.scale;
  }
}

DEVICE void quantize_keys(const TrainQuantizeParams& p, const Shared& shared, const Place& at, i64 head, int tile) {
  const u16* source = p.key + head / p.kv_heads * p.key_strides[0] + head % p.kv_heads * p.key_strides[1];
  uint4 raw[kRounds][4];
  load_tokens(raw, source, p.key_strides[2], tile * kTokens, p.key_length, p.head_dim, at);
  if (threadIdx.x < HEAD_DIM) {
    float sum = 0.f;
    for (int piece = 0; piece < p.pieces; ++piece) sum += p.sums[(head * p.pieces + piece) * HEAD_DIM + threadIdx.x];
    store_shared_word(shared.means() + 4 * threadIdx.x, __float_as_uint(sum / float(p.key_length)));
  }
  __syncthreads();
  float mean[8];
#pragma unroll
  for (int c = 0; c < 8; ++c) mean[c] = __uint_as_float(load_shared_word(shared.means() + 4 * (8 * at.group + c)));
  auto has_key = [&](int round, int i) { return tile * kTokens + at.token(round, i) < p.key_length; };
  u32 largest = 0;
#pragma unroll
  for (int round = 0; round < kRounds; ++round)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Channels x = unpack(raw[round][i]);
#pragma unroll
      for (int c = 0; c < 8; ++c)
        if (has_key(round, i)) largest = max(largest, magnitude(x.x[c] - mean[c]));
    }
  const Scale scale = make_scale(block_maximum(largest, shared.scratch()));
  const i64 index = head * p.key_tiles + tile;
  u8* image = p.key_codes + index * kTokens * HEAD_DIM;
#pragma unroll
  for (int round = 0; round < kRounds; ++round)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Channels x = unpack(raw[round][i]);
      u32 codes[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) codes[c] = find_code(has_key(round, i) ? x.x[c] - mean[c] : 0.f, scale);
      store_codes(image, at.token(round, i), at.group, codes);
    }
#pragma unroll
  for (int round = 0; round < kRounds; ++round)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Channels x = unpack(raw[round][i]);
#pragma unroll
      for (int c = 0; c < 8; ++c) x.x[c] = has_key(round, i) ? x.x[c] - mean[c] : 0.f;
      store_16bit(p.key_16bit + index * kTokens * HEAD_DIM, at.token(round, i), at.group, x);
    }
  if (threadIdx.x == 0) p.key_scales[index] = scale.scale;
}

DEVICE void quantize_values(const TrainQuantizeParams& p, const Shared& shared, const Place& at, i64 head, int tile) {
  const u16* source = p.value + head / p.kv_heads * p.value_strides[0] + head % p.kv_heads * p.value_strides[1];
  uint4 raw[kRounds][4];
  load_tokens(raw, source, p.value_strides[2], tile * kTokens, p.key_length, p.head_dim, at);
  u32 largest = 0;
#pragma unroll
  for (int round = 0; round < kRounds; ++round)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Channels x = unpack(raw[round][i]);
#pragma unroll
      for (int c = 0; c < 8; ++c) largest = max(largest, magnitude(x.x[c]));
    }
  const Scale scale = make_scale(block_maximum(largest, shared.scratch()));
  const i64 index = head * p.key_tiles + tile;
#pragma unroll
  for (int c = 0; c < 8; ++c)
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      u32 codes[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) codes[i] = find_code(unpack(raw[round][i]).x[c], scale);
      shared.transposed().put(8 * at.group + c, at.chunk + kChunkStep * round, at.quad,
                              low_bytes(codes[0], codes[1], codes[2], codes[3]));
    }
  if (threadIdx.x == 0) p.value_scales[index] = scale.scale;
  __syncthreads();
  shared.transposed().store(p.value_codes + index * kTokens * HEAD_DIM);
}

// Grid: B * Hkv * key_tiles for K, as many for V, then B * H * ceil(query_tiles / 2).
extern "C" __global__ void __launch_bounds__(kThreads, HEAD_DIM == 64 ? 3 : 2)
    training_sm90_quantize(const __grid_constant__ TrainQuantizeParams p) {
  extern __shared__ __align__(1024) u8 memory[];
  const Shared shared{shared_address(memory)};
  const Place at;
  const int key_blocks = p.batch * p.kv_heads * p.key_tiles, query_pairs = ceil_div(p.query_tiles, kHalves);
  if (blockIdx.x < key_blocks) {
    quantize_keys(p, shared, at, blockIdx.x / p.key_tiles, blockIdx.x % p.key_tiles);
  } else if (blockIdx.x < 2 * key_blocks) {
    const int index = blockIdx.x - key_blocks;
    quantize_values(p, shared, at, index / p.key_tiles, index % p.key_tiles);
  } else {
    const int index = blockIdx.x - 2 * key_blocks;
    quantize_queries(p, shared, at, index / query_pairs, index % query_pairs);
  }
}
