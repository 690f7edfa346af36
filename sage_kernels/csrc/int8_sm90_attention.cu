// Attention with INT8 Q K^T and FP8 P V for sm_90a: wgmma in two flavours, operands pre-tiled by int8_sm90_prepare.cu.
//
// One producer warp copies K and V tiles into a ring; each consumer warpgroup owns 64 query rows and keeps two wgmma
// groups in flight: Q K^T of the next key block and P V of the current one, under which it computes the softmax.
// S accumulates on top of 0x4B400000, so that its bits are the float 12582912 + S and need no conversion.
//
// Compile-time: HEAD_DIM 64 | 128 (smaller ones padded), KEYS per block, STAGES of the ring, WARPGROUPS of consumers
// and PINGPONG: two of them take turns with the tensor cores. PROMOTE: FP8 wgmma accumulates with about 14 bits, so
// that P V of this many key blocks starts at zero and is added in float32; 0 never does. ONES: the row sum comes from 8
// columns of ones beside V, rather than from additions. PARK: the float32 sums wait in shared memory for the next
// promotion. HEADROOM: O is rescaled only when the row maximum has grown by more than this many powers of two. LINE: of
// every eight words of weights, how many come from a straight line between powers of two in place of the exponential;
// that needs ONES. SPLIT: eighths of the weights that are computed before P V is waited for; 0 for all. SHARE: where a
// thread block has 64 rows left for the end, all warpgroups work on them.
#include "int8_sm90_softmax.cuh"

// One warpgroup's 64 rows.
struct Consumer : Softmax {
  const Shared& shared;
  int warpgroup, warp;
  u32 parked;
  Ring keys, values;
  int shared_step = 1;
  u32 query_parity = 0;
  float output[kColumns];
#if PROMOTE && !PARK
  float partial[kColumns];
#endif

  DEVICE Consumer(const Int8Params& p, const Shared& shared)
      : Softmax(p),
        shared(shared),
        warpgroup(__shfl_sync(~0u, threadIdx.x / 128 - 1, 0)),
        warp(threadIdx.x / 32 % 4),
        parked(shared.parked(threadIdx.x - 128)) {}

  // Key blocks from one of this warpgroup's to the next; the others' arrivals are made in their stead.
  DEVICE int step() const { return SHARE ? shared_step : 1; }

  // Every lane for itself: racecheck doesn't see that __syncwarp puts the others' reads before one lane's arrival.
  DEVICE void release(u32 barrier) { mbarrier_arrive(barrier, step()); }

