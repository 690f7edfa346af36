// dQ of trainable attention in INT8 for sm_90a: a thread block keeps 128 queries, two warpgroups 64 each, and walks
// over blocks of 128 keys that one producer thread copies into rings.
//
// S = Q K^T in INT8 and dP = dO V^T in 16 bits give dS in registers. Quantised with a scale for each query, it is the
// left operand of dQ += dS K, whose right operand is a transposed INT8 tile.
//
// Compile-time: as training_sm90.cuh, and STAGES of the ring of V; those of K and of its transpose have one more.
#include "training_sm90.cuh"

constexpr int kTileBytes = kKeyTile * HEAD_DIM;  // of K and of its transpose; V has twice as many
constexpr int kQueryBytes = kQueryTile * HEAD_DIM;
constexpr int kKeyStages = STAGES + 1;

// Shared memory: Q and dO of each warpgroup; rings of K, of its transpose and of V; barriers.
struct Shared {
  u32 base;
  static constexpr int kKeys = kWarpgroups * 3 * kQueryBytes;
  static constexpr int kValues = kKeys + kKeyStages * 2 * kTileBytes;
  static constexpr int kBarriers = kValues + STAGES * 2 * kTileBytes;
  DEVICE u32 query(int warpgroup) const { return base + warpgroup * 3 * kQueryBytes; }
  DEVICE u32 d_output(int warpgroup) const { return query(warpgroup) + kQueryBytes; }
  DEVICE u32 key(int stage) const { return base + kKeys + stage * kTileBytes; }
  DEVICE u32 key_transposed(int stage) const { return key(kKeyStages + stage); }
  DEVICE u32 value(int stage) const { return base + kValues + stage * 2 * kTileBytes; }
  DEVICE u32 key_full(int stage) const { return base + kBarriers + 8 * stage; }
  DEVICE u32 key_empty(int stage) const { return key_full(kKeyStages + stage); }
  DEVICE u32 transposed_full(int stage) const { return key_full(2 * kKeyStages + stage); }
  DEVICE u32 transposed_empty(int stage) const { return key_full(3 * kKeyStages + stage); }
  DEVICE u32 value_full(int stage) const { return key_full(4 * kKeyStages + stage); }
  DEVICE u32 value_empty(int stage) const { return value_full(STAGES + stage); }
  DEVICE u32 queries_full() const { return value_full(2 * STAGES); }
};

