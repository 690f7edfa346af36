// Attention of a few query rows to the NVFP4 cache, on tensor cores in 16 bit; reading the cache is what it waits for.
//
// The constraint that shaped it: codes go from global memory to the registers of the lane that multiplies them, with
// no shared memory in between. So keys are the rows of the products, S^T = K Q^T and O^T = V^T P^T, the channels of Q
// are permuted as a lane's load of K has them, and tokens in each 8 as its load of V has them.
//
// Each warp takes every fourth step of its block's share of the keys and keeps a softmax of its own; the four are put
// together at the end, and the blocks' shares by a second kernel.
#include "kv_cache_fragments.cuh"
#include "kv_cache_params.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef ROW_TILES
#define ROW_TILES 1
#endif

#ifndef BLOCKS  // of a multiprocessor, at least
#define BLOCKS (HEAD_DIM == 64 ? 5 - ROW_TILES : 4 - ROW_TILES)
#endif

constexpr u32 D = HEAD_DIM;
constexpr u32 TILES = ROW_TILES;
constexpr u32 ROWS = 8 * TILES;  // query rows of a block: heads that share a key head, and query tokens
constexpr u32 WARPS = 4;
constexpr u32 THREADS = WARPS * WARP;
constexpr u32 STEP = 32;  // keys of one step of a warp
constexpr u32 CODE_BYTES = D / 2;
constexpr u32 KEY_WORDS = D / 32;     // of a lane, of one key: D / 4 channels
constexpr u32 VALUE_WORDS = D / 64;   // of a lane, of one token: D / 8 channels
constexpr u32 OUTPUT_TILES = D / 16;  // of 16 channels
constexpr u32 CHANNELS = D / WARP;    // of a lane where a warp has a whole row
constexpr u32 SUM_STRIDE = D + 4;     // keeps rows in different banks
constexpr float OPERAND_UNIT = 128.0f;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr float KEY_ROTATION = 0.125f;  // as in storage.py
// Weights may grow by 2^8 before the output is rescaled: float16 holds them, and the sums are float32.
constexpr float HEADROOM = 8.0f;
constexpr float NO_MAXIMUM = -LARGEST_FLOAT;
constexpr u32 ONES = 0x3C003C00u;

struct Keys {
  u32 words[2][2][KEY_WORDS];  // [tile of 16 keys][row lane / 4, row lane / 4 + 8]
  u32 scales[2][2];
};

struct Values {
  u32 words[2][4][VALUE_WORDS];  // [tile of 16 tokens][the lane's four]
  u32 scales[2][4];
};

struct Shared {
  union {
    u16 query[ROWS][D];  // float16
    float outputs[WARPS][ROWS][SUM_STRIDE];
  };
  float factors[ROWS], lse_shifts[ROWS];
  float maxima[WARPS][ROWS], sums[WARPS][ROWS];
};

__device__ __forceinline__ float load_float(const void* pointer, i64 index, int dtype) {
  if (dtype == 2) return static_cast<const float*>(pointer)[index];
  u16 bits = static_cast<const u16*>(pointer)[index];
  return dtype == 1 ? from_bf16(bits) : from_f16(bits);
}

__device__ __forceinline__ void store_float(void* pointer, i64 index, int dtype, float x) {
  if (dtype == 2)
    static_cast<float*>(pointer)[index] = x;
  else
    static_cast<u16*>(pointer)[index] = static_cast<u16>(dtype == 1 ? to_bf16x2(x, 0.0f) : to_f16x2(x, 0.0f));
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (u32 lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(ALL_LANES, x, lanes);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (u32 lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, lanes));
  return x;
}

// Where a row of the block is in [B, H, Nq]: query token major, head minor.
struct Row {
  int token, head;
  bool exists;
  __device__ Row(const KvDecodeParams& p, u32 batch, u32 kv_head, u32 index) {
    u32 group_heads = p.heads / p.kv_heads;
    token = index / group_heads;
    head = kv_head % p.kv_heads * group_heads + index % group_heads;
    exists = token < p.query_length;
  }
};

