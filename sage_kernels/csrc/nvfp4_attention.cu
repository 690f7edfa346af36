// SageAttention3's attention (algorithm 1, lines 4 to 16) on packed NVFP4 operands.
//
// A thread block owns 256 query rows: eight consumer warps of 32 rows each. Four correction warps, one on each quadrant
// of the multiprocessor, load the key/value tiles (one bulk copy each), and multiply the eight means of the query
// blocks with both digits of K: delta_s, the start value of the consumers' accumulators, never leaves shared memory.
//
// With QK_FP8, Q and K are MXFP8, and delta_s is only what rounding K to it takes from the mean queries' scores.
#include "nvfp4_rows.cuh"

// Walks over all tiles of all items of this thread block, some tiles ahead of the correction.
struct Loader {
  u32 index, tile, issued;
  Item item;
  Pipeline pipeline;

  __device__ __forceinline__ void start(const Parameters& p) {
    index = blockIdx.x, tile = 0, issued = 0;
    if (index < item_count(p)) item = get_item(p, index);
    find(p);
  }
  __device__ __forceinline__ bool done(const Parameters& p) const { return index >= item_count(p); }
  // The next tile that isn't skipped, from `tile` on.
  __device__ __forceinline__ void find(const Parameters& p) {
    while (!done(p)) {
      while (tile < item.tiles && is_skipped(item, tile)) ++tile;
      if (tile < item.tiles) return;
      index += gridDim.x, tile = 0;
      if (!done(p)) item = get_item(p, index);
    }
  }
  __device__ __forceinline__ bool has_room() const { return barrier_test(pipeline.empty(), pipeline.phase() ^ 1); }
  __device__ __forceinline__ void issue(const Parameters& p) {
    u32 barrier = pipeline.full();
    barrier_expect_bytes(barrier, TILE_BYTES);
    bulk_copy(pipeline.stage, p.keys_values + (i64(item.kv_head) * p.key_tiles + tile) * TILE_BYTES, TILE_BYTES,
              barrier);
    pipeline.advance();
    ++tile, ++issued;
    find(p);
  }
};

// delta_s of two n-tiles: (means of the eight query blocks) x (16 keys), against K's digits in NVFP4.
__device__ __forceinline__ void correct_tile(u32 stage, const u32 (&mean)[K_STEPS][4], u32 mean_scale, u32 warp,
                                             u32 lane) {
  constexpr u32 WORDS = 2 * K_STEPS;  // scale words of two n-tiles, one a lane of the quad
  u32 word = WORDS * warp + (lane & (WORDS - 1));
  u32 scale_offset = ((lane & ~3u) + (word & 3)) * (WORDS * 4) + (word >> 2) * 4;
  float delta[2][4] = {};
#pragma unroll
  for (u32 digit = 0; digit < DIGITS; ++digit) {
    u32 key = stage + DIGIT_OFFSET + digit * DIGIT_BYTES, scale = load_shared_4<DIGIT_CODE_BYTES>(key + scale_offset);
    u32 codes[2 * K_STEPS * 2];
#pragma unroll
    for (u32 chunk = 0; chunk < K_STEPS; ++chunk) {
      uint4 four = load_shared_16<0>(key + ((warp * K_STEPS + chunk) * WARP + lane) * 16);
      codes[4 * chunk] = four.x, codes[4 * chunk + 1] = four.y, codes[4 * chunk + 2] = four.z,
                codes[4 * chunk + 3] = four.w;
    }
    mma_nvfp4<0, 0>(delta[0], mean[0], codes[0], codes[1], delta[0], mean_scale, scale);
    if constexpr (K_STEPS == 2) {
      mma_nvfp4<1, 1>(delta[0], mean[1], codes[2], codes[3], delta[0], mean_scale, scale);
      mma_nvfp4<0, 2>(delta[1], mean[0], codes[4], codes[5], delta[1], mean_scale, scale);
      mma_nvfp4<1, 3>(delta[1], mean[1], codes[6], codes[7], delta[1], mean_scale, scale);
    } else {
      mma_nvfp4<0, 1>(delta[1], mean[0], codes[2], codes[3], delta[1], mean_scale, scale);
    }
  }
#pragma unroll
  for (u32 n = 0; n < 2; ++n)
    store_shared_16(stage + TILE_BYTES + ((2 * warp + n) * WARP + lane) * 16, delta[n][0], delta[n][1], delta[n][0],
                    delta[n][1]);
}