  DEVICE void wait_key() { mbarrier_wait(shared.key_full(keys.stage), keys.parity); }

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
    pin_registers(weights);
    wgmma_fence(target);
#pragma unroll
    for (int step = 0; step < KEYS / 32; ++step) {
      const int offset = step / kStepsPerRow * (kValueRowBytes * HEAD_DIM / 16) + step % kStepsPerRow * 2;
      wgmma_pv(target, weights + 4 * step, value + offset, !starts || step > 0);
    }
    wgmma_commit();
  }

  DEVICE void finish_pv() {
#if PROMOTE && !PARK
    wgmma_wait<0>(partial);
#else
    wgmma_wait<0>(output);
#endif
    pin_registers(weights);
    release(shared.value_empty(values.stage));
    values.advance(step());
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

  // Blocks are counted as this warpgroup meets them.
  DEVICE void run(const Tile& tile) {
    const int first = tile.is_shared ? warpgroup : 0, unit = warpgroup - first;
    if (tile.is_shared) {
      shared_step = WARPGROUPS;
      keys.advance(first);
      values.advance(first);
    }
    const int row = tile.row + (unit * 64 + warp * 16 + lane / 4);
    // Addresses and what a tile needs once are computed anew: held, they'd be spilled.
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      query_scale[r] = p.query_scale[i64(tile.batch * p.heads + tile.head) * p.query_rows + row + 8 * r];
      maximum[r] = -infinity();
      row_sum[r] = 0.f;
    }
    clear_sums();
    mbarrier_wait(shared.query_full(warpgroup), query_parity);
    if (tile.key_blocks > 0) {
      // Causal attention shares no units.
      const int seen = p.is_causal ? min(tile.key_length, tile.row + warpgroup * 64 + 1) : tile.key_length;
      const int blocks = ceil_div(tile.key_blocks - first, step()), unmasked = ceil_div(seen / KEYS - first, step());
      float key_scale = p.key_scale[tile.kv_head * p.key_blocks + first];
      wait_key();
      start_scores();
      issue_qk();
      wgmma_wait<0>(scores);
      release(shared.key_empty(keys.stage));
      keys.advance(step());
      if (unmasked == 0) mask_scores(first * KEYS, row, tile.key_length);
      start_softmax(key_scale);
      exponentials<0, kScores>();
      pack_weights();
      start_scores();
      if (blocks > 1) wait_key();
      for (int block = 1; block < blocks; ++block) {
        key_scale = p.key_scale[tile.kv_head * p.key_blocks + first + block * step()];
        if (PINGPONG) named_barrier_sync(1 + warpgroup, 256);
        issue_qk();
        issue_pv(block - 1);
        if (PINGPONG) named_barrier_arrive(1 + (warpgroup + 1) % WARPGROUPS, 256);
        wgmma_wait<1>(scores);
        release(shared.key_empty(keys.stage));
        keys.advance(step());
        if (block >= unmasked) mask_scores((first + block * step()) * KEYS, row, tile.key_length);
        start_softmax(key_scale);
        exponentials<0, kEarly>();
        // Here, so that a branch keeps the wait for P V behind the exponentials, where the assembler would hoist it.
        if (block + 1 < blocks) wait_key();
        finish_pv();
        if (PROMOTE && block % max(PROMOTE, 1) == 0) promote();
        if (grown) rescale_sums();
        exponentials<kEarly, kScores>();
        pack_weights();
        start_scores();
      }
      issue_pv(blocks - 1);
      finish_pv();
      finish_sums();
    }
    mbarrier_arrive(shared.query_empty(warpgroup));
    query_parity ^= 1;
    if (tile.is_shared) merge();
    if (!tile.is_shared || warpgroup == 0) store(tile, row);
  }

  // Of a shared unit, the last of this thread block: the first warpgroup gets the sums of all.
  DEVICE void merge() {
    const int thread = threadIdx.x;
    named_barrier_sync(1 + WARPGROUPS, 128 * WARPGROUPS);  // nobody reads the ring of K any more
    if (warpgroup > 0) {
#pragma unroll
      for (int i = 0; i < kColumns; i += 4)
        store_shared(shared.part(warpgroup, i / 4, thread),
                     make_float4(output[i], output[i + 1], output[i + 2], output[i + 3]));
      store_shared(shared.part(warpgroup, kColumns / 4, thread),
                   make_float4(maximum[0], maximum[1], row_sum[0], row_sum[1]));
    }
    named_barrier_sync(1 + WARPGROUPS, 128 * WARPGROUPS);
    if (warpgroup > 0) return;
#pragma unroll 1
    for (int other = 1; other < WARPGROUPS; ++other) {
      const float4 state = load_shared(shared.part(other, kColumns / 4, thread));
      const float theirs[2] = {state.x, state.y}, their_sum[2] = {state.z, state.w};
      float their_rescale[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float larger = fmaxf(maximum[r], theirs[r]), shift = larger == -infinity() ? 0.f : larger;
        rescale[r] = exp2_approx(maximum[r] - shift);
        their_rescale[r] = exp2_approx(theirs[r] - shift);
        row_sum[r] = row_sum[r] * rescale[r] + their_sum[r] * their_rescale[r];
        maximum[r] = larger;
      }
#pragma unroll
      for (int i = 0; i < kColumns; i += 4) {
        const float4 sum = load_shared(shared.part(other, i / 4, thread));
        output[i] = fmaf(sum.x, their_rescale[0], output[i] * rescale[0]);
        output[i + 1] = fmaf(sum.y, their_rescale[0], output[i + 1] * rescale[0]);
        output[i + 2] = fmaf(sum.z, their_rescale[1], output[i + 2] * rescale[1]);
        output[i + 3] = fmaf(sum.w, their_rescale[1], output[i + 3] * rescale[1]);
      }
    }
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
      mbarrier_init(shared.key_empty(stage), 128 * WARPGROUPS);
      mbarrier_init(shared.value_empty(stage), 128 * WARPGROUPS);
    }
    for (int warpgroup = 0; warpgroup < WARPGROUPS; ++warpgroup) {
      mbarrier_init(shared.query_full(warpgroup), 1);
      mbarrier_init(shared.query_empty(warpgroup), 128);
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
      if (tile.is_shared || consumer.warpgroup < tile.units)
        consumer.run(tile);
      else
        consumer.skip(tile);
    }
  }
}
