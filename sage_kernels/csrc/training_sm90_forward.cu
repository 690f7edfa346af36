// The forward pass of trainable attention in INT8 for sm_90a: a thread block keeps 128 queries, two warpgroups 64 each,
// and walks over blocks of 128 keys that one producer thread copies into a ring.
//
// Each block's largest weight of a query becomes the largest code, so that its scale is known without another maximum.
// P V of one block and Q K^T of the next are on their way while the next weights are computed.
//
// Compile-time: as training_sm90.cuh, and STAGES of the ring.
#include "training_sm90.cuh"

struct TrainForwardParams {
  const u8* query;             // [B * H, query_tiles][64][HEAD_DIM]
  const u8* key;               // [B * Hkv, key_tiles][128][HEAD_DIM]
  const u8* value_transposed;  // [B * Hkv, key_tiles][HEAD_DIM][128]
  const float* query_scales;   // [B * H, query_tiles]
  const float* key_scales;     // [B * Hkv, key_tiles]
  const float* value_scales;   // [B * Hkv, key_tiles]
  u16* output;                 // [B, H, Nq, D], D contiguous
  float* lse;                  // [B * H, query_tiles * 64], of log2; infinite in rows of padding
  i64 output_strides[3];       // in elements: batch, head, row
  int heads, kv_heads, query_length, key_length, query_tiles, key_tiles, head_dim, is_causal;
  float softmax_scale;  // not negative: its sign is in the codes of Q
};

constexpr int kTileBytes = kKeyTile * HEAD_DIM;
constexpr int kStageBytes = 2 * kTileBytes;
constexpr int kQueryBytes = kQueryTile * HEAD_DIM;
constexpr float kLog2Limit = 6.988684686772166f;  // log2(127)
constexpr float kCodesInUnit = 16777216.f;
constexpr int kHidden = -(1 << 30);

// Shared memory: Q of each warpgroup, ring, barriers.
struct Shared {
  u32 base;
  static constexpr int kRing = kWarpgroups * kQueryBytes;
  static constexpr int kBarriers = kRing + STAGES * kStageBytes;
  DEVICE u32 query(int warpgroup) const { return base + warpgroup * kQueryBytes; }
  DEVICE u32 key(int stage) const { return base + kRing + stage * kStageBytes; }
  DEVICE u32 value(int stage) const { return key(stage) + kTileBytes; }
  DEVICE u32 full(int stage) const { return base + kBarriers + 8 * stage; }
  DEVICE u32 empty(int stage) const { return full(STAGES + stage); }
  DEVICE u32 queries_full() const { return full(2 * STAGES); }
};

// What a thread block computes: the longest first where causal, so that no long one is left for the end.
struct Walk {
  int head, kv_head, tile, warpgroups, blocks;
  DEVICE explicit Walk(const TrainForwardParams& p) {
    const int pairs = ceil_div(p.query_tiles, kWarpgroups);
    int pair = blockIdx.x % pairs;
    if (p.is_causal) pair = pairs - 1 - pair;
    head = blockIdx.x / pairs;
    kv_head = head / (p.heads / p.kv_heads);  // heads of all batches
    tile = pair * kWarpgroups;
    warpgroups = min(kWarpgroups, p.query_tiles - tile);
    const int seen = p.is_causal ? min(p.key_length, (tile + warpgroups) * kQueryTile) : p.key_length;
    blocks = ceil_div(seen, kKeyTile);
  }
};

DEVICE void produce(const TrainForwardParams& p, const Shared& shared, const Walk& walk) {
  const i64 tile = i64(walk.head) * p.query_tiles + walk.tile;
  mbarrier_arrive_expect_bytes(shared.queries_full(), walk.warpgroups * kQueryBytes);
  for (int i = 0; i < walk.warpgroups; ++i)
    bulk_load(shared.query(i), p.query + (tile + i) * kQueryBytes, kQueryBytes, shared.queries_full());
  Ring ring;
  i64 key_tile = i64(walk.kv_head) * p.key_tiles;
  for (int block = 0; block < walk.blocks; ++block, ++key_tile, ring.advance<STAGES>()) {
    const u32 full = shared.full(ring.stage);
    mbarrier_wait(shared.empty(ring.stage), ring.parity ^ 1);
    mbarrier_arrive_expect_bytes(full, kStageBytes);
    bulk_load(shared.key(ring.stage), p.key + key_tile * kTileBytes, kTileBytes, full);
    bulk_load(shared.value(ring.stage), p.value_transposed + key_tile * kTileBytes, kTileBytes, full);
  }
}

