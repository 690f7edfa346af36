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

// Shared memory: Q of each warpgroup, ring, barriers. Where tiles are is in units of 16 bytes.
struct Shared {
  u32 base, tiles;
  static constexpr int kRing = kWarpgroups * kQueryBytes;
  static constexpr int kBarriers = kRing + STAGES * kStageBytes;
  DEVICE explicit Shared(u32 base) : base(base), tiles(base / 16) {}
  DEVICE u32 query(int warpgroup) const { return tiles + warpgroup * (kQueryBytes / 16); }
  DEVICE u32 key(int stage) const { return tiles + kRing / 16 + stage * (kStageBytes / 16); }
  DEVICE u32 value(int stage) const { return key(stage) + kTileBytes / 16; }
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
    bulk_load(16 * shared.query(i), p.query + (tile + i) * kQueryBytes, kQueryBytes, shared.queries_full());
  Ring ring;
  i64 key_tile = i64(walk.kv_head) * p.key_tiles;
  for (int block = 0; block < walk.blocks; ++block, ++key_tile, ring.advance<STAGES>()) {
    const u32 full = shared.full(ring.stage);
    mbarrier_wait(shared.empty(ring.stage), ring.parity ^ 1);
    mbarrier_arrive_expect_bytes(full, kStageBytes);
    bulk_load(16 * shared.key(ring.stage), p.key + key_tile * kTileBytes, kTileBytes, full);
    bulk_load(16 * shared.value(ring.stage), p.value_transposed + key_tile * kTileBytes, kTileBytes, full);
  }
}

// One warpgroup's 64 queries.
struct Consumer {
  const TrainForwardParams& p;
  const Shared& shared;
  const Walk& walk;
  const int warpgroup;
  Ring ring;
  u32 scores[64];  // then weights
  u32 product[HEAD_DIM / 2];
  u32 codes[16];
  float output[HEAD_DIM / 2];
  float maximum[2], row_sum[2], rescale[2], weight_scale[2];
  float query_factor;
  int first_key_tile, unmasked;

  DEVICE Consumer(const TrainForwardParams& p, const Shared& shared, const Walk& walk, int warpgroup)
      : p(p), shared(shared), walk(walk), warpgroup(warpgroup) {}

  // These two are not kept, for want of registers.
  DEVICE static int lane() { return threadIdx.x % 32; }

  DEVICE int first_row() const { return walk.tile * kQueryTile + (threadIdx.x / 32 - 4) * 16 + lane() / 4; }

  // Whether a score is of a key from `limit` of the block on.
  DEVICE bool is_hidden(int i, const int (&limit)[2]) const {
    return i / 4 * 8 + lane() % 4 * 2 + i % 2 >= limit[i / 2 % 2];
  }

  // What the largest scores of a block say about it and about what came before.
  template <bool kIsEdge>
  DEVICE void find_scales(const int (&limit)[2], float factor, float (&shift)[2]) {
    if (kIsEdge) {
#pragma unroll
      for (int i = 0; i < 64; ++i)
        if (is_hidden(i, limit)) scores[i] = kHidden;
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
      shift[r] = kLog2Limit - 24.f - local;
    }
  }

  // Scores of 4 keys of each row to weights, as floats: codes up to 127 in units of 2^-24.
  template <bool kIsEdge>
  DEVICE void weights(int first, float factor, const float (&shift)[2], float (&sums)[2]) {
#pragma unroll
    for (int i = first; i < first + 8; ++i) {
      float x = exp2_approx(fmaf(static_cast<int>(scores[i]), factor, shift[i / 2 % 2]));
      if (kIsEdge && static_cast<int>(scores[i]) == kHidden) x = 0.f;
      scores[i] = __float_as_uint(x);
      sums[i / 2 % 2] += x;
    }
  }

