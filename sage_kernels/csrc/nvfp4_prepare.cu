// Preparation of NVFP4 operands in two launches (SageAttention3, section 3.1 and algorithm 1, lines 1 to 3):
//   nvfp4_prepare_queries: Q smoothed by the mean of 32 rows and quantised; partial statistics of K and V.
//   nvfp4_prepare_keys_values: K and V smoothed and quantised, K in two digits; LSE shifts; which tiles a mask leaves
//   open.
// With QK_FP8, Q and K's first digit are MXFP8, and the mean stays in the rows: it corrects what that digit misses
// only.
#include "mxfp8_quantize.cuh"
#include "nvfp4_statistics.cuh"

constexpr u32 TILES_PER_BLOCK = 4;  // key tiles

__device__ __forceinline__ float absmax_of(const float (&x)[8]) {
  float absmax = 0.0f;
#pragma unroll
  for (u32 i = 0; i < 8; ++i) absmax = max_nan(absmax, fabsf(x[i]));
  return absmax;
}

// Codes, scale and rounded values of 8 neighbouring channels, half a group: the neighbouring lane holds the other half.
template <class... Values>
__device__ __forceinline__ u32 quantize_channels(const float (&x)[8], GroupScale& scale, Values&... values) {
  scale = group_scale(max_over_lanes(absmax_of(x), GROUP / 8));
  return quantize_elements(x, scale, values...);
}

__device__ __forceinline__ void copy_out(u8* to, const u8* from, u32 bytes) {
  for (u32 i = threadIdx.x * 16; i < bytes; i += THREADS * 16)
    *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(from + i);
}

// The same in MXFP8, a quarter of a group: four neighbouring lanes hold one.
__device__ __forceinline__ uint2 quantize_channels_fp8(const float (&x)[8], BlockScale& scale, float (&missed)[8]) {
  scale = block_scale(max_over_lanes(absmax_of(x), MXFP8_GROUP / 8));
  return quantize_elements(x, scale, missed);
}

// Stores the E8M0 scale of step `step` into a word with one byte a step; with two steps, the upper half is a copy.
__device__ __forceinline__ void store_step_scale(u8* word, u32 step, u32 code) {
  word[step] = u8(code);
  if (QK_STEPS == 2) word[step + 2] = u8(code);
}

struct QueryImages {
  alignas(16) u8 images[BLOCKS * QUERY_BYTES];
  alignas(16) u8 means[MEAN_BYTES];
};

