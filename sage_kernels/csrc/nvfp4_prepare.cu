// Preparation of NVFP4 operands in two launches (SageAttention3, section 3.1 and algorithm 1, lines 1 to 3):
//   nvfp4_prepare_queries: Q smoothed by the mean of 32 rows and quantised; partial statistics of K and V.
//   nvfp4_prepare_keys_values: K and V smoothed and quantised, K in two digits; LSE shifts; which tiles a mask leaves
//   open.
#include "nvfp4_images.cuh"
#include "nvfp4_quantize.cuh"

constexpr u32 THREADS = 256;
constexpr u32 WARPS = THREADS / WARP;
constexpr u32 CONTRACTION = K_STEPS * 64;          // head_dim, padded for Q K^T
constexpr u32 LANE_CHANNELS = CONTRACTION / WARP;  // of one row
constexpr u32 TILES_PER_BLOCK = 4;                 // key tiles
constexpr u32 SHIFT_ROWS = 64;                     // rows of LSE shifts that one block computes

struct Operand {
  const u16* data;
  i64 strides[4];  // of B, H, N and D, in elements
};

struct Parameters {
  Operand query, key, value;
  const int* key_lengths;  // [B], or null
  const u8* mask;          // or null
  u8* queries;
  u8* means;
  u8* keys_values;
  float* query_factors;   // [B, H, query tiles, BLOCKS]
  float* key_factors;     // [B, Hkv]
  float* value_factors;   // [B, Hkv]
  float* key_means;       // [B, Hkv, HEAD_DIM]
  float* value_means;     // [B, Hkv, HEAD_DIM]
  float* partial_sums;    // [B, Hkv, chunks, 2, HEAD_DIM]
  float* partial_maxima;  // [B, Hkv, chunks, 2]
  float* lse_shifts;      // [B, H, Nq], or null
  u8* tile_seen;          // [mask B, mask H, query tiles, key tiles], or null
  i64 mask_strides[4];
  int batch, heads, kv_heads, query_length, key_length, head_dim, query_tiles, key_tiles, chunks, chunk_tokens;
  int is_bf16, mask_kind, mask_batch, mask_heads, vectors;  // vectors: rows are contiguous and 16-byte aligned
  float query_sign;                                         // -1 for a negative softmax scale
};

__device__ __forceinline__ float to_float(const Parameters& p, u32 bits) {
  return p.is_bf16 ? from_bf16(u16(bits)) : from_f16(u16(bits));
}

__device__ __forceinline__ int valid_keys(const Parameters& p, u32 batch) {
  return p.key_lengths ? max(0, min(p.key_length, p.key_lengths[batch])) : p.key_length;
}

// COUNT neighbouring channels of one row as 16-bit words; zeros beyond head_dim.
template <u32 COUNT>
__device__ __forceinline__ void load_channels(const Parameters& p, const u16* row, i64 stride, u32 channel,
                                              u32 (&pairs)[COUNT / 2]) {
  if (p.vectors) {
    if (int(channel) >= p.head_dim) {
#pragma unroll
      for (u32 i = 0; i < COUNT / 2; ++i) pairs[i] = 0;
    } else if constexpr (COUNT == 8) {
      uint4 four = *reinterpret_cast<const uint4*>(row + channel);
      pairs[0] = four.x, pairs[1] = four.y, pairs[2] = four.z, pairs[3] = four.w;
    } else if constexpr (COUNT == 4) {
      uint2 two = *reinterpret_cast<const uint2*>(row + channel);
      pairs[0] = two.x, pairs[1] = two.y;
    } else {
      pairs[0] = *reinterpret_cast<const u32*>(row + channel);
    }
    return;
  }
#pragma unroll
  for (u32 i = 0; i < COUNT / 2; ++i) {
    u32 c = channel + 2 * i;
    u32 low = int(c) < p.head_dim ? row[c * stride] : 0, high = int(c + 1) < p.head_dim ? row[(c + 1) * stride] : 0;
    pairs[i] = low | high << 16;
  }
}

__device__ __forceinline__ const u16* row_of(const Operand& x, u32 batch, u32 head, i64 token) {
  return x.data + batch * x.strides[0] + head * x.strides[1] + token * x.strides[2];
}

