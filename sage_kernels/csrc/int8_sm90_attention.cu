// Attention with INT8 Q K^T and FP8 P V for sm_90a: wgmma in two flavours, operands pre-tiled by int8_sm90_prepare.cu.
//
// One producer warp copies K and V tiles into a ring; each consumer warpgroup owns 64 query rows and keeps two wgmma
// groups in flight: Q K^T of the next key block and P V of the current one, under which it computes the softmax.
// S accumulates on top of 0x4B400000, so that its bits are the float 12582912 + S and need no conversion.
//
// Compile-time: HEAD_DIM 64 | 128 (smaller ones padded), KEYS per block, STAGES of the ring, WARPGROUPS of consumers
// and PINGPONG: two of them take turns with the tensor cores. PROMOTE: FP8 wgmma accumulates with about 14 bits, so
// that P V of this many key blocks starts at zero and is added in float32; 0 never does. ONES: the row sum comes from 8
// columns of ones beside V, rather than from additions. PARK: the float32
// sums wait in shared memory for the next promotion. HEADROOM: O is rescaled only when the row maximum has grown by
// more than this many powers of two. LINE: of every eight words of weights, how many come from a straight line between
// powers of two in place of the exponential; that needs ONES.
#include "int8_sm90_schedule.cuh"

constexpr int kThreads = 128 * (WARPGROUPS + 1);
constexpr int kQueryBytes = 64 * HEAD_DIM;
constexpr int kTileBytes = KEYS * HEAD_DIM;  // of K, and of V
constexpr int kConsumerRegisters = WARPGROUPS == 2 ? 240 : 160;
constexpr int kProducerRegisters = WARPGROUPS == 2 ? 24 : 32;
constexpr int kValueRowBytes = KEYS % 128 == 0 ? 128 : KEYS % 64 == 0 ? 64 : 32;
constexpr int kScores = KEYS / 2;  // S registers of a thread
constexpr int kEarly = SPLIT ? kScores / 8 * SPLIT : kScores;
constexpr int kOutputs = HEAD_DIM / 2;         // O registers of a thread
constexpr int kColumns = kOutputs + 4 * ONES;  // with the row sums: of row lane / 4 first, of 8 rows on third
constexpr int kOnesBytes = ONES * 1024;        // behind each stage of V
static_assert(!LINE || ONES, "weights of a line exist as codes only");
static_assert(!ONES || KEYS == 128, "8 rows of ones follow V's in one swizzled image");
constexpr int kParkedBytes = PARK * 128 * kColumns * 4;  // of a warpgroup
static_assert(!PARK || PROMOTE, "sums are parked between promotions");
constexpr u32 kMagicBits = 0x4B400000;
constexpr float kMagic = 12582912.f;
constexpr float kLog2Stretch = 8.807354922f - HEADROOM;  // log2(448): the row maximum becomes E4M3's largest value
// 2^x by a straight line between powers of two (Schraudolph), within 6 %: 8 x counts E4M3's codes.
constexpr float kLineUnits = 8.f / 16777216.f;              // of pack_integers
constexpr float kLineShift = (7.f - 0.0564f) * kLineUnits;  // E4M3's bias, less what the line exceeds 2^x on average