// 256 query rows of one head: each warp smooths and quantises its block of 32. A lane takes 8 channels of every STEP-th
// row.
template <RowForm ROWS>
__device__ void quantize_queries(const Parameters& p, QueryImages& shared, u32 index) {
  constexpr u32 PIECES = CONTRACTION / 8, STEP = WARP / PIECES, JOBS = QUERY_BLOCK / STEP;
  u8 *images = shared.images, *mean_image = shared.means;
  u32 tile = index % p.query_tiles, head = index / p.query_tiles % p.heads, batch = index / p.query_tiles / p.heads;
  u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, piece = lane % PIECES, first_row = lane / PIECES;
  for (u32 i = threadIdx.x; i < MEAN_BYTES / 4; i += THREADS) reinterpret_cast<u32*>(mean_image)[i] = 0;
  __syncthreads();

  u32 first = tile * QUERY_TILE + warp * QUERY_BLOCK;
  u32 count = int(first) < p.query_length ? min(QUERY_BLOCK, p.query_length - first) : 0;
  u32 raw[JOBS][4];
  float sums[8] = {}, absmax = 0.0f;
  load_rows<ROWS, STEP, 8>(p, p.query, batch, head, first + first_row, p.query_length, piece * 8, raw);
#pragma unroll
  for (u32 job = 0; job < JOBS; ++job)
#pragma unroll
    for (u32 i = 0; i < 8; ++i) {
      float x = to_float<ROWS>(p, raw[job][i / 2] >> (16 * (i & 1)));
      sums[i] += x;
      absmax = max_nan(absmax, fabsf(x));
    }
#pragma unroll
  for (u32 job = 0; job < JOBS; ++job)  // else they would be kept as floats, in twice the registers
#pragma unroll
    for (u32 i = 0; i < 4; ++i) raw[job][i] = keep(raw[job][i]);
  float scale = power_of_two_scale(max_over_lanes(absmax, WARP)), signed_scale = scale * p.query_sign;

  u32 step = piece / 8, thread = piece % 4, half = piece / 4 % 2, group_index = piece / 2 % 4;
  GroupScale group;
  float means[8], rounded[8];
#pragma unroll
  for (u32 i = 0; i < 8; ++i) {
#pragma unroll
    for (u32 lanes = PIECES; lanes < WARP; lanes *= 2) sums[i] += __shfl_xor_sync(ALL_LANES, sums[i], lanes);
    means[i] = count ? sums[i] / float(count) * p.query_sign * scale : 0.0f;
  }
  u32 codes = quantize_channels(means, group, rounded);
  if (first_row == 0) {
    reinterpret_cast<u32*>(mean_image)[(step * WARP + 4 * warp + thread) * 2 + half] = codes;
    if (piece % 2 == 0) {
      u8* scales = mean_image + MEAN_CODE_BYTES + 4 * warp * 4 + group_index;
      scales[2 * step * 4] = u8(group.code);
      if (K_STEPS == 1) scales[2 * 4] = u8(group.code);
    }
  }
#pragma unroll
  for (u32 i = 0; i < 8; ++i) means[i] = QK_FP8 ? 0.0f : rounded[i] * group.value;

  u8* image = images + warp * QUERY_BYTES;
#pragma unroll
  for (u32 job = 0; job < JOBS; ++job) {
    u32 row = job * STEP + first_row, m = row / 16, g = row % 8, high = row / 8 % 2;
    float x[8];
#pragma unroll
    for (u32 i = 0; i < 8; ++i) {
      float q = to_float<ROWS>(p, raw[job][i / 2] >> (16 * (i & 1)));
      x[i] = ROWS != ANY_ROWS || row < count ? fmaf(q, signed_scale, -means[i]) : 0.0f;
    }
    u32* words = reinterpret_cast<u32*>(image);
    if constexpr (QK_FP8) {
      BlockScale block;
      float missed[8];
      uint2 two = quantize_channels_fp8(x, block, missed);
      u32 word = ((m * QK_STEPS + piece / 4) * WARP + 4 * g + piece * 2 % 4) * 4 + high + piece % 4 / 2 * 2;
      words[word] = two.x, words[word + 4] = two.y;
      if (piece % 4 < 2)
        store_step_scale(image + QUERY_CODE_BYTES + (m * WARP + 4 * g + high + piece % 4 * 2) * 4, piece / 4,
                         block.code);
    } else {
      words[((m * K_STEPS + step) * WARP + 4 * g + thread) * 4 + high + 2 * half] = quantize_channels(x, group);
      if (piece % 2 == 0) {
        u8* scales = image + QUERY_CODE_BYTES + (m * WARP + 4 * g + high) * 4 + group_index;
        scales[2 * step * 4] = u8(group.code);
        if (K_STEPS == 1) scales[2 * 4] = u8(group.code);
      }
    }
  }
  u32 item = (batch * p.heads + head) * p.query_tiles + tile;
  if (lane == 0) p.query_factors[item * BLOCKS + warp] = 1.0f / scale;
  __syncthreads();
  copy_out(p.queries + i64(item) * BLOCKS * QUERY_BYTES, images, BLOCKS * QUERY_BYTES);
  copy_out(p.means + i64(item) * MEAN_BYTES, mean_image, MEAN_BYTES);
}

extern "C" __global__ void __launch_bounds__(THREADS) nvfp4_prepare_queries(const __grid_constant__ Parameters p) {
  u32 statistics = u32(p.batch) * p.kv_heads * p.chunks * 2;
  __shared__ union {
    QueryImages queries;
    ChunkStatistics chunk;
  } shared;
  u32 index = blockIdx.x;
  if (index < statistics) {
    RowForm rows = rows_of(p, true);
    if (rows == BF16_ROWS) return collect_statistics<BF16_ROWS>(p, shared.chunk, index);
    if (rows == F16_ROWS) return collect_statistics<F16_ROWS>(p, shared.chunk, index);
    return collect_statistics<ANY_ROWS>(p, shared.chunk, index);
  }
  index -= statistics;
  RowForm rows = rows_of(p, int(index % p.query_tiles + 1) * int(QUERY_TILE) <= p.query_length);
  if (rows == BF16_ROWS) return quantize_queries<BF16_ROWS>(p, shared.queries, index);
  if (rows == F16_ROWS) return quantize_queries<F16_ROWS>(p, shared.queries, index);
  quantize_queries<ANY_ROWS>(p, shared.queries, index);
}