__device__ __forceinline__ void correct(const Parameters& p, u32 warp, u32 lane) {
  bool loads = warp == 0 && lane == 0;
  Loader loader;
  if (loads) loader.start(p);
  Pipeline pipeline;
  u32 corrected = 0;
  for (u32 index = blockIdx.x; index < item_count(p); index += gridDim.x) {
    Item item = get_item(p, index);
    const u8* image =
        p.means + ((i64(item.batch) * p.heads + item.head) * p.query_tiles + item.query_tile) * MEAN_BYTES;
    u32 mean[K_STEPS][4];
#pragma unroll
    for (u32 step = 0; step < K_STEPS; ++step) {
      uint2 codes = *reinterpret_cast<const uint2*>(image + (step * WARP + lane) * 8);
      mean[step][0] = codes.x, mean[step][1] = 0, mean[step][2] = codes.y, mean[step][3] = 0;
    }
    u32 mean_scale = *reinterpret_cast<const u32*>(image + MEAN_CODE_BYTES + lane * 4);
    for (u32 tile = 0; tile < item.tiles; ++tile) {
      if (is_skipped(item, tile)) continue;
      if (loads) {
        while (!loader.done(p) && (loader.issued <= corrected || loader.has_room())) {
          if (loader.issued <= corrected) barrier_wait(loader.pipeline.empty(), loader.pipeline.phase() ^ 1);
          loader.issue(p);
        }
      }
      __syncwarp();
      barrier_wait(pipeline.full(), pipeline.phase());
      correct_tile(pipeline.stage, mean, mean_scale, warp, lane);
      barrier_arrive(pipeline.corrected());
      pipeline.advance();
      ++corrected;
    }
  }
}

__device__ __forceinline__ void start_rows(const Parameters& p, const Item& item, Rows& rows, u32 block, u32 lane) {
  i64 index = ((i64(item.batch) * p.heads + item.head) * p.query_tiles + item.query_tile) * BLOCKS + block;
  const u8* image = p.queries + index * QUERY_BYTES;
#pragma unroll
  for (u32 m = 0; m < 2; ++m) {
#pragma unroll
    for (u32 step = 0; step < QK_STEPS; ++step) {
      uint4 four = *reinterpret_cast<const uint4*>(image + ((m * QK_STEPS + step) * WARP + lane) * 16);
      if (step < HELD_STEPS)
        rows.query[m][step][0] = four.x, rows.query[m][step][1] = four.y, rows.query[m][step][2] = four.z,
        rows.query[m][step][3] = four.w;
      else  // read again by the lane that writes them
        store_shared_16(parked_address(threadIdx.x) + ((step - HELD_STEPS) * 2 + m) * WARP * 16, four);
    }
    rows.query_scale[m] = *reinterpret_cast<const u32*>(image + QUERY_CODE_BYTES + (m * WARP + lane) * 4);
    rows.shift[m] = LOG2_STRETCH - NO_MAXIMUM;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) rows.sum[m][i] = 0.0f;
#pragma unroll
    for (u32 n = 0; n < VALUE_COLUMNS; ++n)
#pragma unroll
      for (u32 i = 0; i < 4; ++i) rows.output[m][n][i] = 0.0f;
  }
  // Not zero, as for a scale of zero: scores of -inf must stay so.
  rows.factor = fmaxf(p.query_factors[index] * p.key_factors[item.kv_head] * p.scale_log2e, 1.0e-35f);
}

__device__ __forceinline__ void store_rows(const Parameters& p, const Item& item, Rows& rows, u32 block, u32 lane) {
  const float* means = p.value_means + i64(item.kv_head) * HEAD_DIM;
  float value_factor = p.value_factors[item.kv_head];
  i64 head_index = i64(item.batch) * p.heads + item.head;
#pragma unroll
  for (u32 m = 0; m < 2; ++m) {
    float shifts[2];
    share_with_pair(rows.shift[m], lane, shifts[0], shifts[1]);
#pragma unroll
    for (u32 row_half = 0; row_half < 2; ++row_half) {
      u32 row = item.query_tile * QUERY_TILE + block * QUERY_BLOCK + 16 * m + 8 * row_half + (lane >> 2);
      if (int(row) >= p.query_length) continue;
      float sum = rows.sum[m][2 * row_half];
      bool seen = sum != 0.0f;  // rows that may see nothing give zeros
      float factor = seen ? divide_approx(value_factor, sum) : 0.0f;
      u16* out = static_cast<u16*>(p.output) + item.batch * p.output_strides[0] + item.head * p.output_strides[1] +
                 row * p.output_strides[2];
#pragma unroll
      for (u32 n = 0; n < VALUE_COLUMNS; ++n) {
        u32 column = 8 * n + 2 * (lane & 3);
        float low = fmaf(rows.output[m][n][2 * row_half], factor, seen ? means[column] : 0.0f);
        float high = fmaf(rows.output[m][n][2 * row_half + 1], factor, seen ? means[column + 1] : 0.0f);
        u32 pair = p.output_is_bf16 ? to_bf16x2(low, high) : to_f16x2(low, high);
        if (int(column) < p.head_dim) out[column] = u16(pair);
        if (int(column) + 1 < p.head_dim) out[column + 1] = u16(pair >> 16);
      }
      if (p.lse && (lane & 3) == 0) {
        float lse = (log2_approx(sum) - shifts[row_half]) * LN2;
        if (p.lse_shifts) lse += p.scale * p.lse_shifts[head_index * p.query_length + row];
        p.lse[head_index * p.query_length + row] = seen ? lse : -INFINITE;
      }
    }
  }
}