// x times the matrix of signs: flips, then butterflies over the lane's channels and over lanes.
__device__ __forceinline__ void rotate(float (&x)[CHANNELS], const float* signs, u32 lane) {
#pragma unroll
  for (u32 i = 0; i < CHANNELS; ++i) x[i] *= signs[lane * CHANNELS + i] / (D * KEY_ROTATION);
#pragma unroll
  for (u32 stride = 1; stride < CHANNELS; stride *= 2)
#pragma unroll
    for (u32 i = 0; i < CHANNELS; ++i)
      if (!(i & stride)) {
        float a = x[i], b = x[i | stride];
        x[i] = a + b;
        x[i | stride] = a - b;
      }
#pragma unroll
  for (u32 lanes = 1; lanes < WARP; lanes *= 2)
#pragma unroll
    for (u32 i = 0; i < CHANNELS; ++i) {
      float other = __shfl_xor_sync(ALL_LANES, x[i], lanes);
      x[i] = lane & lanes ? other - x[i] : x[i] + other;
    }
}

// The block's queries, rotated, each times a power of two that brings it to float16's range; rows that don't exist: 0.
__device__ void stage_queries(const KvDecodeParams& p, Shared& shared, u32 batch, u32 kv_head, u32 first_row, u32 warp,
                              u32 lane) {
  const float* means = p.key_means + static_cast<i64>(kv_head) * D + lane * CHANNELS;
  for (u32 index = warp; index < ROWS; index += WARPS) {
    Row row(p, batch, kv_head, first_row + index);
    i64 start = batch * p.query_strides[0] + row.head * p.query_strides[1] + row.token * p.query_strides[2];
    float x[CHANNELS];
#pragma unroll
    for (u32 i = 0; i < CHANNELS; ++i)
      x[i] = row.exists ? load_float(p.query, start + lane * CHANNELS + i, p.dtype) : 0.0f;
    if (p.signs != nullptr) rotate(x, p.signs, lane);
    float shift = 0.0f, largest = 0.0f;
#pragma unroll
    for (u32 i = 0; i < CHANNELS; ++i) {
      shift += x[i] * means[i];
      largest = fmaxf(largest, fabsf(x[i]));
    }
    shift = warp_sum(shift);
    largest = warp_max(largest);
    u32 exponent = min(max(__float_as_uint(largest) >> 23, 1u), 253u);
    float up = __uint_as_float((254u - exponent) << 23), down = __uint_as_float(exponent << 23);
#pragma unroll
    for (u32 i = 0; i < CHANNELS; ++i)
      shared.query[index][lane * CHANNELS + i] = static_cast<u16>(to_f16x2(x[i] * up, 0.0f));
    if (lane == 0) {
      shared.factors[index] = down * (p.softmax_scale * OPERAND_UNIT * LOG2E / p.key_factors[kv_head]);
      shared.lse_shifts[index] = shift * (p.softmax_scale * LOG2E);
    }
  }
}

// What a lane loads, and where: of keys, a quarter of the channels of rows lane / 4 and lane / 4 + 8; of values, an
// eighth of the channels of tokens lane % 4 + {0, 4, 8, 12}. Row r of 8 keys is token r / 2 + 4 (r % 2) of them, so
// that the transposed weights meet those tokens.
class Loader {
 public:
  __device__ Loader(const KvDecodeParams& p, u32 kv_head, u32 lane) {
    u32 row = lane / 4, column = lane % 4, row_token = row / 2 + row % 2 * 4;
    u64 first = static_cast<u64>(kv_head) * p.padded_capacity;
    scale_bytes_ = D / p.group;
    key_codes_ = p.key_codes + (first + row_token) * CODE_BYTES + column * (KEY_WORDS * 4);
    value_codes_ = p.value_codes + (first + column) * CODE_BYTES + row * (VALUE_WORDS * 4);
    u32 key_scale = column * (D / 4) / p.group;  // of the lane's first channel
    if constexpr (D == 128) {
      // Two bytes, of which a lane's two halves of 16 channels take one each, or both the same.
      bool two = p.group == 16;
      u32 byte = two ? 0 : key_scale % 2;
      low_ = byte ? 0x3232 : 0x1010;
      high_ = two || byte ? 0x3232 : 0x1010;
      key_scale -= byte;
    } else {
      low_ = high_ = 0x1010;
    }
    key_scales_ = p.key_scales + (first + row_token) * scale_bytes_ + key_scale;
    value_scales_ = p.value_scales + (first + column) * scale_bytes_ + row * (D / 8) / p.group;
  }