// 64 keys in two digits. A thread takes 8 channels of a key: one word of a B fragment, in MXFP8 two.
template <RowForm ROWS>
__device__ __forceinline__ void quantize_keys(const Parameters& p, const HeadStatistics& statistics, u8* image,
                                              u32 batch, u32 head, u32 tile, int keys) {
  constexpr u32 PIECES = CONTRACTION / 8, JOBS = KEY_TILE * PIECES / THREADS;
  float scale = statistics.scales[0];
  u32 piece = threadIdx.x % PIECES;
  u32 raw[JOBS][4];
  load_rows<ROWS, THREADS / PIECES, 8>(p, p.key, batch, head, tile * KEY_TILE + threadIdx.x / PIECES, keys, piece * 8,
                                       raw);
  float offsets[8];
#pragma unroll
  for (u32 i = 0; i < 8; ++i)
    offsets[i] = piece * 8 < HEAD_DIM ? -statistics.means[0][(piece * 8 + i) % HEAD_DIM] * scale : 0.0f;
#pragma unroll
  for (u32 job = 0; job < JOBS; ++job) {
    u32 key = (job * THREADS + threadIdx.x) / PIECES, token = tile * KEY_TILE + key;
    float x[1][8];
#pragma unroll
    for (u32 i = 0; i < 8; ++i) {
      float k = to_float<ROWS>(p, raw[job][i / 2] >> (16 * (i & 1)));
      x[0][i] = ROWS != ANY_ROWS || int(token) < keys ? fmaf(k, scale, offsets[i]) : 0.0f;
    }
    u32 step = piece / 8, within = piece % 8;
    u32 in_half = key % 32, n = key / 32 * 4 + in_half % 8 / 2, g = in_half / 8 * 2 + in_half % 2;
    u32 word = (n * K_STEPS + step) * 2 + within / 4, scale_word = n * K_STEPS + step;
    u32 code_offset = ((word / 4 * WARP + 4 * g + within % 4) * 4 + word % 4) * 4;
    u32 scale_offset = DIGIT_CODE_BYTES + ((4 * g + scale_word % 4) * (2 * K_STEPS) + scale_word / 4) * 4 + within / 2;
    float missed[1][8];
    GroupScale group;
    if constexpr (QK_FP8) {
      BlockScale block;
      uint2 two = quantize_channels_fp8(x[0], block, missed[0]);
      u32* words = reinterpret_cast<u32*>(image) + (n / 2 * QK_STEPS + piece / 4) * WARP * 4;
      words += (4 * g + piece * 2 % 4) * 4 + n % 2 * 2 + piece % 4 / 2;
      words[0] = two.x, words[4] = two.y;
      if (piece % 4 == 0)
        store_step_scale(image + KEY_CODE_BYTES + ((4 * g + n % 4) * 2 + n / 4) * 4, piece / 4, block.code);
    } else {
      u32 codes[1];
      group = quantize_four_over_six<2, 8>(x, max_over_lanes(absmax_of(x[0]), 2), codes, missed);
      *reinterpret_cast<u32*>(image + code_offset) = codes[0];
      if (within % 2 == 0) image[scale_offset] = u8(group.code);
    }
    *reinterpret_cast<u32*>(image + KEY_BYTES + code_offset) = quantize_channels(missed[0], group);
    if (within % 2 == 0) image[KEY_BYTES + scale_offset] = u8(group.code);
  }
}

// 64 tokens of V, transposed. A thread takes a group of 16 tokens of two channels.
template <RowForm ROWS>
__device__ __forceinline__ void quantize_values(const Parameters& p, const HeadStatistics& statistics, u8* image,
                                                u32 batch, u32 head, u32 tile, int keys) {
  float scale = statistics.scales[1];
  for (u32 job = threadIdx.x; job < HEAD_DIM / 2 * (KEY_TILE / GROUP); job += THREADS) {
    u32 channel = job % (HEAD_DIM / 2) * 2, group_index = job / (HEAD_DIM / 2);
    u32 token = tile * KEY_TILE + group_index * GROUP;
    u32 raw[GROUP][1];
    load_rows<ROWS, 1, 2>(p, p.value, batch, head, token, keys, channel, raw);
#pragma unroll
    for (u32 c = 0; c < 2; ++c) {
      float offset = -statistics.means[1][channel + c] * scale, x[2][8], absmax = 0.0f;
#pragma unroll
      for (u32 i = 0; i < GROUP; ++i) {
        float& element = x[i / 8][i % 8];
        float v = to_float<ROWS>(p, raw[i][0] >> (16 * c));
        element = ROWS != ANY_ROWS || int(token + i) < keys ? fmaf(v, scale, offset) : 0.0f;
        absmax = max_nan(absmax, fabsf(element));
      }
      u32 codes[2];
      float missed[2][8];
      GroupScale group = quantize_four_over_six<1, 8>(x, absmax, codes, missed);
      u32 n = channel / 8, g = channel % 8 + c, word = 2 * n + group_index / 2;
#pragma unroll
      for (u32 half = 0; half < 2; ++half) {
        u32 thread = group_index % 2 * 2 + half;
        *reinterpret_cast<u32*>(image + ((word / 4 * WARP + 4 * g + thread) * 4 + word % 4) * 4) = codes[half];
      }
      image[VALUE_CODE_BYTES + ((4 * g + n % 4) * VALUE_SCALES + n / 4) * 4 + group_index] = u8(group.code);
    }
  }
}