// One warpgroup's 64 queries.
struct Consumer {
  const TrainForwardParams& p;
  const Shared& shared;
  const Walk& walk;
  const int warpgroup, lane;
  Ring ring;
  u32 scores[64];  // then weights
  u32 product[HEAD_DIM / 2];
  u32 codes[16];
  float output[HEAD_DIM / 2];
  float maximum[2], row_sum[2], rescale[2], weight_scale[2];
  float query_factor;
  const float *key_scales, *value_scales;
  int first_row, unmasked;

  DEVICE Consumer(const TrainForwardParams& p, const Shared& shared, const Walk& walk, int warpgroup)
      : p(p), shared(shared), walk(walk), warpgroup(warpgroup), lane(threadIdx.x % 32) {}

  // Keys that a row does not see.
  DEVICE bool is_hidden(int i, int block) const {
    const int limit = p.is_causal ? min(p.key_length, first_row + i / 2 % 2 * 8 + 1) : p.key_length;
    return block * kKeyTile + i / 4 * 8 + lane % 4 * 2 + i % 2 >= limit;
  }

  // Scores to weights, as floats: codes up to 127 in units of 2^-24.
  DEVICE void weights(int block) {
    const float factor = query_factor * key_scales[block];
    const bool edge = block >= unmasked;
    if (edge) {
#pragma unroll
      for (int i = 0; i < 64; ++i)
        if (is_hidden(i, block)) scores[i] = kHidden;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int largest = scores[2 * r];
#pragma unroll
      for (int i = 2 * r; i < 64; i += 4) largest = max(max(largest, int(scores[i])), int(scores[i + 1]));
      const float local = static_cast<float>(row_maximum(largest)) * factor;
      const float highest = fmaxf(maximum[r], local);
      rescale[r] = exp2_approx(maximum[r] - highest);
      weight_scale[r] = exp2_approx(local - highest - kLog2Limit);
      maximum[r] = highest;
      const float shift = kLog2Limit - 24.f - local;
#pragma unroll
      for (int i = 2 * r; i < 64; i += 4) {
        scores[i] = __float_as_uint(exp2_approx(fmaf(static_cast<int>(scores[i]), factor, shift)));
        scores[i + 1] = __float_as_uint(exp2_approx(fmaf(static_cast<int>(scores[i + 1]), factor, shift)));
      }
    }
    if (edge) {
#pragma unroll
      for (int i = 0; i < 64; ++i)
        if (is_hidden(i, block)) scores[i] = 0;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sums[2] = {0.f, 0.f};
#pragma unroll
      for (int i = 2 * r; i < 64; i += 4) {
        sums[0] += __uint_as_float(scores[i]);
        sums[1] += __uint_as_float(scores[i + 1]);
      }
      row_sum[r] = row_sum[r] * rescale[r] + (sums[0] + sums[1]) * (weight_scale[r] * kCodesInUnit);
    }
  }