  __device__ __forceinline__ void load(Keys& keys, u32 start) const {
    const u8* codes = key_codes_ + static_cast<u64>(start) * CODE_BYTES;
    load_once<KEY_WORDS, 0>(keys.words[0][0], codes);
    load_once<KEY_WORDS, 8 * CODE_BYTES>(keys.words[0][1], codes);
    load_once<KEY_WORDS, 16 * CODE_BYTES>(keys.words[1][0], codes);
    load_once<KEY_WORDS, 24 * CODE_BYTES>(keys.words[1][1], codes);
    const u8* scales = key_scales_ + static_cast<u64>(start) * scale_bytes_;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      const u8* address = scales + 8 * i * scale_bytes_;
      keys.scales[i / 2][i % 2] = D == 128 ? load_global_2(address) : load_global_1(address);
    }
  }

  __device__ __forceinline__ void load(Values& values, u32 start) const {
    const u8* codes = value_codes_ + static_cast<u64>(start) * CODE_BYTES;
    load_tokens<0>(values.words[0], codes);
    load_tokens<16>(values.words[1], codes);
    const u8* scales = value_scales_ + static_cast<u64>(start) * scale_bytes_;
#pragma unroll
    for (u32 i = 0; i < 8; ++i) values.scales[i / 4][i % 4] = load_global_1(scales + 4 * i * scale_bytes_);
  }

  // The scales of a lane's first and second half of its channels of a key, each twice.
  __device__ __forceinline__ void unpack_key_scales(u32 bytes, u32& low, u32& high) const {
    u32 both = unpack_scales(bytes);
    low = permute_bytes(both, 0, low_);
    high = permute_bytes(both, 0, high_);
  }

 private:
  template <u32 FIRST>
  __device__ __forceinline__ void load_tokens(u32 (&words)[4][VALUE_WORDS], const u8* codes) const {
    load_once<VALUE_WORDS, FIRST * CODE_BYTES>(words[0], codes);
    load_once<VALUE_WORDS, (FIRST + 4) * CODE_BYTES>(words[1], codes);
    load_once<VALUE_WORDS, (FIRST + 8) * CODE_BYTES>(words[2], codes);
    load_once<VALUE_WORDS, (FIRST + 12) * CODE_BYTES>(words[3], codes);
  }

  const u8 *key_codes_, *value_codes_, *key_scales_, *value_scales_;
  u32 scale_bytes_, low_, high_;
};

__device__ __forceinline__ void unpack_scaled(u32 codes, u32 scale, u32 (&pairs)[4]) {
  unpack_e2m1(codes, pairs);
#pragma unroll
  for (u32 i = 0; i < 4; ++i) pairs[i] = multiply_f16x2(pairs[i], scale);
}

// scores[tile of 8 rows]: keys lane / 4 and + 8 of a tile of 16, query rows 2 (lane % 4) + {0, 1}.
__device__ __forceinline__ void multiply_keys(float (&scores)[TILES][4], const Keys& keys, u32 tile,
                                              const u32 (&query)[TILES][KEY_WORDS][4], const Loader& loader) {
  u32 scales[2][2];  // [row][half of the lane's channels]
#pragma unroll
  for (u32 row = 0; row < 2; ++row) loader.unpack_key_scales(keys.scales[tile][row], scales[row][0], scales[row][1]);
#pragma unroll
  for (u32 rows = 0; rows < TILES; ++rows)
#pragma unroll
    for (u32 i = 0; i < 4; ++i) scores[rows][i] = 0.0f;
#pragma unroll
  for (u32 word = 0; word < KEY_WORDS; ++word) {
    u32 half = word * 2 / KEY_WORDS, a[4], b[4];
    unpack_scaled(keys.words[tile][0][word], scales[0][half], a);
    unpack_scaled(keys.words[tile][1][word], scales[1][half], b);
#pragma unroll
    for (u32 rows = 0; rows < TILES; ++rows) {
      const u32(&q)[4] = query[rows][word];
      mma_f16(scores[rows], a[0], b[0], a[1], b[1], q[0], q[1]);
      mma_f16(scores[rows], a[2], b[2], a[3], b[3], q[2], q[3]);
    }
  }
}