// Key tiles of a warp: up to `open` every row sees every key, up to `seen` some row sees some key.
struct TileRange {
  u32 open, seen;
};

__device__ __forceinline__ TileRange find_range(const Parameters& p, const Item& item, u32 block) {
  TileRange range = {MASK ? 0 : u32(item.keys) / KEY_TILE, item.tiles};
  if (p.causal) {
    u32 first_row = item.query_tile * QUERY_TILE + block * QUERY_BLOCK;
    range.open = min(range.open, (first_row + 1) / KEY_TILE);
    range.seen = min(range.seen, (first_row + QUERY_BLOCK - 1) / KEY_TILE + 1);
  }
  return range;
}

__device__ __forceinline__ void consume(const Parameters& p) {
  Pipeline pipeline;
  Rows rows;
  u32 fragments = keep(threadIdx.x % WARP * 16), lane = fragments / 16;
  u32 delta = keep((threadIdx.x / WARP - CORRECTION_WARPS) * 64 + (lane & 3) * 16);
  auto take_tile = [&](auto&& attend) {
    barrier_wait(pipeline.full(), pipeline.phase());
    barrier_wait(pipeline.corrected(), pipeline.phase());
    bool done = attend(StageView{pipeline.stage + fragments, pipeline.stage + fragments / 2, pipeline.stage + delta});
    if (done) {
      // Every lane, because racecheck doesn't see what __syncwarp orders before one lane's arrival. A condition that
      // always holds, because without one the compiler spills a word where there is a mask.
      if (lane < WARP) barrier_arrive(pipeline.empty());
      pipeline.advance();
    } else {
      pipeline.stay();
    }
    return done;
  };
  // The inner loop needs the registers: what describes the item is computed anew where it is used.
  for (u32 index = blockIdx.x; index < item_count(p); index += gridDim.x) {
    start_rows(p, get_item(p, index + keep(u32(0))), rows, delta / 64, lane);
    for (u32 open = find_range(p, get_item(p, index + keep(u32(0))), delta / 64).open; open;)
      open -= take_tile([&](const StageView& stage) {
        return attend_tile<false>(p, rows, stage, Position{}, pipeline.second_time(), lane);
      });
    // Tiles that need masking, and those that only other warps need.
    u32 tile = find_range(p, get_item(p, index + keep(u32(0))), delta / 64).open;
    while (tile < find_range(p, get_item(p, index + keep(u32(0))), delta / 64).seen) {
      if (!is_skipped(get_item(p, index + keep(u32(0))), tile) && !take_tile([&](const StageView& stage) {
            return attend_tile<true>(p, rows, stage, Position{index, delta / 64, tile}, pipeline.second_time(), lane);
          }))
        continue;
      ++tile;
    }
    for (; tile < get_item(p, index + keep(u32(0))).tiles; ++tile) take_tile([](const StageView&) { return true; });
    store_rows(p, get_item(p, index + keep(u32(0))), rows, delta / 64, lane);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) nvfp4_attention(const __grid_constant__ Parameters p) {
  if (threadIdx.x == 0) {
    for (Pipeline pipeline; pipeline.phase() == 0; pipeline.advance()) {
      barrier_init(pipeline.full(), 1);
      barrier_init(pipeline.corrected(), CORRECTION_WARPS * WARP);
      barrier_init(pipeline.empty(), BLOCKS * WARP);
    }
    barrier_init_fence();
  }
  __syncthreads();
  u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  if (warp < CORRECTION_WARPS) {
    if (!SAGE_EMULATE_FP4) lower_registers<CORRECTION_REGISTERS>();  // emulation calls functions, which keep no limit
    correct(p, warp, lane);
  } else {
    if (!SAGE_EMULATE_FP4) raise_registers<CONSUMER_REGISTERS>();
    consume(p);
  }
}
