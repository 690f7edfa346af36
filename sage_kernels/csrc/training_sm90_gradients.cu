// All gradients of trainable attention for sm_90a, in the transposed form: a thread block keeps 64 keys for each of its
// warpgroups and walks over blocks of 64 queries that one producer thread copies into a ring.
//
// S^T = K Q^T in INT8 and dP^T = V dO^T in 16 bits give P^T and dS^T = P^T (dP^T - delta) in registers, rounded to 16
// bits the left operands of dV += P^T dO and dK += dS^T Q. With those in INT8 a thread would spend on codes and scales
// what the tensor cores save.
//
// dS^T also goes to shared memory, where warpgroups take turns to multiply it with the thread block's keys for dQ.
// Thread blocks add up their parts of dQ as integers, whose sum does not depend on the order; training_sm90_query.cu
// makes dQ of them.
//
// Compile-time: as training_sm90.cuh, and STAGES of the ring.
#include "training_sm90.cuh"

constexpr int kCodeBytes = kQueryTile * HEAD_DIM, kTileBytes = 2 * kCodeBytes;  // of Q's codes, of Q and dO
constexpr int kStageBytes = kCodeBytes + 2 * kTileBytes;
constexpr int kRowBytes = kRowFloats * 4;
constexpr int kBuffers = 3;  // of dS^T: that of this turn, of the one before, and what slower warpgroups still need

// Shared memory: K's codes, V, K, blocks of dS^T, ring, LSE and such of the ring, barriers. Where tiles are is in units
// of 16 bytes.
struct Shared {
  u32 base, tiles;
  static constexpr int kValue = kWarpgroups * 64 * HEAD_DIM;
  static constexpr int kKey = 3 * kValue;
  static constexpr int kGradients = 5 * kValue;
  static constexpr int kRing = kGradients + kBuffers * kWarpgroups * kSlabBytes;
  static constexpr int kRows = kRing + STAGES * kStageBytes;
  static constexpr int kBarriers = kRows + STAGES * kRowBytes;
  DEVICE explicit Shared(u32 base) : base(base), tiles(base / 16) {}
  DEVICE u32 key_codes(int warpgroup) const { return tiles + warpgroup * (64 * HEAD_DIM / 16); }
  DEVICE u32 value(int warpgroup) const { return tiles + kValue / 16 + warpgroup * (128 * HEAD_DIM / 16); }
  DEVICE u32 key(int warpgroup) const { return tiles + kKey / 16 + warpgroup * (128 * HEAD_DIM / 16); }
  DEVICE u32 gradients(int buffer, int warpgroup) const {
    return tiles + kGradients / 16 + (buffer * kWarpgroups + warpgroup) * (kSlabBytes / 16);
  }
  DEVICE u32 query_codes(int stage) const { return tiles + kRing / 16 + stage * (kStageBytes / 16); }
  DEVICE u32 query(int stage) const { return query_codes(stage) + kCodeBytes / 16; }
  DEVICE u32 d_output(int stage) const { return query(stage) + kTileBytes / 16; }
  DEVICE u32 rows(int stage) const { return base + kRows + stage * kRowBytes; }
  DEVICE u32 full(int stage) const { return base + kBarriers + 8 * stage; }
  DEVICE u32 empty(int stage) const { return full(STAGES + stage); }
  DEVICE u32 keys_full() const { return full(2 * STAGES); }
  DEVICE u32 gradients_full(int buffer) const { return full(2 * STAGES + 1 + buffer); }
  DEVICE u32 gradients_empty(int buffer) const { return full(2 * STAGES + 1 + kBuffers + buffer); }
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
  mbarrier_arrive_expect_bytes(keys_full, walk.warpgroups * 5 * 64 * HEAD_DIM);
  for (int i = 0; i < walk.warpgroups; ++i) {
    const int unit = walk.unit + i;
    const i64 tile = i64(walk.kv_head) * p.key_tiles + unit / 2;
    bulk_load(16 * shared.key_codes(i), p.key + (2 * tile + unit % 2) * 64 * HEAD_DIM, 64 * HEAD_DIM, keys_full);
    load_rows_16bit(16 * shared.value(i), kSlabBytes, p.value, unit * 64, walk.kv_head, p.kv_heads, keys_full);
    load_rows_16bit(16 * shared.key(i), kSlabBytes, p.key_16bit, unit * 64, walk.kv_head, p.kv_heads, keys_full);
  }
  Ring ring;
  for (int member = 0; member < walk.group; ++member) {
    const int head = walk.head(p, member);
    i64 tile = i64(head) * p.query_tiles + walk.first;
    for (int block = 0; block < walk.blocks; ++block, ++tile, ring.advance<STAGES>()) {
      const int stage = ring.stage, row = (walk.first + block) * kQueryTile;
      const u32 full = shared.full(stage);
      mbarrier_wait(shared.empty(stage), ring.parity ^ 1);
      mbarrier_arrive_expect_bytes(full, kStageBytes + kRowBytes);
      bulk_load(16 * shared.query_codes(stage), p.query + tile * kCodeBytes, kCodeBytes, full);
      bulk_load(shared.rows(stage), p.rows + tile * kRowFloats, kRowBytes, full);
      load_rows_16bit(16 * shared.d_output(stage), kSlabBytes, p.d_output, row, head, p.heads, full);
      load_rows_16bit(16 * shared.query(stage), kSlabBytes, p.query_16bit, row, head, p.heads, full);
    }
  }
}