struct Ring {
  int stage = 0;
  u32 parity = 0;
  DEVICE void advance() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Shared memory: Q [WARPGROUPS], K ring, V ring, barriers. Swizzles repeat every 1024 bytes, so tiles start at
// multiples.
struct Shared {
  u32 base;
  static constexpr int kKey = WARPGROUPS * kQueryBytes;
  static constexpr int kValue = kKey + STAGES * kTileBytes;
  static constexpr int kParked = kValue + STAGES * (kTileBytes + kOnesBytes);
  static constexpr int kBarriers = kParked + WARPGROUPS * kParkedBytes;
  DEVICE u32 query(int warpgroup) const { return base + warpgroup * kQueryBytes; }
  DEVICE u32 key(int stage) const { return base + kKey + stage * kTileBytes; }
  DEVICE u32 value(int stage) const { return base + kValue + stage * (kTileBytes + kOnesBytes); }
  DEVICE u32 parked(int thread) const { return base + kParked + thread / 128 * kParkedBytes + thread % 128 * 16; }
  DEVICE u32 key_full(int stage) const { return base + kBarriers + 8 * stage; }
  DEVICE u32 key_empty(int stage) const { return key_full(STAGES + stage); }
  DEVICE u32 value_full(int stage) const { return key_full(2 * STAGES + stage); }
  DEVICE u32 value_empty(int stage) const { return key_full(3 * STAGES + stage); }
  DEVICE u32 query_full(int warpgroup) const { return key_full(4 * STAGES + warpgroup); }
  DEVICE u32 query_empty(int warpgroup) const { return key_full(4 * STAGES + WARPGROUPS + warpgroup); }
};

DEVICE void produce(const Int8Params& p, const Shared& shared) {
  Ring keys, values;
  u32 query_parities = ~0u;  // a bit for each warpgroup
  Schedule schedule(p);
  Tile tile;
  while (schedule.advance(tile)) {
    const u8* query = p.query_codes + (i64(tile.batch * p.heads + tile.head) * p.query_rows + tile.row) * HEAD_DIM;
    const u8* key = p.key_codes + i64(tile.kv_head) * p.key_blocks * kTileBytes;
    const u8* value = p.value_codes + i64(tile.kv_head) * p.key_blocks * kTileBytes;
    for (int block = 0; block <= tile.key_blocks; ++block) {
      if (block < tile.key_blocks) {
        mbarrier_wait(shared.key_empty(keys.stage), keys.parity ^ 1);
        mbarrier_arrive_expect_bytes(shared.key_full(keys.stage), kTileBytes);
        bulk_load(shared.key(keys.stage), key + i64(block) * kTileBytes, kTileBytes, shared.key_full(keys.stage));
        keys.advance();
      }
      if (block == 0) {
        for (int warpgroup = 0; warpgroup < tile.units; ++warpgroup) {
          mbarrier_wait(shared.query_empty(warpgroup), query_parities >> warpgroup & 1);
          query_parities ^= 1 << warpgroup;
          mbarrier_arrive_expect_bytes(shared.query_full(warpgroup), kQueryBytes);
          bulk_load(shared.query(warpgroup), query + warpgroup * kQueryBytes, kQueryBytes,
                    shared.query_full(warpgroup));
        }
      } else {
        mbarrier_wait(shared.value_empty(values.stage), values.parity ^ 1);
        mbarrier_arrive_expect_bytes(shared.value_full(values.stage), kTileBytes);
        bulk_load(shared.value(values.stage), value + i64(block - 1) * kTileBytes, kTileBytes,
                  shared.value_full(values.stage));
        values.advance();
      }
    }
  }
}

// One warpgroup's 64 rows. A thread holds rows lane / 4 and lane / 4 + 8 of its warp's 16: index 0 and 1 of the pairs.
struct Consumer {
  const Int8Params& p;
  const Shared& shared;
  int warpgroup, warp, lane;
  u32 parked;
  Ring keys, values;
  u32 query_parity = 0;
  u32 scores[kScores];
  u32 weights[kScores / 4];
  float output[kColumns];
#if PROMOTE && !PARK
  float partial[kColumns];
#endif
  float maximum[2], row_sum[2], rescale[2], query_scale[2];
  float factor[2], offset[2], line_factor[2], line_offset[2];
  bool grown;

  DEVICE Consumer(const Int8Params& p, const Shared& shared)
      : p(p),
        shared(shared),
        warpgroup(__shfl_sync(~0u, threadIdx.x / 128 - 1, 0)),
        warp(threadIdx.x / 32 % 4),
        lane(threadIdx.x % 32),
        parked(shared.parked(threadIdx.x - 128)) {}