  // Bits of float16 denormals are integers.
  DEVICE void pack(int first) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const u32* x = scores + first + 2 * r;
      const u32 low = pack_float16(__uint_as_float(x[0]), __uint_as_float(x[1]));
      const u32 high = pack_float16(__uint_as_float(x[4]), __uint_as_float(x[5]));
      codes[first / 4 + r] = __byte_perm(low, high, 0x6420);
    }
  }

  // From the scores that are on their way to codes, while P V of the block before is, whose scale is `scale`.
  // Exponentials have a slow pipe of their own: half of them are computed while P V is on its way, what else there is
  // to do between the others.
  template <bool kIsEdge, bool kIsFirst>
  DEVICE void finish_block(int block, const float (&scale)[2]) {
    const float factor = query_factor * p.key_scales[first_key_tile + block];
    float shift[2], sums[2] = {0.f, 0.f};
    int limit[2] = {0, 0};
    if (kIsEdge) {
#pragma unroll
      for (int r = 0; r < 2; ++r)
        limit[r] = (p.is_causal ? min(p.key_length, first_row() + 8 * r + 1) : p.key_length) - block * kKeyTile;
    }
    wgmma_wait<kIsFirst ? 0 : 1>(scores);
    find_scales<kIsEdge>(limit, factor, shift);
#pragma unroll
    for (int i = 0; i < 32; i += 8) weights<kIsEdge>(i, factor, shift, sums);
    if (!kIsFirst) {
      compute_before_waiting(scores[31]);
      wgmma_wait<0>(product);
      pin_registers(codes);
    }
#pragma unroll
    for (int i = 32; i < 64; i += 8) {
      weights<kIsEdge>(i, factor, shift, sums);
      pack(i - 32);
      if (!kIsFirst) add(i / 8 - 4, scale);
    }
#pragma unroll
    for (int i = 32; i < 64; i += 8) pack(i);
#pragma unroll
    for (int r = 0; r < 2; ++r) row_sum[r] = row_sum[r] * rescale[r] + sums[r] * (weight_scale[r] * kCodesInUnit);
  }

  template <bool kIsFirst = false>
  DEVICE void finish(int block, const float (&scale)[2]) {
    if (block >= unmasked)
      finish_block<true, kIsFirst>(block, scale);
    else
      finish_block<false, kIsFirst>(block, scale);
  }

  // One of four parts of a product.
  DEVICE void add(int part, const float (&scale)[2]) {
#pragma unroll
    for (int i = part * (HEAD_DIM / 8); i < (part + 1) * (HEAD_DIM / 8); ++i)
      output[i] = fmaf(static_cast<float>(static_cast<int>(product[i])), scale[i / 2 % 2], output[i]);
  }

  DEVICE void rescale_output() {
    if (__any_sync(~0u, rescale[0] != 1.f || rescale[1] != 1.f)) {
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 2; ++i) output[i] *= rescale[i / 2 % 2];
    }
  }

  DEVICE void run() {
    const i64 tile = i64(walk.head) * p.query_tiles + walk.tile + warpgroup;
    first_key_tile = walk.kv_head * p.key_tiles;
    query_factor = p.query_scales[tile] * (p.softmax_scale * kLog2E);
    unmasked = (p.is_causal ? min(p.key_length, walk.tile * kQueryTile + 1) : p.key_length) / kKeyTile;
#pragma unroll
    for (int r = 0; r < 2; ++r) maximum[r] = -infinity(), row_sum[r] = 0.f;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) output[i] = 0.f;
    mbarrier_wait(shared.queries_full(), 0);
    mbarrier_wait(shared.full(0), 0);
    issue_scores(scores, shared.query(warpgroup), shared.key(0));
    float scale[2];
    finish<true>(0, scale);
    for (int block = 1; block < walk.blocks; ++block) {
      const int stage = ring.stage;
      ring.advance<STAGES>();
#pragma unroll
      for (int r = 0; r < 2; ++r) scale[r] = weight_scale[r] * p.value_scales[first_key_tile + block - 1];
      mbarrier_wait(shared.full(ring.stage), ring.parity);
      issue_scores(scores, shared.query(warpgroup), shared.key(ring.stage));
      issue_product<128>(product, codes, shared.value(stage));
      rescale_output();
      finish(block, scale);
      if (lane() == 0) mbarrier_arrive(shared.empty(stage));
    }
    issue_product<128>(product, codes, shared.value(ring.stage));
    rescale_output();
#pragma unroll
    for (int r = 0; r < 2; ++r) scale[r] = weight_scale[r] * p.value_scales[first_key_tile + walk.blocks - 1];
    wgmma_wait<0>(product);
#pragma unroll
    for (int part = 0; part < 4; ++part) add(part, scale);
    store();
  }

  DEVICE void store() {
    const int first_row = this->first_row();
    const i64 lse_row = i64(walk.head) * p.query_tiles * kQueryTile + first_row;
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_sum[r] += __shfl_xor_sync(~0u, row_sum[r], 1);
      row_sum[r] += __shfl_xor_sync(~0u, row_sum[r], 2);
      inverse[r] = 1.f / row_sum[r];
      if (lane() % 4 == 0)
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
        const int column = i / 4 * 8 + lane() % 4 * 2;
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
