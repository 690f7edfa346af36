// dQ of trainable attention in INT8 for sm_90a at head_dim 128: a thread block keeps 128 queries, two warpgroups 64
// each, and walks over blocks of 128 keys that one producer thread copies into a ring.
//
// S = Q K^T in INT8 and dP = dO V^T in 16 bits give dS in registers. Quantised with a scale for each query, it is the
// left operand of dQ += dS K, whose right operand is a transposed INT8 tile.
//
// Compile-time: as training_sm90.cuh, and STAGES of the ring.
#include "training_sm90.cuh"

constexpr int kTileBytes = kKeyTile * HEAD_DIM;  // of K and of its transpose; V has twice as many
constexpr int kStageBytes = 4 * kTileBytes;
constexpr int kQueryBytes = kQueryTile * HEAD_DIM;

// Shared memory: Q and dO of each warpgroup, ring, barriers. Where tiles are is in units of 16 bytes.
struct Shared {
  u32 base, tiles;
  static constexpr int kRing = kWarpgroups * 3 * kQueryBytes;
  static constexpr int kBarriers = kRing + STAGES * kStageBytes;
  DEVICE explicit Shared(u32 base) : base(base), tiles(base / 16) {}
  DEVICE u32 query(int warpgroup) const { return tiles + warpgroup * (3 * kQueryBytes / 16); }
  DEVICE u32 d_output(int warpgroup) const { return query(warpgroup) + kQueryBytes / 16; }
  DEVICE u32 key(int stage) const { return tiles + kRing / 16 + stage * (kStageBytes / 16); }
  DEVICE u32 value(int stage) const { return key(stage) + kTileBytes / 16; }
  DEVICE u32 key_transposed(int stage) const { return key(stage) + 3 * kTileBytes / 16; }
  DEVICE u32 full(int stage) const { return base + kBarriers + 8 * stage; }
  DEVICE u32 empty(int stage) const { return full(STAGES + stage); }
  DEVICE u32 queries_full() const { return full(2 * STAGES); }
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
    bulk_load(16 * shared.query(i), p.query + (tile + i) * kQueryBytes, kQueryBytes, shared.queries_full());
    load_rows_16bit(16 * shared.d_output(i), 64 * 128, p.d_output, (walk.tile + i) * kQueryTile, walk.head, p.heads,
                    shared.queries_full());
  }
  Ring ring;
  i64 key_tile = i64(walk.kv_head) * p.key_tiles;
  for (int block = 0; block < walk.blocks; ++block, ++key_tile, ring.advance<STAGES>()) {
    const int stage = ring.stage;
    const u32 full = shared.full(stage);
    mbarrier_wait(shared.empty(stage), ring.parity ^ 1);
    mbarrier_arrive_expect_bytes(full, kStageBytes);
    bulk_load(16 * shared.key(stage), p.key + key_tile * kTileBytes, kTileBytes, full);
    for (int half = 0; half < 2; ++half)
      load_rows_16bit(16 * shared.value(stage) + half * 64 * 128, 128 * 128, p.value, block * kKeyTile + half * 64,
                      walk.kv_head, p.kv_heads, full);
    bulk_load(16 * shared.key_transposed(stage), p.key_transposed + key_tile * kTileBytes, kTileBytes, full);
  }
}

// One warpgroup's 64 queries.
struct Consumer {
  const TrainParams& p;
  const Shared& shared;
  const Walk& walk;
  const int warpgroup, lane;
  Ring ring;
  u32 scores[64];     // then P
  u32 gradients[64];  // dP, then dS
  u32 codes[16];
  float d_query[HEAD_DIM / 2];
  float lse[2], minus_delta[2], scale[2];
  float query_factor;
  const float* key_scales;
  int first_row, unmasked;
  DEVICE u32 (&product())[64] { return gradients; }

  DEVICE Consumer(const TrainParams& p, const Shared& shared, const Walk& walk, int warpgroup)
      : p(p), shared(shared), walk(walk), warpgroup(warpgroup), lane(threadIdx.x % 32) {}

  // P of one score; at an edge 0 from key `limit` of the block on.
  template <bool kIsEdge>
  DEVICE void weight(int i, float factor, const int (&limit)[2]) {
    const float x = exp2_approx(fmaf(static_cast<int>(scores[i]), factor, -lse[i / 2 % 2]));
    const bool is_hidden = kIsEdge && i / 4 * 8 + lane % 4 * 2 + i % 2 >= limit[i / 2 % 2];
    scores[i] = is_hidden ? 0 : __float_as_uint(x);
  }