  DEVICE int thread_row() const { return warpgroup * 64 + warp * 16 + lane / 4; }

  DEVICE void release(u32 barrier) {
    if (lane == 0) mbarrier_arrive(barrier);
  }

  DEVICE void wait_key() { mbarrier_wait(shared.key_full(keys.stage), keys.parity); }

  // Volatile, so that it comes before the turn with the tensor cores begins.
  DEVICE void start_scores() {
#pragma unroll
    for (int i = 0; i < kScores; ++i) asm volatile("mov.u32 %0, %1;" : "=r"(scores[i]) : "n"(kMagicBits));
  }

  DEVICE void issue_qk() {
    const u64 query = matrix_descriptor<HEAD_DIM>(shared.query(warpgroup));
    const u64 key = matrix_descriptor<HEAD_DIM>(shared.key(keys.stage));
    wgmma_fence(scores);
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 32; ++step) wgmma_qk(scores, query + step * 2, key + step * 2);
    wgmma_commit();
  }

  DEVICE void issue_pv(int block) {
    mbarrier_wait(shared.value_full(values.stage), values.parity);
    constexpr int kStepsPerRow = kValueRowBytes / 32;  // then the next slab of HEAD_DIM rows
    const u64 value = matrix_descriptor<kValueRowBytes>(shared.value(values.stage));
#if PROMOTE && !PARK
    float (&target)[kColumns] = partial;
#else
    float (&target)[kColumns] = output;
#endif
    const bool starts = PROMOTE && block % max(PROMOTE, 1) == 0;
    wgmma_fence(target);
#pragma unroll
    for (int step = 0; step < KEYS / 32; ++step) {
      const int offset = step / kStepsPerRow * (kValueRowBytes * HEAD_DIM / 16) + step % kStepsPerRow * 2;
      wgmma_pv(target, weights + 4 * step, value + offset, !starts || step > 0);
    }
    wgmma_commit();
  }