  // Bits of float16 denormals are integers.
  DEVICE void pack() {
#pragma unroll
    for (int i = 0; i < 64; i += 8) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const u32* x = scores + i + 2 * r;
        const u32 low = pack_float16(__uint_as_float(x[0]), __uint_as_float(x[1]));
        const u32 high = pack_float16(__uint_as_float(x[4]), __uint_as_float(x[5]));
        codes[i / 4 + r] = __byte_perm(low, high, 0x6420);
      }
    }
  }

  DEVICE void run() {
    const i64 tile = i64(walk.head) * p.query_tiles + walk.tile + warpgroup;
    const int first = (walk.tile + warpgroup) * kQueryTile;
    first_row = first + threadIdx.x / 32 % 4 * 16 + lane / 4;
    key_scales = p.key_scales + i64(walk.kv_head) * p.key_tiles;
    value_scales = p.value_scales + i64(walk.kv_head) * p.key_tiles;
    query_factor = p.query_scales[tile] * (p.softmax_scale * kLog2E);
    unmasked = (p.is_causal ? min(p.key_length, first + 1) : p.key_length) / kKeyTile;
#pragma unroll
    for (int r = 0; r < 2; ++r) maximum[r] = -infinity(), row_sum[r] = 0.f;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) output[i] = 0.f;
    mbarrier_wait(shared.queries_full(), 0);
    mbarrier_wait(shared.full(0), 0);
    issue_scores(scores, shared.query(warpgroup), shared.key(0));
    wgmma_wait<0>(scores);
    weights(0);
    pack();
    for (int block = 1; block <= walk.blocks; ++block) {
      const int stage = ring.stage;
      ring.advance<STAGES>();
      float scale[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) scale[r] = weight_scale[r] * value_scales[block - 1];
      float fade[2] = {rescale[0], rescale[1]};
      // In the last turn, the next scores are those of memory that nobody reads.
      if (block < walk.blocks) mbarrier_wait(shared.full(ring.stage), ring.parity);
      issue_scores(scores, shared.query(warpgroup), shared.key(ring.stage));
      issue_product<128>(product, codes, shared.value(stage));
      wgmma_wait<1>(scores);
      if (block < walk.blocks) weights(block);
      wgmma_wait<0>(product);
      hold(codes);
      if (__any_sync(~0u, fade[0] != 1.f || fade[1] != 1.f)) {
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; ++i) output[i] *= fade[i / 2 % 2];
      }
      add_product<0>(output, product, scale);
      if (lane == 0) mbarrier_arrive(shared.empty(stage));
      pack();
    }
    store(first);
  }

  DEVICE void store(int first) {
    const i64 lse_row = i64(walk.head) * p.query_tiles * kQueryTile + first_row;
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_sum[r] += __shfl_xor_sync(~0u, row_sum[r], 1);
      row_sum[r] += __shfl_xor_sync(~0u, row_sum[r], 2);
      inverse[r] = 1.f / row_sum[r];
      if (lane % 4 == 0)
        p.lse[lse_row + 8 * r] = first_row + 8 * r < p.query_length ? maximum[r] + log2_approx(row_sum[r]) : infinity();
    }
    const int batch = walk.head / p.heads, head = walk.head % p.heads;
    u16* rows = p.output + batch * p.output_strides[0] + head * p.output_strides[1];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + 8 * r;
      if (row >= p.query_length) continue;
      u16* line = rows + row * p.output_strides[2];
#pragma unroll
      for (int i = 2 * r; i < HEAD_DIM / 2; i += 4) {
        const int column = i / 4 * 8 + lane % 4 * 2;
        const float low = output[i] * inverse[r], high = output[i + 1] * inverse[r];
        if (column < p.head_dim)
          *reinterpret_cast<u32*>(line + column) = BFLOAT16 ? pack_bfloat16(low, high) : pack_float16(low, high);
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    training_sm90_forward(const __grid_constant__ TrainForwardParams p) {
  extern __shared__ __align__(1024) u8 memory[];
  const Shared shared{shared_address(memory)};
  const Walk walk(p);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      mbarrier_init(shared.full(stage), 1);
      mbarrier_init(shared.empty(stage), 4 * walk.warpgroups);  // one arrival a warp
    }
    mbarrier_init(shared.queries_full(), 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    shrink_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce(p, shared, walk);
  } else {
    grow_registers<kConsumerRegisters>();
    const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128 - 1, 0);
    if (warpgroup < walk.warpgroups) Consumer(p, shared, walk, warpgroup).run();
  }
}