// What a thread block computes: the longest first where causal, so that no long one is left for the end.
struct Walk {
  int head, kv_head, tile, warpgroups, blocks;
  DEVICE explicit Walk(const TrainParams& p) {
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

DEVICE void produce(const TrainParams& p, const Shared& shared, const Walk& walk) {
  const i64 tile = i64(walk.head) * p.query_tiles + walk.tile;
  mbarrier_arrive_expect_bytes(shared.queries_full(), walk.warpgroups * 3 * kQueryBytes);
  for (int i = 0; i < walk.warpgroups; ++i) {
    bulk_load(shared.query(i), p.query + (tile + i) * kQueryBytes, kQueryBytes, shared.queries_full());
    bulk_load(shared.d_output(i), p.d_output + (tile + i) * kQueryBytes, 2 * kQueryBytes, shared.queries_full());
  }
  const auto load = [](u32 destination, const void* source, int bytes, u32 full, u32 empty, u32 parity) {
    mbarrier_wait(empty, parity ^ 1);
    mbarrier_arrive_expect_bytes(full, bytes);
    bulk_load(destination, source, bytes, full);
  };
  Ring keys, values;
  i64 tile_place = i64(walk.kv_head) * p.key_tiles * kTileBytes;
  for (int block = 0; block < walk.blocks; ++block, tile_place += kTileBytes) {
    const int k = keys.stage, v = values.stage;
    load(shared.key(k), p.key + tile_place, kTileBytes, shared.key_full(k), shared.key_empty(k), keys.parity);
    load(shared.value(v), p.value + tile_place, 2 * kTileBytes, shared.value_full(v), shared.value_empty(v),
         values.parity);
    load(shared.key_transposed(k), p.key_transposed + tile_place, kTileBytes, shared.transposed_full(k),
         shared.transposed_empty(k), keys.parity);
    keys.advance<kKeyStages>();
    values.advance<STAGES>();
  }
}

// One warpgroup's 64 queries.
struct Consumer {
  const TrainParams& p;
  const Shared& shared;
  const Walk& walk;
  const int warpgroup, lane;
  Ring keys, transposed, values;  // what comes next
  u32 scores[64];                 // then P
  u32 gradients[64];              // dP, then dS
  u32 codes[16];
  float d_query[HEAD_DIM / 2];
  float lse[2], delta[2], scale[2];
  float query_factor;
  const float* key_scales;
  int first_row, unmasked;
#if HEAD_DIM == 128
  DEVICE u32 (&product())[64] { return gradients; }
#else
  u32 narrow[32];
  DEVICE u32 (&product())[32] { return narrow; }
#endif

  DEVICE Consumer(const TrainParams& p, const Shared& shared, const Walk& walk, int warpgroup)
      : p(p), shared(shared), walk(walk), warpgroup(warpgroup), lane(threadIdx.x % 32) {}

  // Keys from the first hidden one on, of the thread's two rows; `limit` counts from the block's first key.
  DEVICE void hide(const int (&limit)[2]) {
#pragma unroll
    for (int i = 0; i < 64; ++i)
      if (i / 4 * 8 + lane % 4 * 2 + i % 2 >= limit[i / 2 % 2]) scores[i] = 0;
  }

  DEVICE void release(u32 barrier) {
    if (lane == 0) mbarrier_arrive(barrier);
  }

  // From the scores that are on their way to P, while dP is.
  DEVICE void finish_weights(int block) {
    const float factor = query_factor * key_scales[block];
    wgmma_wait<1>(scores);
    release(shared.key_empty(keys.stage));
    keys.advance<kKeyStages>();
#pragma unroll
    for (int i = 0; i < 64; ++i)
      scores[i] = __float_as_uint(exp2_approx(fmaf(static_cast<int>(scores[i]), factor, -lse[i / 2 % 2])));
    if (block >= unmasked) {
      int limit[2];
#pragma unroll
      for (int r = 0; r < 2; ++r)
        limit[r] = (p.is_causal ? min(p.key_length, first_row + 8 * r + 1) : p.key_length) - block * kKeyTile;
      hide(limit);
    }
    wgmma_wait<0>(gradients);
    release(shared.value_empty(values.stage));
    values.advance<STAGES>();
  }

  // From P and dP to the codes of dS.
  DEVICE void finish_gradients() {
#pragma unroll
    for (int i = 0; i < 64; ++i)
      gradients[i] = __float_as_uint((__uint_as_float(gradients[i]) - delta[i / 2 % 2]) * __uint_as_float(scores[i]));
    float inverse[2];
    scale_signed(gradients, scale, inverse);
    make_codes(codes, gradients, inverse);
  }

  DEVICE void issue_next_scores() { issue_scores(scores, shared.query(warpgroup), shared.key(keys.stage)); }

  DEVICE void issue_next_weight_gradients() {
    issue_weight_gradients(gradients, shared.d_output(warpgroup), 64 * 128, shared.value(values.stage), 128 * 128);
  }

  DEVICE void run() {
    const i64 tile = i64(walk.head) * p.query_tiles + walk.tile + warpgroup;
    const int first = (walk.tile + warpgroup) * kQueryTile;
    const int thread_row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    const float* rows = p.rows + tile * kRowFloats;
    key_scales = p.key_scales + i64(walk.kv_head) * p.key_tiles;
    query_factor = rows[128] * (p.softmax_scale * kLog2E);
    first_row = first + thread_row;
    unmasked = (p.is_causal ? min(p.key_length, first + 1) : p.key_length) / kKeyTile;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      lse[r] = rows[thread_row + 8 * r];
      delta[r] = rows[64 + thread_row + 8 * r];
    }
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) d_query[i] = 0.f;
    mbarrier_wait(shared.queries_full(), 0);
    // No wgmma is on its way where turns meet: the assembler would wait for each one then. In the last turn, the next
    // scores are those of memory that nobody reads.
    mbarrier_wait(shared.key_full(0), 0);
    issue_next_scores();
    mbarrier_wait(shared.value_full(0), 0);
    issue_next_weight_gradients();
    finish_weights(0);
    const Turns turns(warpgroup, !PINGPONG || walk.warpgroups < 2);
    for (int block = 1; block <= walk.blocks; ++block) {
      const bool more = block < walk.blocks;
      finish_gradients();
      mbarrier_wait(shared.transposed_full(transposed.stage), transposed.parity);
      if (more) mbarrier_wait(shared.key_full(keys.stage), keys.parity);
      if (PINGPONG) turns.begin();
      issue_product<128>(product(), codes, shared.key_transposed(transposed.stage));
      issue_next_scores();
      if (PINGPONG == 2) turns.end();
      if (more) mbarrier_wait(shared.value_full(values.stage), values.parity);
      wgmma_wait<1>(product());
      hold(codes);
      release(shared.transposed_empty(transposed.stage));
      transposed.advance<kKeyStages>();
      add_product<0>(d_query, product(), scale);
      issue_next_weight_gradients();
      if (PINGPONG == 1) turns.end();
      finish_weights(min(block, walk.blocks - 1));
    }
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r)  // NaN where Q, dO or V were not finite: maxima pass over it
      factor[r] = p.softmax_scale * p.query_sign + (query_factor + delta[r]) * 0.f;
    const float* channels = p.channel_scales + walk.kv_head * HEAD_DIM + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) d_query[i] *= channels[i / 4 * 8 + i % 2];
    store_rows(p.d_query + i64(walk.head) * p.query_length * p.head_dim, d_query, factor, first, p.query_length,
               p.head_dim);
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1) training_sm90_query(const __grid_constant__ TrainParams p) {
  extern __shared__ __align__(1024) u8 memory[];
  const Shared shared{shared_address(memory)};
  const Walk walk(p);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kKeyStages; ++stage) {
      mbarrier_init(shared.key_full(stage), 1);
      mbarrier_init(shared.key_empty(stage), 4 * walk.warpgroups);  // one arrival a warp
      mbarrier_init(shared.transposed_full(stage), 1);
      mbarrier_init(shared.transposed_empty(stage), 4 * walk.warpgroups);
    }
    for (int stage = 0; stage < STAGES; ++stage) {
      mbarrier_init(shared.value_full(stage), 1);
      mbarrier_init(shared.value_empty(stage), 4 * walk.warpgroups);
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
