// dK and dV of trainable attention in INT8 for sm_90a at head_dim 128, all in the transposed form: a thread block keeps
// 64 keys for each of its warpgroups and walks over blocks of 64 queries that one producer thread copies into a ring.
//
// S^T = K Q^T in INT8 and dP^T = V dO^T in 16 bits give P^T and dS^T in registers. Quantised with a scale for each key,
// they are the left operands of dV += P^T dO and dK += dS^T Q, whose right operands are transposed INT8 tiles.
// Registers: 128 sums, and two arrays of 32 that hold S^T and dP^T, then 64 channels of a product in turn.
//
// Compile-time: as training_sm90.cuh, and STAGES of the ring.
#include "training_sm90.cuh"

constexpr int kTileBytes = kQueryTile * HEAD_DIM;  // of Q, of its transpose, of dO's; dO has twice as many
constexpr int kStageBytes = 5 * kTileBytes;
constexpr int kRowBytes = kRowFloats * 4;

// Shared memory: K, V, ring, LSE and -delta of the ring, barriers. Where tiles are is in units of 16 bytes.
struct Shared {
  u32 base, tiles;
  static constexpr int kValue = kWarpgroups * 64 * HEAD_DIM;
  static constexpr int kRing = 3 * kValue;
  static constexpr int kRows = kRing + STAGES * kStageBytes;
  static constexpr int kBarriers = kRows + STAGES * kRowBytes;
  DEVICE explicit Shared(u32 base) : base(base), tiles(base / 16) {}
  DEVICE u32 key(int warpgroup) const { return tiles + warpgroup * (64 * HEAD_DIM / 16); }
  DEVICE u32 value(int warpgroup) const { return tiles + kValue / 16 + warpgroup * (128 * HEAD_DIM / 16); }
  DEVICE u32 query(int stage) const { return tiles + kRing / 16 + stage * (kStageBytes / 16); }
  DEVICE u32 d_output(int stage) const { return query(stage) + kTileBytes / 16; }
  DEVICE u32 d_output_transposed(int stage) const { return query(stage) + 3 * kTileBytes / 16; }
  DEVICE u32 query_transposed(int stage) const { return query(stage) + 4 * kTileBytes / 16; }
  DEVICE u32 rows(int stage) const { return base + kRows + stage * kRowBytes; }
  DEVICE u32 full(int stage) const { return base + kBarriers + 8 * stage; }
  DEVICE u32 empty(int stage) const { return full(STAGES + stage); }
  DEVICE u32 keys_full() const { return full(2 * STAGES); }
};

// A thread block's keys, 64 for each warpgroup, and the query blocks that it walks over: those from the first that sees
// a key, of all heads that share it.
struct Walk {
  int unit, warpgroups, kv_head, first, blocks, group;
  DEVICE explicit Walk(const TrainParams& p) : group(p.heads / p.kv_heads) {
    const int units = p.key_tiles * (kKeyTile / 64), per_head = ceil_div(units, kWarpgroups);
    unit = blockIdx.x % per_head * kWarpgroups;
    warpgroups = min(kWarpgroups, units - unit);
    kv_head = blockIdx.x / per_head;
    first = p.is_causal ? min(unit, p.query_tiles) : 0;
    blocks = p.query_tiles - first;
  }
  DEVICE int head(const TrainParams& p, int member) const { return kv_head * group + member; }
};

DEVICE void produce(const TrainParams& p, const Shared& shared) {
  const Walk walk(p);
  const u32 keys_full = shared.keys_full();
  mbarrier_arrive_expect_bytes(keys_full, walk.warpgroups * 3 * 64 * HEAD_DIM);
  for (int i = 0; i < walk.warpgroups; ++i) {
    const int unit = walk.unit + i;
    const i64 tile = i64(walk.kv_head) * p.key_tiles + unit / 2;
    bulk_load(16 * shared.key(i), p.key + (2 * tile + unit % 2) * 64 * HEAD_DIM, 64 * HEAD_DIM, keys_full);
    load_rows_16bit(16 * shared.value(i), 64 * 128, p.value, unit * 64, walk.kv_head, p.kv_heads, keys_full);
  }
  Ring ring;
  for (int member = 0; member < walk.group; ++member) {
    i64 tile = i64(walk.head(p, member)) * p.query_tiles + walk.first;
    for (int block = 0; block < walk.blocks; ++block, ++tile, ring.advance<STAGES>()) {
      const int stage = ring.stage;
      const u32 full = shared.full(stage);
      mbarrier_wait(shared.empty(stage), ring.parity ^ 1);
      mbarrier_arrive_expect_bytes(full, kStageBytes + kRowBytes);
      bulk_load(16 * shared.query(stage), p.query + tile * kTileBytes, kTileBytes, full);
      bulk_load(shared.rows(stage), p.rows + tile * kRowFloats, kRowBytes, full);
      load_rows_16bit(16 * shared.d_output(stage), 64 * 128, p.d_output, (walk.first + block) * kQueryTile,
                      walk.head(p, member), p.heads, full);
      bulk_load(16 * shared.d_output_transposed(stage), p.d_output_transposed + tile * kTileBytes, kTileBytes, full);
      bulk_load(16 * shared.query_transposed(stage), p.query_transposed + tile * kTileBytes, kTileBytes, full);
    }
  }
}