__device__ __forceinline__ float max_over_lanes(float x, u32 lanes) {
  for (u32 step = 1; step < lanes; step *= 2) x = max_nan(x, __shfl_xor_sync(ALL_LANES, x, step));
  return x;
}

// Codes, scale and rounded values of LANE_CHANNELS neighbouring channels; the lanes of a group agree on the scale.
template <class... Values>
__device__ __forceinline__ u32 quantize_channels(const float (&x)[8], GroupScale& scale, Values&... values) {
  float absmax = 0.0f;
#pragma unroll
  for (u32 i = 0; i < LANE_CHANNELS; ++i) absmax = max_nan(absmax, fabsf(x[i]));
  scale = group_scale(max_over_lanes(absmax, GROUP / LANE_CHANNELS));
  return quantize_elements(x, scale, values...);
}

// Stores LANE_CHANNELS codes that start at channel LANE_CHANNELS * lane into word `word` of an image in shared memory.
__device__ __forceinline__ void store_codes(u8* image, u32 word, u32 codes, u32 lane) {
  u32 half = (lane * LANE_CHANNELS & 7) / 2;  // byte within the word
  if constexpr (LANE_CHANNELS == 4)
    *reinterpret_cast<u16*>(image + word * 4 + half) = u16(codes);
  else
    image[word * 4 + half] = u8(codes);
}

__device__ __forceinline__ void copy_out(u8* to, const u8* from, u32 bytes) {
  for (u32 i = threadIdx.x * 16; i < bytes; i += THREADS * 16)
    *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(from + i);
}

// 256 query rows of one head: each warp smooths and quantises its block of 32.
__device__ void quantize_queries(const Parameters& p, u32 index) {
  __shared__ __align__(16) u8 images[BLOCKS * QUERY_BYTES];
  __shared__ __align__(16) u8 mean_image[MEAN_BYTES];
  u32 tile = index % p.query_tiles, head = index / p.query_tiles % p.heads, batch = index / p.query_tiles / p.heads;
  u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  for (u32 i = threadIdx.x; i < MEAN_BYTES / 4; i += THREADS) reinterpret_cast<u32*>(mean_image)[i] = 0;
  __syncthreads();

  u32 first = tile * QUERY_TILE + warp * QUERY_BLOCK;
  u32 count = int(first) < p.query_length ? min(QUERY_BLOCK, p.query_length - first) : 0;
  u32 raw[QUERY_BLOCK][LANE_CHANNELS / 2];
  float sums[LANE_CHANNELS] = {}, absmax = 0.0f;
#pragma unroll
  for (u32 row = 0; row < QUERY_BLOCK; ++row) {
    if (row < count) {
      load_channels<LANE_CHANNELS>(p, row_of(p.query, batch, head, first + row), p.query.strides[3],
                                   lane * LANE_CHANNELS, raw[row]);
    } else {
#pragma unroll
      for (u32 i = 0; i < LANE_CHANNELS / 2; ++i) raw[row][i] = 0;
    }
  }
#pragma unroll
  for (u32 row = 0; row < QUERY_BLOCK; ++row)
#pragma unroll
    for (u32 i = 0; i < LANE_CHANNELS; ++i) {
      float x = to_float(p, raw[row][i / 2] >> (16 * (i & 1)));
      sums[i] += x;
      absmax = max_nan(absmax, fabsf(x));
    }
  float scale = power_of_two_scale(max_over_lanes(absmax, WARP)), signed_scale = scale * p.query_sign;

  u32 channel = lane * LANE_CHANNELS, step = channel / 64, within = channel % 64, thread = within % 32 / 8;
  GroupScale group;
  float means[8] = {}, rounded[8];
#pragma unroll
  for (u32 i = 0; i < LANE_CHANNELS; ++i) means[i] = count ? sums[i] / float(count) * p.query_sign * scale : 0.0f;
  u32 codes = quantize_channels(means, group, rounded);
  store_codes(mean_image, (step * WARP + 4 * warp + thread) * 2 + within / 32, codes, lane);
  if (within % GROUP == 0) {
    mean_image[MEAN_CODE_BYTES + (4 * warp + 2 * step) * 4 + within / GROUP] = u8(group.code);
    if (K_STEPS == 1) mean_image[MEAN_CODE_BYTES + (4 * warp + 2) * 4 + within / GROUP] = u8(group.code);
  }
#pragma unroll
  for (u32 i = 0; i < LANE_CHANNELS; ++i) means[i] = rounded[i] * group.value;

  u8* image = images + warp * QUERY_BYTES;
#pragma unroll
  for (u32 row = 0; row < QUERY_BLOCK; ++row) {
    float x[8] = {};
#pragma unroll
    for (u32 i = 0; i < LANE_CHANNELS; ++i) {
      float q = to_float(p, raw[row][i / 2] >> (16 * (i & 1)));
      x[i] = row < count ? fmaf(q, signed_scale, -means[i]) : 0.0f;
    }
    u32 row_codes = quantize_channels(x, group);
    u32 m = row / 16, g = row % 8, high = row / 8 % 2;
    store_codes(image, ((m * K_STEPS + step) * WARP + 4 * g + thread) * 4 + high + 2 * (within / 32), row_codes, lane);
    if (within % GROUP == 0) {
      u8* scales = image + QUERY_CODE_BYTES + (m * WARP + 4 * g + high) * 4 + within / GROUP;
      scales[2 * step * 4] = u8(group.code);
      if (K_STEPS == 1) scales[8] = u8(group.code);
    }
  }
  u32 item = (batch * p.heads + head) * p.query_tiles + tile;
  if (lane == 0) p.query_factors[item * BLOCKS + warp] = 1.0f / scale;
  __syncthreads();
  copy_out(p.queries + i64(item) * BLOCKS * QUERY_BYTES, images, BLOCKS * QUERY_BYTES);
  copy_out(p.means + i64(item) * MEAN_BYTES, mean_image, MEAN_BYTES);
}