// outputs[tile of 8 rows][tile of 16 channels]: channels 2 i and 2 i + 1 of the lane's, query rows as in the scores.
__device__ __forceinline__ void multiply_values(float (&outputs)[TILES][OUTPUT_TILES][4], float (&sums)[TILES][4],
                                                const Values& values, u32 tile, const u32 (&weights)[TILES][2]) {
  u32 first = unpack_scales(permute_bytes(values.scales[tile][0], values.scales[tile][1], 0x0040));
  u32 second = unpack_scales(permute_bytes(values.scales[tile][2], values.scales[tile][3], 0x0040));
#pragma unroll
  for (u32 rows = 0; rows < TILES; ++rows)
    mma_f16(sums[rows], ONES, ONES, ONES, ONES, weights[rows][0], weights[rows][1]);
#pragma unroll
  for (u32 word = 0; word < VALUE_WORDS; ++word)
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
      // Four channels of two tokens in one word: nibbles i and i + 4 are a channel of both.
      const u32(&x)[4][VALUE_WORDS] = values.words[tile];
      u32 bytes = half ? 0x7632 : 0x5410, a[4], b[4];
      unpack_scaled(permute_bytes(x[0][word], x[1][word], bytes), first, a);
      unpack_scaled(permute_bytes(x[2][word], x[3][word], bytes), second, b);
#pragma unroll
      for (u32 rows = 0; rows < TILES; ++rows) {
        const u32(&p)[2] = weights[rows];
        mma_f16(outputs[rows][4 * word + 2 * half], a[0], a[1], b[0], b[1], p[0], p[1]);
        mma_f16(outputs[rows][4 * word + 2 * half + 1], a[2], a[3], b[2], b[3], p[0], p[1]);
      }
    }
}

// One share of the keys of one key head, for the rows of one block.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    kv_cache_decode(const __grid_constant__ KvDecodeParams p) {
  __shared__ Shared shared;
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  u32 split = blockIdx.x % p.splits, rest = blockIdx.x / p.splits;
  u32 kv_heads = p.rows / (p.heads * p.query_length) * p.kv_heads;  // of all sequences
  u32 kv_head = rest % kv_heads, batch = kv_head / p.kv_heads, first_row = rest / kv_heads * ROWS;
  int length = p.lengths[batch];
  int share = (length + p.splits - 1) / p.splits;
  share = (share + static_cast<int>(STEP) - 1) / static_cast<int>(STEP) * static_cast<int>(STEP);
  int begin = split * share, end = min(begin + share, length);

  Loader loader(p, kv_head, lane);
  Keys keys;
  Values values;
  int start = begin + warp * STEP;
  if (start < end) {
    loader.load(keys, start);
    loader.load(values, start);
  }
  stage_queries(p, shared, batch, kv_head, first_row, warp, lane);
  __syncthreads();

  u32 query[TILES][KEY_WORDS][4];
  float factor[TILES][2], maximum[TILES][2], sums[TILES][4], outputs[TILES][OUTPUT_TILES][4];
  int limit[TILES][2];
  // Causal: query token i of Nq sees the first length - Nq + 1 + i keys.
  int least =
      p.is_causal ? min(length, max(0, length - p.query_length + 1 + Row(p, batch, kv_head, first_row).token)) : length;