// Two warpgroups take turns with products, so that they don't wait for the tensor cores at the same time.
struct Turns {
  const int warpgroup;
  DEVICE explicit Turns(int warpgroup) : warpgroup(warpgroup) {
    if (warpgroup == 1) end();
  }
  DEVICE void begin() const { named_barrier_sync(1 + warpgroup, 256); }
  DEVICE void end() const { named_barrier_arrive(2 - warpgroup, 256); }
};

// One warpgroup's 64 keys.
struct Consumer {
  const TrainParams& p;
  const Shared& shared;
  const Walk walk;
  const int warpgroup, lane;
  Ring ring;
  u32 a[32], b[32];  // S^T, then P^T; dP^T, then dS^T; then products
  u32 weight_codes[8], gradient_codes[8];
  float weight_scale[2], gradient_scale[2];
  float key_factor;
  int first_key;
  float d_key[HEAD_DIM / 2], d_value[HEAD_DIM / 2];

  DEVICE Consumer(const TrainParams& p, const Shared& shared)
      : p(p), shared(shared), walk(p), warpgroup(__shfl_sync(~0u, threadIdx.x / 128 - 1, 0)), lane(threadIdx.x % 32) {}

  // LSE of half of the thread's queries: 0 and 1 of each 8.
  DEVICE void load_rows(float2 (&values)[4], u32 from) {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = load_shared_pair(from + 32 * i + lane % 4 * 8);
  }

  // P^T of one score; at an edge 0 where the query is before the key: `behind` is the key of the thread's first row
  // minus the block's first query.
  template <bool kIsEdge>
  DEVICE void weight(int i, const float2 (&lse)[4], float factor, int behind) {
    const float shift = i % 2 ? lse[i / 4 % 4].y : lse[i / 4 % 4].x;
    const float x = exp2_approx(fmaf(static_cast<int>(a[i]), factor, -shift));
    const bool is_hidden = kIsEdge && i / 4 * 8 + lane % 4 * 2 + i % 2 < behind + i / 2 % 2 * 8;
    a[i] = is_hidden ? 0 : __float_as_uint(x);
  }

  // Two dS^T from dP^T - delta and P^T.
  DEVICE void gradient_pair(int i, int (&largest)[2]) {
    const float x = __uint_as_float(b[i]) * __uint_as_float(a[i]);
    const float y = __uint_as_float(b[i + 1]) * __uint_as_float(a[i + 1]);
    b[i] = __float_as_uint(x);
    b[i + 1] = __float_as_uint(y);
    largest[i / 2 % 2] = larger(largest[i / 2 % 2], x, y);
  }