// One warpgroup's 64 keys.
struct Consumer {
  const TrainParams& p;
  const Shared& shared;
  const Walk walk;
  const int warpgroup, lane;
  Ring ring, buffers;
  u32 a[32], b[32];                // S^T, then P^T; dP^T - delta
  u32 weights[16], gradients[16];  // P^T and dS^T as left operands
  float4 lse[4];
  float scale, key_factor;
  int first_key;
  float d_key[HEAD_DIM / 2], d_value[HEAD_DIM / 2];

  DEVICE Consumer(const TrainParams& p, const Shared& shared)
      : p(p), shared(shared), walk(p), warpgroup(__shfl_sync(~0u, threadIdx.x / 128 - 1, 0)), lane(threadIdx.x % 32) {}

  // P^T; at an edge 0 where the query is before the key. `query` is the block's first.
  template <bool kIsEdge>
  DEVICE void find_weights(float factor, int query) {
    const int behind = first_key - query + threadIdx.x / 32 % 4 * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const float4& pairs = lse[i / 8];
      const float shift = i / 4 % 2 ? (i % 2 ? pairs.w : pairs.z) : (i % 2 ? pairs.y : pairs.x);
      const float x = exp2_approx(fmaf(static_cast<int>(a[i]), factor, -shift));
      const bool is_hidden = kIsEdge && i / 4 * 8 + lane % 4 * 2 + i % 2 < behind + i / 2 % 2 * 8;
      a[i] = is_hidden ? 0 : __float_as_uint(x);
    }
  }

  // From the scores and dP^T that are on their way to products for dV and dK that are. The exponentials are computed
  // while dP^T is on its way: the branch keeps the assembler from moving them behind the second wait.
  DEVICE void finish(int stage, int query) {
    wgmma_wait<1>(a);
    const float factor = key_factor * scale;
    if (p.is_causal && query < first_key + 63)
      find_weights<true>(factor, query);
    else
      find_weights<false>(factor, query);
    pack(weights, a);
    issue_product(d_value, weights, shared.d_output(stage));
    wgmma_wait<1>(b);
    pack(gradients, b);
#pragma unroll
    for (int i = 0; i < 16; ++i) gradients[i] = multiply_pairs(gradients[i], weights[i]);
    issue_product(d_key, gradients, shared.query(stage));
    share_gradients();
  }

  // dS^T to shared memory, as rows of keys, when what was there before was multiplied.
  DEVICE void share_gradients() {
    mbarrier_wait(shared.gradients_empty(buffers.stage), buffers.parity ^ 1);
    const u32 tile = 16 * shared.gradients(buffers.stage, warpgroup);
    const u32 row = tile + (threadIdx.x / 32 % 4 * 16 + lane % 16) * 128, chunk = (lane / 16 ^ lane % 8) << 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) store_matrices(row + (chunk ^ i << 5), gradients + 4 * i);
  }

  // What a block adds to dQ: dS of all the thread block's keys times these.
  DEVICE void add_to_query_gradients(const Ring& buffer, int tile) {
    const float* quanta = p.rows + i64(tile) * kRowFloats + kQuanta + threadIdx.x / 32 % 4 * 16 + lane / 4;
    const float quantum[2] = {quanta[0], quanta[8]};
    int* total = p.query_sums + i64(tile) * (64 * HEAD_DIM) + threadIdx.x % 128;
    mbarrier_wait(shared.gradients_full(buffer.stage), buffer.parity);
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      float sums[32];
      wgmma_fence(sums);
#pragma unroll
      for (int i = 0; i < kWarpgroups; ++i) {
        const u64 left = operand_rows(shared.gradients(buffer.stage, i));
        const u64 right = operand_rows(shared.key(i) + slab * (kSlabBytes / 16));
#pragma unroll
        for (int step = 0; step < 4; ++step) multiply_16bit(sums, left + 128 * step, right + 128 * step, i + step > 0);
      }
      wgmma_commit();
      wgmma_wait<0>(sums);
      if (slab == kSlabs - 1 && lane == 0) mbarrier_arrive(shared.gradients_empty(buffer.stage));
#if !BFLOAT16
      tell_overflow(sums, tile);
#endif
#pragma unroll
      for (int i = 0; i < 32; ++i)
        add_to_global(total + 128 * (32 * slab + i), round_to_integer(sums[i] * quantum[i / 2 % 2]));
    }
  }

  // dS of float16 can overflow, which integers would hide: the query's step becomes NaN.
  DEVICE void tell_overflow(const float (&sums)[32], int tile) {
    float bad[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < 32; ++i) bad[i / 2 % 2] = fmaf(sums[i], 0.f, bad[i / 2 % 2]);
    float* steps = p.rows + i64(tile) * kRowFloats + kSteps + threadIdx.x / 32 % 4 * 16 + lane / 4;
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (bad[r] != 0.f) steps[8 * r] = bad[r];
  }

  // What comes from shared memory for the next block; the sums of dP^T - delta start as -delta.
  DEVICE void load_rows(int stage) {
    const u32 rows = shared.rows(stage), quarter = lane % 4 * 16;
    scale = load_shared_float(rows + 4 * kQueryScale);
#pragma unroll
    for (int i = 0; i < 4; ++i) lse[i] = load_shared(rows + 64 * i + quarter);
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
      const uint4 start = load_shared_words(rows + 4 * kDeltas + 16 * i + quarter);
      b[i] = start.x;
      b[i + 1] = start.y;
      b[i + 2] = start.z;
      b[i + 3] = start.w;
    }
  }

  DEVICE void issue_next(int stage) {
    issue_scores(a, shared.key_codes(warpgroup), shared.query_codes(stage));
    issue_weight_gradients(b, shared.value(warpgroup), kSlabBytes, shared.d_output(stage), kSlabBytes, true);
  }

  DEVICE void run() {
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) d_key[i] = d_value[i] = 0.f;
    const float key_scale = p.key_scales[i64(walk.kv_head) * p.key_tiles + (walk.unit + warpgroup) / 2];
    key_factor = key_scale * (p.softmax_scale * kLog2E);
    first_key = (walk.unit + warpgroup) * 64;
    const int turns = walk.blocks * walk.group;
    int block = walk.first, tile = walk.head(p, 0) * p.query_tiles + walk.first;
    // Of the block before: who adds it to dQ, in turns, and where it is.
    int owner = -1, own_tile = 0;
    Ring own_buffer;
    mbarrier_wait(shared.keys_full(), 0);
    if (turns > 0) {
      mbarrier_wait(shared.full(0), 0);
      load_rows(0);
    }
    // No wgmma is on its way where turns meet: the assembler would wait for each one then. What a block adds to dQ
    // waits for the next turn, because slower warpgroups still work on its dS.
    for (int turn = 0; turn < turns; ++turn) {
      const int stage = ring.stage, own = tile;
      issue_next(stage);
      finish(stage, block * kQueryTile);
      ++tile;
      if (++block == p.query_tiles) {
        block = walk.first;
        tile += walk.first;
      }
      ring.advance<STAGES>();
      if (turn + 1 < turns) {
        mbarrier_wait(shared.full(ring.stage), ring.parity);
        load_rows(ring.stage);
      }
      wgmma_wait<0>(d_value);
      wgmma_wait<0>(d_key);
      shared_stores_fence();  // of dS^T, here because it waits for them
      __syncwarp();
      if (lane == 0) {
        mbarrier_arrive(shared.empty(stage));
        mbarrier_arrive(shared.gradients_full(buffers.stage));
      }
      if (owner == warpgroup) add_to_query_gradients(own_buffer, own_tile);
      if (++owner == walk.warpgroups) owner = 0;
      own_tile = own;
      own_buffer = buffers;
      buffers.advance<kBuffers>();
    }
    if (owner == warpgroup) add_to_query_gradients(own_buffer, own_tile);
    const i64 at = i64(walk.kv_head) * p.key_length * p.head_dim;
    const float one[2] = {1.f, 1.f};
    const float factor = p.softmax_scale * p.query_sign;
    const float factors[2] = {factor, factor};
    store_rows(p.d_value + at, d_value, one, first_key, p.key_length, p.head_dim);
    store_rows(p.d_key + at, d_key, factors, first_key, p.key_length, p.head_dim);
  }
};