  // Keys beyond the end, and beyond the diagonal where causal, become -inf.
  DEVICE void mask_scores(int first_key, int row, int key_length) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const int key = first_key + i / 4 * 8 + lane % 4 * 2 + i % 2;
      const int limit = p.is_causal ? min(key_length, row + (i / 2 % 2) * 8 + 1) : key_length;
      if (key >= limit) scores[i] = 0xFF800000;
    }
  }

  // The running maximum, and what the exponents of this block's scores are. Where it grew, as it seldom does, O must be
  // rescaled.
  DEVICE void start_softmax(float key_scale) {
    // Bits of positive floats, and -inf, order as integers do, for which there is a three-input maximum.
    constexpr int kChains = 2;  // a row, so that one need not wait for the other
    int largest[2][kChains];
#pragma unroll
    for (int i = 0; i < kScores; i += 4) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int a = scores[i + 2 * r], b = scores[i + 2 * r + 1];
        int& chain = largest[r][i / 4 % kChains];
        chain = i < 4 * kChains ? max(a, b) : max(max(chain, a), b);
      }
    }
    bool grows = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      largest[r][0] = max(largest[r][0], largest[r][1]);
      factor[r] = query_scale[r] * key_scale;
      if (factor[r] < 1e-35f) factor[r] = 1e-35f;  // keeps 0 * -inf away; a NaN passes
      grows |= !(to_exponent(largest[r][0], r) <= maximum[r] + HEADROOM);
    }
    grown = __any_sync(~0u, grows);
    if (grown) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        int row_largest = max(largest[r][0], __shfl_xor_sync(~0u, largest[r][0], 1));
        row_largest = max(row_largest, __shfl_xor_sync(~0u, row_largest, 2));
        const float previous = maximum[r];
        const float scaled = to_exponent(row_largest, r);
        maximum[r] = scaled <= previous + HEADROOM ? previous : scaled;
        rescale[r] = exp2_approx(previous - (maximum[r] == -infinity() ? 0.f : maximum[r]));
        if (!ONES) row_sum[r] *= rescale[r];
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float shift = maximum[r] == -infinity() ? 0.f : maximum[r];
      offset[r] = fmaf(-kMagic, factor[r], kLog2Stretch - shift);
      line_factor[r] = factor[r] * kLineUnits;
      line_offset[r] = fmaf(offset[r], kLineUnits, kLineShift);
    }
  }

  DEVICE float to_exponent(int score, int r) const { return (__int_as_float(score) - kMagic) * factor[r]; }

  // Scores to weights in place: floats, or pairs of codes.
  template <int kBegin, int kEnd>
  DEVICE void exponentials() {
#pragma unroll
    for (int i = kBegin; i < kEnd; ++i) {
      const int r = i / 2 % 2;
      const float score = __uint_as_float(scores[i]);
      if (on_line(i)) {
        if (i % 2 == 0) continue;
        scores[i - 1] = pack_integers(fmaf(__uint_as_float(scores[i - 1]), line_factor[r], line_offset[r]),
                                      fmaf(score, line_factor[r], line_offset[r]));
      } else {
        const float weight = exp2_approx(fmaf(score, factor[r], offset[r]));
        if (!ONES) row_sum[r] += weight;
        scores[i] = __float_as_uint(weight);
      }
    }
  }

  // Whether a score's weight comes from the line: all 16 keys of a packed word's row do, or none.
  static DEVICE constexpr bool on_line(int i) { return i / 8 * LINE % 8 + LINE >= 8; }

  // S's accumulator layout is P's operand layout up to an order of keys that V's tiles have.
  DEVICE void pack_weights() {
#pragma unroll
    for (int i = 0; i < kScores; i += 16) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const u32* s = scores + i + 2 * r;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const u32* t = s + 8 * half;
          weights[i / 4 + r + 2 * half] = on_line(i + 8 * half)
                                              ? __byte_perm(t[0], t[4], 0x6420)
                                              : pack_e4m3(__uint_as_float(t[0]), __uint_as_float(t[1]),
                                                          __uint_as_float(t[4]), __uint_as_float(t[5]));
        }
      }
    }
  }

  DEVICE void finish_pv() {
#if PROMOTE && !PARK
    wgmma_wait<0>(partial);
#else
    wgmma_wait<0>(output);
#endif
    release(shared.value_empty(values.stage));
    values.advance();
  }

  // All columns of ones have the same sums.
  static DEVICE constexpr bool is_used(int i) { return i < kOutputs || i % 2 == 0; }

  // Adds up in float32 what P V has accumulated, which then starts at zero.
  DEVICE void promote() {
#if PARK
#pragma unroll
    for (int i = 0; i < kColumns; i += 4) {
      float4 sum = load_shared(parked + 512 * i);
      sum.x += output[i], sum.y += output[i + 1], sum.z += output[i + 2], sum.w += output[i + 3];
      store_shared(parked + 512 * i, sum);
    }
#elif PROMOTE
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
      if (is_used(i)) output[i] += partial[i];
#endif
  }

  DEVICE void clear_sums() {
#if PARK
#pragma unroll
    for (int i = 0; i < kColumns; i += 4) store_shared(parked + 512 * i, make_float4(0.f, 0.f, 0.f, 0.f));
#endif
#pragma unroll
    for (int i = 0; i < kColumns; ++i) output[i] = 0.f;
  }

  // The last promotion, to registers.
  DEVICE void finish_sums() {
#if PARK
#pragma unroll
    for (int i = 0; i < kColumns; i += 4) {
      const float4 sum = load_shared(parked + 512 * i);
      output[i] += sum.x, output[i + 1] += sum.y, output[i + 2] += sum.z, output[i + 3] += sum.w;
    }
#else
    promote();
#endif
  }

  DEVICE void rescale_sums() {
#if PARK
#pragma unroll
    for (int i = 0; i < kColumns; i += 4) {
      float4 sum = load_shared(parked + 512 * i);
      sum.x *= rescale[0], sum.y *= rescale[0], sum.z *= rescale[1], sum.w *= rescale[1];
      store_shared(parked + 512 * i, sum);
    }
#endif
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (is_used(i)) output[i] *= rescale[i / 2 % 2];
#if PROMOTE && !PARK
      partial[i] *= rescale[i / 2 % 2];
#endif
    }
  }

  // A warpgroup without rows lets the others go on.
  DEVICE void skip(const Tile& tile) {
    for (int block = 0; block < tile.key_blocks; ++block) {
      if (PINGPONG && block > 0) {
        named_barrier_sync(1 + warpgroup, 256);
        named_barrier_arrive(1 + (warpgroup + 1) % WARPGROUPS, 256);
      }
      wait_key();
      release(shared.key_empty(keys.stage));
      keys.advance();
      mbarrier_wait(shared.value_full(values.stage), values.parity);
      release(shared.value_empty(values.stage));
      values.advance();
    }
  }

  DEVICE void run(const Tile& tile) {
    const int row = tile.row + thread_row();
    const i64 query_row = i64(tile.batch * p.heads + tile.head) * p.query_rows + row;
    const float* key_scales = p.key_scale + i64(tile.kv_head) * p.key_blocks;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      query_scale[r] = p.query_scale[query_row + 8 * r];
      maximum[r] = -infinity();
      row_sum[r] = 0.f;
    }
    clear_sums();
    mbarrier_wait(shared.query_full(warpgroup), query_parity);
    if (tile.key_blocks > 0) {
      const int unmasked = (p.is_causal ? min(tile.key_length, tile.row + warpgroup * 64 + 1) : tile.key_length) / KEYS;
      float key_scale = key_scales[0];
      wait_key();
      start_scores();
      issue_qk();
      wgmma_wait<0>(scores);
      release(shared.key_empty(keys.stage));
      keys.advance();
      if (unmasked == 0) mask_scores(0, row, tile.key_length);
      start_softmax(key_scale);
      exponentials<0, kScores>();
      pack_weights();
      start_scores();
      if (tile.key_blocks > 1) wait_key();
      for (int block = 1; block < tile.key_blocks; ++block) {
        key_scale = key_scales[block];
        if (PINGPONG) named_barrier_sync(1 + warpgroup, 256);
        issue_qk();
        issue_pv(block - 1);
        if (PINGPONG) named_barrier_arrive(1 + (warpgroup + 1) % WARPGROUPS, 256);
        wgmma_wait<1>(scores);
        release(shared.key_empty(keys.stage));
        keys.advance();
        if (block >= unmasked) mask_scores(block * KEYS, row, tile.key_length);
        start_softmax(key_scale);
        exponentials<0, kEarly>();
        // Here, so that a branch keeps the wait for P V behind the exponentials, where the assembler would hoist it.
        if (block + 1 < tile.key_blocks) wait_key();
        finish_pv();
        if (PROMOTE && block % max(PROMOTE, 1) == 0) promote();
        if (grown) rescale_sums();
        exponentials<kEarly, kScores>();
        pack_weights();
        start_scores();
      }
      issue_pv(tile.key_blocks - 1);
      finish_pv();
      finish_sums();
    }
    release(shared.query_empty(warpgroup));
    query_parity ^= 1;
    store(tile, row);
  }

  // Divides by the row sum, undoes V's scale and mean, stores 8 channels at a time: V's tiles order channels so that a
  // thread's columns 4J..4J+3 are the 8 channels from 32 J + 8 (lane % 4).
  DEVICE void store(const Tile& tile, int row) {
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (ONES) {
        row_sum[r] = output[kColumns - 4 + 2 * r];
      } else {
        row_sum[r] += __shfl_xor_sync(~0u, row_sum[r], 1);
        row_sum[r] += __shfl_xor_sync(~0u, row_sum[r], 2);
      }
      inverse[r] = row_sum[r] == 0.f ? 0.f : reciprocal_approx(row_sum[r]);
      const int query = row + 8 * r;
      if (p.lse && lane % 4 == 0 && query < p.query_length) {
        const i64 batch_head = i64(tile.batch) * p.heads + tile.head;
        const float lse = 0.6931471806f * (maximum[r] + log2_approx(row_sum[r]) - kLog2Stretch);
        p.lse[batch_head * p.query_length + query] = lse + p.lse_shift[batch_head * p.query_rows + query];
      }
    }
    const float per_key = 1.f / (16.f * max(1, tile.key_length));