  // From the scores and dP^T that are on their way to the codes of P^T and dS^T. `query` is the block's first.
  // Exponentials have a slow pipe of their own: half of them are computed while dP^T is on its way, the others between
  // dS^T. What comes from shared memory is read before the waits, which hide how long that takes.
  template <bool kIsEdge>
  DEVICE void finish_block(u32 rows, int query) {
    float2 lse[2][4];
    load_rows(lse[0], rows);
    const float factor = key_factor * load_shared_float(rows + 4 * kQueryScale);
    const int behind = first_key - query + threadIdx.x / 32 % 4 * 16 + lane / 4;
    wgmma_wait<1>(a);
#pragma unroll
    for (int i = 0; i < 8; ++i) weight<kIsEdge>(i, lse[0], factor, behind);
    load_rows(lse[1], rows + 128);
#pragma unroll
    for (int i = 8; i < 16; ++i) weight<kIsEdge>(i, lse[0], factor, behind);
    compute_before_waiting(a[15]);
    wgmma_wait<0>(b);
    int largest[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 16; i += 2) {
      weight<kIsEdge>(16 + i, lse[1], factor, behind);
      weight<kIsEdge>(17 + i, lse[1], factor, behind);
      gradient_pair(i, largest);
    }
    float inverse[2];
    scale_weights(a, weight_scale, inverse);
#pragma unroll
    for (int i = 16; i < 32; i += 2) gradient_pair(i, largest);
    make_codes(weight_codes, a, inverse);
#pragma unroll
    for (int r = 0; r < 2; ++r) scale_row(__int_as_float(largest[r]), gradient_scale[r], inverse[r]);
    make_codes(gradient_codes, b, inverse);
    const float2 scales =
        load_shared_pair(rows + 4 * kQueryScale);  // NaN where Q or dO was not finite: maxima may pass over it
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      weight_scale[r] *= scales.y + scales.x * 0.f;
      gradient_scale[r] *= scales.x + scales.y * 0.f;
    }
  }

  DEVICE void finish(u32 rows, int query) {
    if (p.is_causal && query < first_key + 63)
      finish_block<true>(rows, query);
    else
      finish_block<false>(rows, query);
  }

  DEVICE void issue_next_scores(int stage) { issue_scores(a, shared.key(warpgroup), shared.query(stage)); }

  // dP^T - delta: the sums start as -delta.
  DEVICE void issue_next_weight_gradients(int stage) {
    const u32 deltas = shared.rows(stage) + 256 + lane % 4 * 8;
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
      const float2 start = load_shared_pair(deltas + i / 4 * 32);
      b[i] = __float_as_uint(start.x);
      b[i + 1] = __float_as_uint(start.y);
    }
    issue_weight_gradients(b, shared.value(warpgroup), 64 * 128, shared.d_output(stage), 64 * 128, true);
  }

  DEVICE void run() {
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) d_key[i] = d_value[i] = 0.f;
    const float key_scale = p.key_scales[i64(walk.kv_head) * p.key_tiles + (walk.unit + warpgroup) / 2];
    key_factor = key_scale * (p.softmax_scale * kLog2E);
    first_key = (walk.unit + warpgroup) * 64;
    int turns = walk.blocks * walk.group, block = walk.first;
    mbarrier_wait(shared.keys_full(), 0);
    // No wgmma is on its way where turns meet: the assembler would wait for each one then. In the last turn, the next
    // scores are those of memory that nobody reads.
    if (turns > 0) {
      mbarrier_wait(shared.full(ring.stage), ring.parity);
      issue_next_scores(ring.stage);
      issue_next_weight_gradients(ring.stage);
      finish(shared.rows(ring.stage), block * kQueryTile);
    }
    const Turns products(warpgroup);
    for (; turns > 0; --turns) {
      const int stage = ring.stage;
      const u32 d_output = shared.d_output_transposed(stage), query = shared.query_transposed(stage);
      products.begin();
      issue_product<64>(a, weight_codes, d_output);
      issue_product<64>(b, weight_codes, d_output, 64 * 64);
      wgmma_wait<1>(a);
      add_product<0>(d_value, a, weight_scale);
      issue_product<64>(a, gradient_codes, query);
      wgmma_wait<1>(b);
      pin_registers(weight_codes);
      add_product<32>(d_value, b, weight_scale);
      issue_product<64>(b, gradient_codes, query, 64 * 64);
      wgmma_wait<1>(a);
      add_product<0>(d_key, a, gradient_scale);
      ring.advance<STAGES>();
      if (++block == p.query_tiles) block = walk.first;
      if (turns > 1) mbarrier_wait(shared.full(ring.stage), ring.parity);
      issue_next_scores(ring.stage);
      products.end();
      wgmma_wait<1>(b);
      pin_registers(gradient_codes);
      add_product<32>(d_key, b, gradient_scale);
      if (lane == 0) mbarrier_arrive(shared.empty(stage));
      issue_next_weight_gradients(ring.stage);
      if (turns > 1) {
        finish(shared.rows(ring.stage), block * kQueryTile);
      } else {
        wgmma_wait<0>(a);
        wgmma_wait<0>(b);
      }
    }
    const i64 at = i64(walk.kv_head) * p.key_length * p.head_dim;
    const float one[2] = {1.f, 1.f};
    const float factor = p.softmax_scale + key_factor * 0.f;  // NaN where K was not finite
    const float factors[2] = {factor, factor};
    store_rows(p.d_value + at, d_value, one, first_key, p.key_length, p.head_dim);
    store_rows(p.d_key + at, d_key, factors, first_key, p.key_length, p.head_dim);
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    training_sm90_key_value(const __grid_constant__ TrainParams p) {
  extern __shared__ __align__(1024) u8 memory[];
  const Shared shared(shared_address(memory));
  if (threadIdx.x == 0) {
    const int warpgroups = Walk(p).warpgroups;
    for (int stage = 0; stage < STAGES; ++stage) {
      mbarrier_init(shared.full(stage), 1);
      mbarrier_init(shared.empty(stage), 4 * warpgroups);  // one arrival a warp
    }
    mbarrier_init(shared.keys_full(), 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    shrink_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce(p, shared);
  } else {
    grow_registers<kConsumerRegisters>();
    Consumer consumer(p, shared);
    if (consumer.warpgroup < consumer.walk.warpgroups) consumer.run();
  }
}