#pragma unroll
  for (u32 rows = 0; rows < TILES; ++rows) {
#pragma unroll
    for (u32 word = 0; word < KEY_WORDS; ++word) {
      const u16* x = &shared.query[8 * rows + lane / 4][lane % 4 * (D / 4) + 8 * word];
#pragma unroll
      for (u32 i = 0; i < 4; ++i) query[rows][word][i] = x[i] | static_cast<u32>(x[i + 4]) << 16;
    }
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
      u32 row = 8 * rows + 2 * (lane % 4) + i;
      factor[rows][i] = shared.factors[row];
      maximum[rows][i] = NO_MAXIMUM;
      int token = Row(p, batch, kv_head, first_row + row).token;
      limit[rows][i] = p.is_causal ? min(length, max(0, length - p.query_length + 1 + token)) : length;
    }
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      sums[rows][i] = 0.0f;
#pragma unroll
      for (u32 tile = 0; tile < OUTPUT_TILES; ++tile) outputs[rows][tile][i] = 0.0f;
    }
  }

  for (; start < end; start += WARPS * STEP) {
    int next = start + static_cast<int>(WARPS * STEP);
    float scores[2][TILES][4];
    multiply_keys(scores[0], keys, 0, query, loader);
    multiply_keys(scores[1], keys, 1, query, loader);
    if (next < end) loader.load(keys, next);

    bool is_edge = start + static_cast<int>(STEP) > least;
    bool grows = false;
    float largest[TILES][2];
#pragma unroll
    for (u32 rows = 0; rows < TILES; ++rows)
#pragma unroll
      for (u32 i = 0; i < 2; ++i) {
        largest[rows][i] = NO_MAXIMUM;
#pragma unroll
        for (u32 tile = 0; tile < 2; ++tile)
#pragma unroll
          for (u32 half = 0; half < 2; ++half) {
            float& score = scores[tile][rows][2 * half + i];
            score *= factor[rows][i];
            if (is_edge) {
              int key = start + 16 * tile + 8 * half + lane / 8 + lane / 4 % 2 * 4;
              if (key >= limit[rows][i]) score = -INFINITE;
            }
            largest[rows][i] = fmaxf(largest[rows][i], score);
          }
        grows |= largest[rows][i] > maximum[rows][i] + HEADROOM;
      }
    if (__any_sync(ALL_LANES, grows)) {
#pragma unroll
      for (u32 rows = 0; rows < TILES; ++rows)
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
          float found = largest[rows][i];
#pragma unroll
          for (u32 lanes = 4; lanes < WARP; lanes *= 2) found = fmaxf(found, __shfl_xor_sync(ALL_LANES, found, lanes));
          found = fmaxf(found, maximum[rows][i]);
          float rescale = exp2_approx(maximum[rows][i] - found);
          maximum[rows][i] = found;
#pragma unroll
          for (u32 half = 0; half < 2; ++half) {
            sums[rows][2 * half + i] *= rescale;
#pragma unroll
            for (u32 tile = 0; tile < OUTPUT_TILES; ++tile) outputs[rows][tile][2 * half + i] *= rescale;
          }
        }
    }

    if (is_edge) {
      // What lies beyond the end may be stale: a NaN would outlive its weight of 0.
#pragma unroll
      for (u32 i = 0; i < 8; ++i)
        if (start + static_cast<int>(4 * i + lane % 4) >= length) values.scales[i / 4][i % 4] = 0;
    }
#pragma unroll
    for (u32 tile = 0; tile < 2; ++tile) {
      u32 weights[TILES][2];
#pragma unroll
      for (u32 rows = 0; rows < TILES; ++rows)
#pragma unroll
        for (u32 half = 0; half < 2; ++half)
          weights[rows][half] =
              transpose_8x8(to_f16x2(exp2_approx(scores[tile][rows][2 * half] - maximum[rows][0]),
                                     exp2_approx(scores[tile][rows][2 * half + 1] - maximum[rows][1])));
      multiply_values(outputs, sums, values, tile, weights);
    }
    if (next < end) loader.load(values, next);
  }

  __syncthreads();  // the queries' place becomes the outputs'
#pragma unroll
  for (u32 rows = 0; rows < TILES; ++rows)
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
      u32 row = 8 * rows + 2 * (lane % 4) + i;
      if (lane < 4) {
        shared.maxima[warp][row] = maximum[rows][i];
        shared.sums[warp][row] = sums[rows][i];
      }