// Channel sums and the largest magnitude of one chunk of K's or V's tokens.
__device__ void collect_statistics(const Parameters& p, u32 index) {
  constexpr u32 PIECES = HEAD_DIM / 8, ROWS = THREADS / PIECES;  // a thread takes 8 channels of every ROWS-th token
  __shared__ float sums[ROWS][HEAD_DIM];
  __shared__ float maxima[WARPS];
  u32 which = index % 2, chunk = index / 2 % p.chunks, head_index = index / 2 / p.chunks;
  u32 batch = head_index / p.kv_heads, head = head_index % p.kv_heads;
  const Operand& x = which ? p.value : p.key;
  u32 piece = threadIdx.x % PIECES, row = threadIdx.x / PIECES;
  int end = min((chunk + 1) * p.chunk_tokens, valid_keys(p, batch));
  float sum[8] = {}, absmax = 0.0f;
  constexpr u32 IN_FLIGHT = 4;  // loads
  for (int token = chunk * p.chunk_tokens + row; row < ROWS && token < end; token += IN_FLIGHT * ROWS) {
    u32 pairs[IN_FLIGHT][4] = {};
#pragma unroll
    for (u32 load = 0; load < IN_FLIGHT; ++load)
      if (token + int(load * ROWS) < end)
        load_channels<8>(p, row_of(x, batch, head, token + load * ROWS), x.strides[3], piece * 8, pairs[load]);
#pragma unroll
    for (u32 load = 0; load < IN_FLIGHT; ++load)
#pragma unroll
      for (u32 i = 0; i < 8; ++i) {
        float value = to_float(p, pairs[load][i / 2] >> (16 * (i & 1)));
        sum[i] += value;
        absmax = max_nan(absmax, fabsf(value));
      }
  }
  if (row < ROWS)
#pragma unroll
    for (u32 i = 0; i < 8; ++i) sums[row][piece * 8 + i] = sum[i];
  absmax = max_over_lanes(absmax, WARP);
  if (threadIdx.x % WARP == 0) maxima[threadIdx.x / WARP] = absmax;
  __syncthreads();
  u32 out = (head_index * p.chunks + chunk) * 2 + which;
  if (threadIdx.x < HEAD_DIM) {
    float total = 0.0f;
    for (u32 r = 0; r < ROWS; ++r) total += sums[r][threadIdx.x];
    p.partial_sums[out * HEAD_DIM + threadIdx.x] = total;
  }
  if (threadIdx.x == 0) {
    for (u32 w = 1; w < WARPS; ++w) absmax = max_nan(absmax, maxima[w]);
    p.partial_maxima[out] = absmax;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) nvfp4_prepare_queries(const __grid_constant__ Parameters p) {
  u32 statistics = u32(p.batch) * p.kv_heads * p.chunks * 2;
  if (blockIdx.x < statistics)
    collect_statistics(p, blockIdx.x);
  else
    quantize_queries(p, blockIdx.x - statistics);
}

struct HeadStatistics {
  float means[2][HEAD_DIM];  // of K and of V
  float scales[2];
};

// The chunks' statistics of one key/value head, summed up in the order of the chunks.
__device__ __forceinline__ void finish_statistics(const Parameters& p, u32 head_index, HeadStatistics& statistics) {
  int count = max(1, valid_keys(p, head_index / p.kv_heads));
  for (u32 i = threadIdx.x; i < 2 * HEAD_DIM; i += THREADS) {
    const float* sums = p.partial_sums + i64(head_index) * p.chunks * 2 * HEAD_DIM + i;
    float total = 0.0f;
#pragma unroll 8
    for (int chunk = 0; chunk < p.chunks; ++chunk) total += sums[chunk * 2 * HEAD_DIM];
    statistics.means[i / HEAD_DIM][i % HEAD_DIM] = total / float(count);
  }
  if (threadIdx.x < 2) {
    float absmax = 0.0f;
    for (int chunk = 0; chunk < p.chunks; ++chunk)
      absmax = max_nan(absmax, p.partial_maxima[(head_index * p.chunks + chunk) * 2 + threadIdx.x]);
    statistics.scales[threadIdx.x] = power_of_two_scale(absmax);
  }
  __syncthreads();
}

// 64 keys in two digits. A thread takes 8 channels of a key: one word of a B fragment.
__device__ __forceinline__ void quantize_keys(const Parameters& p, const HeadStatistics& statistics, u8* image,
                                              u32 batch, u32 head, u32 tile, int keys) {
  constexpr u32 PIECES = CONTRACTION / 8, JOBS = KEY_TILE * PIECES / THREADS;
  float scale = statistics.scales[0];
  u32 piece = threadIdx.x % PIECES;
  u32 pairs[JOBS][4] = {};
#pragma unroll
  for (u32 job = 0; job < JOBS; ++job) {
    u32 token = tile * KEY_TILE + (job * THREADS + threadIdx.x) / PIECES;
    if (int(token) < keys)
      load_channels<8>(p, row_of(p.key, batch, head, token), p.key.strides[3], piece * 8, pairs[job]);
  }
  float offsets[8];
#pragma unroll
  for (u32 i = 0; i < 8; ++i) offsets[i] = -statistics.means[0][(piece * 8 + i) % HEAD_DIM] * scale;
#pragma unroll
  for (u32 job = 0; job < JOBS; ++job) {
    u32 key = (job * THREADS + threadIdx.x) / PIECES, token = tile * KEY_TILE + key;
    float x[1][8];
#pragma unroll
    for (u32 i = 0; i < 8; ++i) {
      bool used = int(token) < keys && int(piece * 8 + i) < p.head_dim;
      x[0][i] = used ? fmaf(to_float(p, pairs[job][i / 2] >> (16 * (i & 1))), scale, offsets[i]) : 0.0f;
    }
    u32 step = piece / 8, within = piece % 8;
    u32 in_half = key % 32, n = key / 32 * 4 + in_half % 8 / 2, g = in_half / 8 * 2 + in_half % 2;
    u32 word = (n * K_STEPS + step) * 2 + within / 4, scale_word = n * K_STEPS + step;
    u32 code_offset = ((word / 4 * WARP + 4 * g + within % 4) * 4 + word % 4) * 4;
    u32 scale_offset = KEY_CODE_BYTES + ((4 * g + scale_word % 4) * (2 * K_STEPS) + scale_word / 4) * 4 + within / 2;
    float missed[1][8], absmax = 0.0f;
#pragma unroll
    for (u32 i = 0; i < 8; ++i) absmax = max_nan(absmax, fabsf(x[0][i]));
    u32 codes[1];
    GroupScale group = quantize_four_over_six<2, 8>(x, max_over_lanes(absmax, 2), codes, missed);
    *reinterpret_cast<u32*>(image + code_offset) = codes[0];
    if (within % 2 == 0) image[scale_offset] = u8(group.code);
    absmax = 0.0f;
#pragma unroll
    for (u32 i = 0; i < 8; ++i) absmax = max_nan(absmax, fabsf(missed[0][i]));
    group = group_scale(max_over_lanes(absmax, 2));
    *reinterpret_cast<u32*>(image + KEY_BYTES + code_offset) = quantize_elements(missed[0], group);
    if (within % 2 == 0) image[KEY_BYTES + scale_offset] = u8(group.code);
  }
}

// 64 tokens of V, transposed. A thread takes a group of 16 tokens of two channels.
__device__ __forceinline__ void quantize_values(const Parameters& p, const HeadStatistics& statistics, u8* image,
                                                u32 batch, u32 head, u32 tile, int keys) {
  float scale = statistics.scales[1];
  for (u32 job = threadIdx.x; job < HEAD_DIM / 2 * (KEY_TILE / GROUP); job += THREADS) {
    u32 channel = job % (HEAD_DIM / 2) * 2, group_index = job / (HEAD_DIM / 2);
    u32 token = tile * KEY_TILE + group_index * GROUP;
    u32 raw[GROUP];
#pragma unroll
    for (u32 i = 0; i < GROUP; ++i) {
      u32 pair[1] = {0};
      if (int(token + i) < keys)
        load_channels<2>(p, row_of(p.value, batch, head, token + i), p.value.strides[3], channel, pair);
      raw[i] = pair[0];
    }
#pragma unroll
    for (u32 c = 0; c < 2; ++c) {
      float offset = -statistics.means[1][channel + c] * scale, x[2][8], absmax = 0.0f;
#pragma unroll
      for (u32 i = 0; i < GROUP; ++i) {
        float& element = x[i / 8][i % 8];
        element = int(token + i) < keys ? fmaf(to_float(p, raw[i] >> (16 * c)), scale, offset) : 0.0f;
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

__device__ void quantize_keys_values(const Parameters& p, u32 index) {
  __shared__ HeadStatistics statistics;
  __shared__ __align__(16) u8 image[TILE_BYTES];
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
    quantize_keys(p, statistics, image, batch, head, tile, keys);
    quantize_values(p, statistics, image + VALUE_OFFSET, batch, head, tile, keys);
    __syncthreads();
    copy_out(p.keys_values + (i64(head_index) * p.key_tiles + tile) * TILE_BYTES, image, TILE_BYTES);
  }
}

// q . mean(k): what smoothing K took from the scores of a row.
__device__ void compute_lse_shifts(const Parameters& p, u32 index) {
  __shared__ HeadStatistics statistics;
  u32 blocks = (p.query_length + SHIFT_ROWS - 1) / SHIFT_ROWS;
  u32 first = index % blocks * SHIFT_ROWS, head = index / blocks % p.heads, batch = index / blocks / p.heads;
  finish_statistics(p, batch * p.kv_heads + head / (p.heads / p.kv_heads), statistics);
  u32 lane = threadIdx.x % WARP;
  for (u32 row = first + threadIdx.x / WARP; row < min(first + SHIFT_ROWS, u32(p.query_length)); row += WARPS) {
    const u16* query = row_of(p.query, batch, head, row);
    float sum = 0.0f;
    for (u32 channel = lane; int(channel) < p.head_dim; channel += WARP)
      sum = fmaf(to_float(p, query[channel * p.query.strides[3]]), statistics.means[0][channel], sum);
    for (u32 step = 16; step; step /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
    if (lane == 0) p.lse_shifts[i64(batch * p.heads + head) * p.query_length + row] = sum;
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
constexpr u32 RESIDENT_BLOCKS = HEAD_DIM == 96 ? 3 : 4;

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT_BLOCKS)
    nvfp4_prepare_keys_values(const __grid_constant__ Parameters p) {
  u32 index = blockIdx.x;
  u32 blocks = u32(p.batch) * p.kv_heads * ((p.key_tiles + TILES_PER_BLOCK - 1) / TILES_PER_BLOCK);
  if (index < blocks) return quantize_keys_values(p, index);
  index -= blocks;
  blocks = p.lse_shifts ? u32(p.batch) * p.heads * ((p.query_length + SHIFT_ROWS - 1) / SHIFT_ROWS) : 0;
  if (index < blocks) return compute_lse_shifts(p, index);
  find_open_tile(p, index - blocks);
}