template <RowForm ROWS>
__device__ __forceinline__ void quantize_tile(const Parameters& p, const HeadStatistics& statistics, u8* image,
                                              u32 batch, u32 head, u32 tile, int keys) {
  quantize_keys<ROWS>(p, statistics, image, batch, head, tile, keys);
  quantize_values<ROWS>(p, statistics, image + VALUE_OFFSET, batch, head, tile, keys);
}

__device__ void quantize_keys_values(const Parameters& p, HeadStatistics& statistics, u8* image, u32 index) {
  u32 blocks = (p.key_tiles + TILES_PER_BLOCK - 1) / TILES_PER_BLOCK;
  u32 head_index = index / blocks, first = index % blocks * TILES_PER_BLOCK;
  u32 batch = head_index / p.kv_heads, head = head_index % p.kv_heads;
  int keys = valid_keys(p, batch);
  finish_statistics(p, head_index, statistics);
  if (first == 0) {
    for (u32 i = threadIdx.x; i < HEAD_DIM; i += THREADS) {
      p.key_means[head_index * HEAD_DIM + i] = statistics.means[0][i];
      p.value_means[head_index * HEAD_DIM + i] = statistics.means[1][i];
    }
    if (threadIdx.x == 0) {
      p.key_factors[head_index] = 1.0f / statistics.scales[0];
      p.value_factors[head_index] = 1.0f / statistics.scales[1];
    }
  }
  if (VALUE_COLUMNS / 4 < VALUE_SCALES)  // words that no column uses
    for (u32 i = threadIdx.x; i < WARP * VALUE_SCALES; i += THREADS)
      reinterpret_cast<u32*>(image + VALUE_OFFSET + VALUE_CODE_BYTES)[i] = 0;
  for (u32 tile = first; tile < min(first + TILES_PER_BLOCK, u32(p.key_tiles)); ++tile) {
    __syncthreads();
    RowForm rows = rows_of(p, int(tile + 1) * int(KEY_TILE) <= keys);
    if (rows == BF16_ROWS)
      quantize_tile<BF16_ROWS>(p, statistics, image, batch, head, tile, keys);
    else if (rows == F16_ROWS)
      quantize_tile<F16_ROWS>(p, statistics, image, batch, head, tile, keys);
    else
      quantize_tile<ANY_ROWS>(p, statistics, image, batch, head, tile, keys);
    __syncthreads();
    copy_out(p.keys_values + (i64(head_index) * p.key_tiles + tile) * TILE_BYTES, image, TILE_BYTES);
  }
}

__device__ __forceinline__ bool is_seen(const Parameters& p, i64 index) {
  if (p.mask_kind == MASK_BOOL) return p.mask[index] != 0;
  if (p.mask_kind == MASK_F32) return reinterpret_cast<const float*>(p.mask)[index] != -INFINITE;
  return reinterpret_cast<const u16*>(p.mask)[index] != (p.mask_kind == MASK_F16 ? 0xFC00 : 0xFF80);
}

// Whether any pair of a query tile and a key tile may be seen.
__device__ void find_open_tile(const Parameters& p, u32 index) {
  u32 key_tile = index % p.key_tiles, rest = index / p.key_tiles;
  u32 query_tile = rest % p.query_tiles, head = rest / p.query_tiles % p.mask_heads,
      batch = rest / p.query_tiles / p.mask_heads;
  bool seen = false;
  for (u32 i = threadIdx.x; i < QUERY_TILE * KEY_TILE && !seen; i += THREADS) {
    u32 row = query_tile * QUERY_TILE + i / KEY_TILE, key = key_tile * KEY_TILE + i % KEY_TILE;
    if (int(row) < p.query_length && int(key) < p.key_length)
      seen = is_seen(
          p, batch * p.mask_strides[0] + head * p.mask_strides[1] + row * p.mask_strides[2] + key * p.mask_strides[3]);
  }
  seen = __syncthreads_or(seen);
  if (threadIdx.x == 0) p.tile_seen[index] = seen;
}

// Blocks a multiprocessor, so that some load while others round: as many as fit without spills.
constexpr u32 RESIDENT_BLOCKS = 3;

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT_BLOCKS)
    nvfp4_prepare_keys_values(const __grid_constant__ Parameters p) {
  __shared__ HeadStatistics statistics;
  __shared__ __align__(16) u8 image[TILE_BYTES];
  u32 index = blockIdx.x;
  u32 blocks = u32(p.batch) * p.kv_heads * ((p.key_tiles + TILES_PER_BLOCK - 1) / TILES_PER_BLOCK);
  if (index < blocks) return quantize_keys_values(p, statistics, image, index);
  index -= blocks;
  blocks = p.lse_shifts ? u32(p.batch) * p.heads * ((p.query_length + SHIFT_ROWS - 1) / SHIFT_ROWS) : 0;
  if (index < blocks) return compute_lse_shifts(p, statistics, index);
  find_open_tile(p, index - blocks);
}