  // dS of P and dP.
  DEVICE void gradient(int i, float (&largest)[4]) {
    const float x = (__uint_as_float(gradients[i]) + minus_delta[i / 2 % 2]) * __uint_as_float(scores[i]);
    gradients[i] = __float_as_uint(x);
    largest[i % 4] = fmaxf(largest[i % 4], fabsf(x));
  }

  // From the scores and dP that are on their way to the codes of dS. Exponentials have a slow pipe of their own: half
  // of them are computed while dP is on its way, the others between dS.
  template <bool kIsEdge>
  DEVICE void finish_block(int block) {
    const float factor = query_factor * key_scales[block];
    int limit[2] = {0, 0};
    if (kIsEdge) {
#pragma unroll
      for (int r = 0; r < 2; ++r)
        limit[r] = (p.is_causal ? min(p.key_length, first_row + 8 * r + 1) : p.key_length) - block * kKeyTile;
    }
    wgmma_wait<1>(scores);
#pragma unroll
    for (int i = 0; i < 32; ++i) weight<kIsEdge>(i, factor, limit);
    compute_before_waiting(scores[31]);
    wgmma_wait<0>(gradients);
    float largest[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      weight<kIsEdge>(32 + i, factor, limit);
      gradient(i, largest);
    }
#pragma unroll
    for (int i = 32; i < 64; ++i) gradient(i, largest);
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) scale_row(fmaxf(largest[2 * r], largest[2 * r + 1]), scale[r], inverse[r]);
    make_codes(codes, gradients, inverse);
  }

  DEVICE void finish(int block) {
    if (block >= unmasked)
      finish_block<true>(block);
    else
      finish_block<false>(block);
  }

  DEVICE void issue_next_scores(int stage) { issue_scores(scores, shared.query(warpgroup), shared.key(stage)); }

  DEVICE void issue_next_weight_gradients(int stage) {
    issue_weight_gradients(gradients, shared.d_output(warpgroup), 64 * 128, shared.value(stage), 128 * 128);
  }

  DEVICE void run() {
    const i64 tile = i64(walk.head) * p.query_tiles + walk.tile + warpgroup;
    const int first = (walk.tile + warpgroup) * kQueryTile;
    const int thread_row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    const float* rows = p.rows + tile * kRowFloats;
    key_scales = p.key_scales + i64(walk.kv_head) * p.key_tiles;
    query_factor = rows[kQueryScale] * (p.softmax_scale * kLog2E);
    first_row = first + thread_row;
    unmasked = (p.is_causal ? min(p.key_length, first + 1) : p.key_length) / kKeyTile;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      lse[r] = rows[lse_place(thread_row + 8 * r)];
      minus_delta[r] = rows[delta_place(thread_row + 8 * r)];
    }
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) d_query[i] = 0.f;
    mbarrier_wait(shared.queries_full(), 0);
    // No wgmma is on its way where turns meet: the assembler would wait for each one then.
    mbarrier_wait(shared.full(0), 0);
    issue_next_scores(0);
    issue_next_weight_gradients(0);
    finish(0);
    for (int block = 1; block < walk.blocks; ++block) {
      const int stage = ring.stage;
      issue_product<128>(product(), codes, shared.key_transposed(stage));
      ring.advance<STAGES>();
      mbarrier_wait(shared.full(ring.stage), ring.parity);
      issue_next_scores(ring.stage);
      wgmma_wait<1>(product());
      pin_registers(codes);
      add_product<0>(d_query, product(), scale);
      if (lane == 0) mbarrier_arrive(shared.empty(stage));
      issue_next_weight_gradients(ring.stage);
      finish(block);
    }
    issue_product<128>(product(), codes, shared.key_transposed(ring.stage));
    wgmma_wait<0>(product());
    add_product<0>(d_query, product(), scale);
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r)  // NaN where Q, dO or V were not finite: maxima pass over it
      factor[r] = p.softmax_scale * p.query_sign + (query_factor + minus_delta[r]) * 0.f;
    const float* channels = p.channel_scales + walk.kv_head * HEAD_DIM + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) d_query[i] *= channels[i / 4 * 8 + i % 2];
    store_rows(static_cast<u16*>(p.d_query) + i64(walk.head) * p.query_length * p.head_dim, d_query, factor, first,
               p.query_length, p.head_dim);
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1) training_sm90_query(const __grid_constant__ TrainParams p) {
  extern __shared__ __align__(1024) u8 memory[];
  const Shared shared(shared_address(memory));
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