#pragma unroll
    for (int group = 0; group < HEAD_DIM / 32; ++group) {
      const int channel = 32 * group + 8 * (lane % 4);
      if (channel >= p.head_dim) continue;
      float scale[8], mean[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const int at = tile.kv_head * HEAD_DIM + channel + c;
        scale[c] = p.value_scale[at];
        mean[c] = fmaf(float(p.value_error[at]) * per_key, scale[c], p.value_mean[at]);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (row + 8 * r >= p.query_length) continue;
        const bool empty = row_sum[r] == 0.f;
        u32 packed[4];
#pragma unroll
        for (int c = 0; c < 8; c += 2) {
          const float* o = output + 16 * group + 2 * c + 2 * r;
          const float low = empty ? 0.f : fmaf(o[0] * inverse[r], scale[c], mean[c]);
          const float high = empty ? 0.f : fmaf(o[1] * inverse[r], scale[c + 1], mean[c + 1]);
          packed[c / 2] = p.is_bfloat16 ? pack_bfloat16(low, high) : pack_float16(low, high);
        }
        const i64 at = tile.batch * p.output_strides[0] + tile.head * p.output_strides[1] +
                       (row + 8 * r) * p.output_strides[2] + channel;
        *reinterpret_cast<uint4*>(static_cast<u16*>(p.output) + at) =
            make_uint4(packed[0], packed[1], packed[2], packed[3]);
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1) int8_sm90_attention(const __grid_constant__ Int8Params p) {
  extern __shared__ __align__(1024) u8 memory[];
  const Shared shared{shared_address(memory)};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      mbarrier_init(shared.key_full(stage), 1);
      mbarrier_init(shared.value_full(stage), 1);
      mbarrier_init(shared.key_empty(stage), 4 * WARPGROUPS);  // one arrival a warp
      mbarrier_init(shared.value_empty(stage), 4 * WARPGROUPS);
    }
    for (int warpgroup = 0; warpgroup < WARPGROUPS; ++warpgroup) {
      mbarrier_init(shared.query_full(warpgroup), 1);
      mbarrier_init(shared.query_empty(warpgroup), 4);
    }
    mbarrier_init_fence();
  }
  if (ONES) {
    constexpr u32 kFourOnes = 0x38383838;  // E4M3
    for (int i = threadIdx.x; i < STAGES * kOnesBytes / 4; i += kThreads) {
      u8* ones = memory + Shared::kValue + i / 256 * (kTileBytes + kOnesBytes) + kTileBytes;
      reinterpret_cast<u32*>(ones)[i % 256] = kFourOnes;
    }
    shared_stores_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    shrink_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce(p, shared);
  } else {
    grow_registers<kConsumerRegisters>();
    Consumer consumer(p, shared);
    if (PINGPONG && consumer.warpgroup == WARPGROUPS - 1) named_barrier_arrive(1, 256);
    Schedule schedule(p);
    Tile tile;
    while (schedule.advance(tile)) {
      if (consumer.warpgroup < tile.units)
        consumer.run(tile);
      else
        consumer.skip(tile);
    }
  }
}