// A warpgroup without keys clears its part of what the others multiply for dQ.
DEVICE void clear_unused(const Shared& shared, int warpgroup) {
  const float4 zero = make_float4(0.f, 0.f, 0.f, 0.f);
  for (int at = threadIdx.x % 128 * 16; at < kSlabBytes; at += 128 * 16) {
    for (int slab = 0; slab < kSlabs; ++slab) store_shared(16 * shared.key(warpgroup) + slab * kSlabBytes + at, zero);
    for (int buffer = 0; buffer < kBuffers; ++buffer) store_shared(16 * shared.gradients(buffer, warpgroup) + at, zero);
  }
  shared_stores_fence();
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    training_sm90_gradients(const __grid_constant__ TrainParams p) {
  extern __shared__ __align__(1024) u8 memory[];
  const Shared shared(shared_address(memory));
  if (threadIdx.x == 0) {
    const int warpgroups = Walk(p).warpgroups;
    for (int stage = 0; stage < STAGES; ++stage) {
      mbarrier_init(shared.full(stage), 1);
      mbarrier_init(shared.empty(stage), 4 * warpgroups);  // one arrival a warp
    }
    mbarrier_init(shared.keys_full(), 1);
    for (int buffer = 0; buffer < kBuffers; ++buffer) {
      mbarrier_init(shared.gradients_full(buffer), 4 * warpgroups);
      mbarrier_init(shared.gradients_empty(buffer), 4);
    }
    mbarrier_init_fence();
  }
  const int warpgroup = static_cast<int>(threadIdx.x / 128) - 1;
  if (warpgroup >= Walk(p).warpgroups) clear_unused(shared, warpgroup);
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