#pragma unroll
      for (u32 tile = 0; tile < OUTPUT_TILES; ++tile)
        *reinterpret_cast<float2*>(&shared.outputs[warp][row][lane / 4 * (D / 8) + 2 * tile]) =
            make_float2(outputs[rows][tile][i], outputs[rows][tile][2 + i]);
    }
  __syncthreads();

  for (u32 item = threadIdx.x; item < ROWS * D; item += THREADS) {
    u32 index = item / D, channel = item % D;
    Row row(p, batch, kv_head, first_row + index);
    if (!row.exists) continue;
    float largest = NO_MAXIMUM, sum = 0.0f, output = 0.0f;
#pragma unroll
    for (u32 i = 0; i < WARPS; ++i) largest = fmaxf(largest, shared.maxima[i][index]);
#pragma unroll
    for (u32 i = 0; i < WARPS; ++i) {
      float weight = exp2_approx(shared.maxima[i][index] - largest);
      sum += weight * shared.sums[i][index];
      output += weight * shared.outputs[i][index][channel];
    }
    bool empty = sum == 0.0f;
    output = empty ? 0.0f : output * (OPERAND_UNIT / sum);
    float lse = empty ? -INFINITE : largest + log2f(sum) + shared.lse_shifts[index];
    i64 place = (static_cast<i64>(batch) * p.heads + row.head) * p.query_length + row.token;
    if (p.splits == 1) {
      float mean = p.value_means[static_cast<i64>(kv_head) * D + channel];
      store_float(p.output, place * D + channel, p.dtype, empty ? 0.0f : output / p.value_factors[kv_head] + mean);
      if (channel == 0) p.lse[place] = lse * LN2;
    } else {
      place += static_cast<i64>(split) * p.rows;
      p.partial[place * D + channel] = output;
      if (channel == 0) p.partial_lse[place] = lse;
    }
  }
}

// The output of one row from all shares, with the value head's mean and factor put back.
extern "C" __global__ void __launch_bounds__(THREADS) kv_cache_combine(const __grid_constant__ KvDecodeParams p) {
  constexpr u32 LANES = D / 4;             // of a share: four channels each
  constexpr u32 SHARES = THREADS / LANES;  // at a time
  __shared__ float4 parts[SHARES][LANES];
  u32 lane = threadIdx.x % WARP, row = blockIdx.x;
  float largest = NO_MAXIMUM, total = 0.0f;
  for (u32 split = lane; split < static_cast<u32>(p.splits); split += WARP)
    largest = fmaxf(largest, p.partial_lse[static_cast<i64>(split) * p.rows + row]);
  largest = warp_max(largest);
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
  for (u32 split = threadIdx.x / LANES; split < static_cast<u32>(p.splits); split += SHARES) {
    i64 place = static_cast<i64>(split) * p.rows + row;
    float weight = exp2_approx(p.partial_lse[place] - largest);
    float4 x = reinterpret_cast<const float4*>(p.partial)[place * LANES + threadIdx.x % LANES];
    sum.x += weight * x.x;
    sum.y += weight * x.y;
    sum.z += weight * x.z;
    sum.w += weight * x.w;
  }
  parts[threadIdx.x / LANES][threadIdx.x % LANES] = sum;
  for (u32 split = lane; split < static_cast<u32>(p.splits); split += WARP)
    total += exp2_approx(p.partial_lse[static_cast<i64>(split) * p.rows + row] - largest);
  total = warp_sum(total);
  bool empty = total == 0.0f;
  __syncthreads();
  u32 kv_head = row / p.query_length / (p.heads / p.kv_heads);
  if (threadIdx.x < D) {
    u32 channel = threadIdx.x;
    float output = 0.0f;
#pragma unroll
    for (u32 share = 0; share < SHARES; ++share) output += reinterpret_cast<const float*>(parts[share])[channel];
    output = output / total / p.value_factors[kv_head] + p.value_means[static_cast<i64>(kv_head) * D + channel];
    store_float(p.output, static_cast<i64>(row) * D + channel, p.dtype, empty ? 0.0f : output);
    if (channel == 0) p.lse[row] = empty ? -INFINITE : (largest + log2f(total)) * LN2;
  }
}
