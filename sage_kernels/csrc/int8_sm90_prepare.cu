// Preparation of int8_sm90_attention.cu in one launch, bound by memory bandwidth. A cluster of 8 CTAs takes a head of K
// or of V. It reads it twice, the second time, where it is short, from the L2 cache: first for the mean of each channel
// (and the largest |V - mean|), then to quantise, K minus its mean to INT8, V minus its mean to E4M3 and transposed. Q
// to INT8 fills the GPU up beside them, or follows the head's K where it needs K's mean (for LSE).
// All are images of the tiles that the attention kernel copies to shared memory: rows of 128 or 64 bytes, 16-byte
// chunks swizzled as wgmma reads them.
//
// Compile-time: HEAD_DIM 64 | 128, to which the images are padded; KEYS of a tile; BFLOAT16 1 | 0 (float16).
// head_dim is a multiple of 8.
#include "int8_sm90_params.cuh"
#include "sm90_channels.cuh"

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kGroups = HEAD_DIM / 8;  // a thread handles 8 channels: 16 bytes
constexpr int kRowsPerPass = kThreads / kGroups;
constexpr int kValueRowBytes = KEYS % 128 == 0 ? 128 : KEYS % 64 == 0 ? 64 : 32;
constexpr int kClusterSize = 8;
constexpr float kMagic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
constexpr float kErrorUnits = 16.f;   // value_error counts sixteenths of a code unit: exact sums in any order

DEVICE int valid_keys(const Int8Params& p, int batch) {
  return p.key_lengths ? max(0, min(p.key_length, p.key_lengths[batch])) : p.key_length;
}

DEVICE Channels load_mean(const float* mean, int group) {
  Channels out;
#pragma unroll
  for (int c = 0; c < 8; ++c) out.x[c] = mean[8 * group + c];
  return out;
}

// scale * code gives the value back. All zeros: scale 1; anything not finite: scale NaN. The reciprocal is 0 in both.
struct Scale {
  float scale, reciprocal;
};

DEVICE Scale make_scale(u32 largest, float codes) {
  if (largest >= 0x7f800000) return {__uint_as_float(0x7fc00000), 0.f};
  const float absmax = __uint_as_float(largest);
  const float reciprocal = codes / absmax;
  if (!(reciprocal < infinity())) return {1.f, 0.f};
  return {absmax / codes, reciprocal};
}

// Eight INT8 codes, round to nearest even; a NaN has reciprocal 0 and its code no meaning.
DEVICE uint2 pack_int8(const Channels& v, float reciprocal) {
  u32 rounded[8];
#pragma unroll
  for (int c = 0; c < 8; ++c) rounded[c] = __float_as_uint(fmaf(v.x[c], reciprocal, kMagic));
  uint2 packed;
  packed.x =
      __byte_perm(__byte_perm(rounded[0], rounded[1], 0x0040), __byte_perm(rounded[2], rounded[3], 0x0040), 0x5410);
  packed.y =
      __byte_perm(__byte_perm(rounded[4], rounded[5], 0x0040), __byte_perm(rounded[6], rounded[7], 0x0040), 0x5410);
  return packed;
}

// Byte offset of channels 8 * group.. of a row in an image with rows of HEAD_DIM bytes.
DEVICE int image_offset(int row, int group) {
  return row * HEAD_DIM + ((group >> 1 ^ swizzle(row, HEAD_DIM)) << 4) + (group & 1) * 8;
}

DEVICE void quantize_query(const Int8Params& p, int block, int batch, int head) {
  const int group = threadIdx.x % kGroups;
  const i64 batch_head = i64(batch) * p.heads + head;
  const u16* source = p.query + batch * p.query_strides[0] + head * p.query_strides[1] + 8 * group;
  u8* image = p.query_codes + (batch_head * p.query_rows + block * KEYS) * HEAD_DIM;
  Channels key_mean;
  if (p.lse_shift)
    key_mean = load_mean(p.key_mean + (i64(batch) * p.kv_heads + head / (p.heads / p.kv_heads)) * HEAD_DIM, group);
  constexpr float kLog2E = 1.442695041f;
  constexpr int kPasses = KEYS / kRowsPerPass, kAtOnce = 4;  // loads before a store, which later ones can't overtake
  uint4 raw[kAtOnce];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
#pragma unroll
    for (int ahead = pass; ahead < pass + kAtOnce && pass % kAtOnce == 0; ++ahead) {
      const int row = block * KEYS + ahead * kRowsPerPass + threadIdx.x / kGroups;
      raw[ahead % kAtOnce] = make_uint4(0, 0, 0, 0);
      if (row < p.query_length && 8 * group < p.head_dim)
        raw[ahead % kAtOnce] = *reinterpret_cast<const uint4*>(source + row * p.query_strides[2]);
    }
    const int local = pass * kRowsPerPass + threadIdx.x / kGroups;
    const int row = block * KEYS + local;
    const Channels v = unpack(raw[pass % kAtOnce]);
    u32 largest = 0;
    float dot = 0.f;
#pragma unroll
    for (int c = 0; c < 8; ++c) largest = max(largest, magnitude(v.x[c]));
    if (p.lse_shift)
#pragma unroll
      for (int c = 0; c < 8; ++c) dot = fmaf(v.x[c], key_mean.x[c], dot);
#pragma unroll
    for (int lane = 1; lane < kGroups; lane *= 2) {
      largest = max(largest, __shfl_xor_sync(~0u, largest, lane));
      if (p.lse_shift) dot += __shfl_xor_sync(~0u, dot, lane);
    }
    const Scale scale = make_scale(largest, 127.f);
    if (row >= p.query_rows) continue;
    // The sign of the softmax scale goes to the codes: the kernel wants scales that keep the order of scores.
    *reinterpret_cast<uint2*>(image + image_offset(local, group)) =
        pack_int8(v, p.softmax_scale < 0.f ? -scale.reciprocal : scale.reciprocal);
    if (group == 0) {
      p.query_scale[batch_head * p.query_rows + row] = scale.scale * fabsf(p.softmax_scale) * kLog2E;
      if (p.lse_shift) p.lse_shift[batch_head * p.query_rows + row] = dot * p.softmax_scale;
    }
  }
}

// A thread's rows of the next block are loaded as soon as it has quantised those of this one.
DEVICE void quantize_keys(const Int8Params& p, int first_block, int batch, int head, u32* shared) {
  const int group = threadIdx.x % kGroups;
  const int length = 8 * group < p.head_dim ? valid_keys(p, batch) : 0;
  const i64 batch_head = i64(batch) * p.kv_heads + head;
  const u16* source = p.key + batch * p.key_strides[0] + head * p.key_strides[1] + 8 * group;
  constexpr int kPasses = KEYS / kRowsPerPass;
  uint4 raw[kPasses];
  auto find_row = [&](int block, int pass) { return block * KEYS + pass * kRowsPerPass + threadIdx.x / kGroups; };
  auto load = [&](int block, int pass) {
    const int row = find_row(block, pass);
    raw[pass] = make_uint4(0, 0, 0, 0);
    if (row < length) raw[pass] = *reinterpret_cast<const uint4*>(source + row * p.key_strides[2]);
  };
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) load(first_block, pass);
  const Channels mean = load_mean(p.key_mean + batch_head * HEAD_DIM, group);
#pragma unroll 1
  for (int block = first_block; block >= 0; block -= kClusterSize) {
    u8* image = p.key_codes + (batch_head * p.key_blocks + block) * KEYS * HEAD_DIM;
    u32 largest = 0;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const Channels v = unpack(raw[pass]);
#pragma unroll
      for (int c = 0; c < 8; ++c)
        if (find_row(block, pass) < length) largest = max(largest, magnitude(v.x[c] - mean.x[c]));
    }
#pragma unroll
    for (int lane = 1; lane < 32; lane *= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, lane));
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = largest;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) largest = max(largest, shared[warp]);
    const Scale scale = make_scale(largest, 127.f);
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      Channels v = unpack(raw[pass]);
#pragma unroll
      for (int c = 0; c < 8; ++c) v.x[c] -= mean.x[c];
      const uint2 codes = pack_int8(v, find_row(block, pass) < length ? scale.reciprocal : 0.f);
      if (block >= kClusterSize) load(block - kClusterSize, pass);
      *reinterpret_cast<uint2*>(image + image_offset(pass * kRowsPerPass + threadIdx.x / kGroups, group)) = codes;
    }
    if (threadIdx.x == 0) p.key_scale[batch_head * p.key_blocks + block] = scale.scale;
    __syncthreads();  // before `shared` is used again
  }
}

DEVICE int value_offset(int row, int chunk) {
  constexpr int kChunks = kValueRowBytes / 16;
  const int slab = chunk / kChunks;
  return slab * HEAD_DIM * kValueRowBytes + row * kValueRowBytes +
         ((chunk % kChunks ^ swizzle(row, kValueRowBytes)) << 4);
}

// Order of the image's columns (keys): within each 32, column 16 h + 4 t + b is key 16 h + 8 (b / 2) + 2 t + b % 2,
// so that a thread's accumulators of Q K^T are its A operand of P V. Order of its rows (channels): within each 32, row
// 8 i + 2 t + e is channel 8 t + 2 i + e, so that a thread's outputs are 8 consecutive channels.
// What a thread needs next is loaded before it quantises what it has.
DEVICE void quantize_values(const Int8Params& p, int first_block, int batch, int head, u32* shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr int kPairs = kGroups / 2;  // a warp reads 32 bytes of 16 tokens: two groups of 8 channels
  constexpr int kChunks = KEYS / 16, kChunkStep = 4 * kWarps / kPairs;
  const int group = warp % kPairs * 2 + lane % 2;
  const int quad = lane / 2 % 4, first_chunk = warp / kPairs * 4 + lane / 8;
  const int length = 8 * group < p.head_dim ? valid_keys(p, batch) : 0;
  const i64 batch_head = i64(batch) * p.kv_heads + head;
  const u16* source = p.value + batch * p.value_strides[0] + head * p.value_strides[1] + 8 * group;
  const Channels mean = load_mean(p.value_mean + batch_head * HEAD_DIM, group);
  const Channels scales = load_mean(p.value_scale + batch_head * HEAD_DIM, group);
  float reciprocal[8];
#pragma unroll
  for (int c = 0; c < 8; ++c) reciprocal[c] = scales.x[c] == scales.x[c] ? 1.f / scales.x[c] : 0.f;
  uint4 raw[4];  // tokens 0, 1, 8 and 9 of a thread's 16
  auto load = [&](int block, int chunk, int half) {
#pragma unroll
    for (int i = 2 * half; i < 2 * half + 2; ++i) {
      const int token = block * KEYS + 16 * chunk + 8 * half + 2 * quad + i % 2;
      raw[i] = make_uint4(0, 0, 0, 0);
      if (token < length) raw[i] = *reinterpret_cast<const uint4*>(source + token * p.value_strides[2]);
    }
  };
  load(first_block, first_chunk, 0);
  load(first_block, first_chunk, 1);
#pragma unroll 1
  for (int block = first_block; block >= 0; block -= kClusterSize) {
    float error[8] = {};
#pragma unroll 1
    for (int chunk = first_chunk; chunk < kChunks; chunk += kChunkStep) {
      const bool ends = chunk + kChunkStep >= kChunks;
      const int next_block = ends ? block - kClusterSize : block, next_chunk = ends ? first_chunk : chunk + kChunkStep;
      u32 codes[8] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = block * KEYS + 16 * chunk + 8 * half + 2 * quad;
        const Channels v[2] = {unpack(raw[2 * half]), unpack(raw[2 * half + 1])};
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          const float a = token < length ? (v[0].x[c] - mean.x[c]) * reciprocal[c] : 0.f;
          const float b = token + 1 < length ? (v[1].x[c] - mean.x[c]) * reciprocal[c] : 0.f;
          u16 pair;
          float rounded_a, rounded_b;
          asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(b), "f"(a));
          // Converted a second time, in the other order, because the assemblers of CUDA 12.8 and 12.9 merge a
          // conversion into the word that it is packed into, and then read it for anything else from a register never
          // written.
          asm("{\n.reg .b16 codes, low, high;\n.reg .b32 halves;\n"
              "cvt.rn.satfinite.e4m3x2.f32 codes, %2, %3;\ncvt.rn.f16x2.e4m3x2 halves, codes;\n"
              "mov.b32 {high, low}, halves;\n"
              "cvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}\n"
              : "=f"(rounded_a), "=f"(rounded_b)
              : "f"(a), "f"(b));
          error[c] += (a - rounded_a) + (b - rounded_b);
          codes[c] |= u32(pair) << 16 * half;
        }
        if (next_block >= 0) load(next_block, next_chunk, half);
      }
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const int row = group / 4 * 32 + c / 2 * 8 + group % 4 * 2 + c % 2;
        shared[value_offset(row, chunk) / 4 + quad] = codes[c];
      }
    }
#pragma unroll
    for (int c = 0; c < 8; ++c) {
#pragma unroll
      for (int other = 2; other < 32; other *= 2) error[c] += __shfl_xor_sync(~0u, error[c], other);
      if (lane < 2)
        atomicAdd(p.value_error + batch_head * HEAD_DIM + 8 * group + c, __float2int_rn(error[c] * kErrorUnits));
    }
    __syncthreads();
    uint4* image = reinterpret_cast<uint4*>(p.value_codes + (batch_head * p.key_blocks + block) * KEYS * HEAD_DIM);
#pragma unroll
    for (int i = threadIdx.x; i < KEYS * HEAD_DIM / 16; i += kThreads) image[i] = reinterpret_cast<uint4*>(shared)[i];
    __syncthreads();  // before `shared` is used again
  }
}

// ---- statistics ----------------------------------------------------------------------------------------------------

DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

DEVICE float load_from_cta(const float* pointer, u32 rank) {
  float x;
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %1, %2;\nld.shared::cluster.f32 %0, [remote];\n}\n"
      : "=f"(x)
      : "r"(shared_address(pointer)), "r"(rank)
      : "memory");
  return x;
}

enum Statistic { kSum, kLow, kHigh };

DEVICE float combine(int statistic, float a, float b) {
  return statistic == kLow ? fminf(a, b) : statistic == kHigh ? fmaxf(a, b) : a + b;
}

// Per channel the sum of all valid tokens of a head of K, and of V also the least and the largest value. CTA 0 of the
// cluster gets them, one channel a thread, and calls `finish(channel, values)`.
template <int kStatistics, typename Finish>
DEVICE void gather_statistics(const u16* source, i64 stride, int length, int head_dim, int rank, u32* shared,
                              Finish finish) {
  auto partial = reinterpret_cast<float (*)[kRowsPerPass][HEAD_DIM]>(shared);
  auto totals = reinterpret_cast<float (*)[HEAD_DIM]>(partial + kStatistics);
  const int group = threadIdx.x % kGroups;
  float sums[kStatistics][8];
#pragma unroll
  for (int c = 0; c < 8; ++c)
#pragma unroll
    for (int i = 0; i < kStatistics; ++i) sums[i][c] = i == kLow ? infinity() : i == kHigh ? -infinity() : 0.f;
  const int end = 8 * group < head_dim ? length : 0;
#pragma unroll kStatistics == 1 ? 8 : 4
  for (int row = rank * kRowsPerPass + threadIdx.x / kGroups; row < end; row += kClusterSize * kRowsPerPass) {
    const Channels x = unpack(*reinterpret_cast<const uint4*>(source + 8 * group + row * stride));
#pragma unroll
    for (int c = 0; c < 8; ++c)
#pragma unroll
      for (int i = 0; i < kStatistics; ++i) sums[i][c] = combine(i, sums[i][c], x.x[c]);
  }
#pragma unroll
  for (int i = 0; i < kStatistics; ++i)
#pragma unroll
    for (int c = 0; c < 8; ++c) partial[i][threadIdx.x / kGroups][8 * group + c] = sums[i][c];
  __syncthreads();
  for (int i = threadIdx.x; i < kStatistics * HEAD_DIM; i += kThreads) {
    const int statistic = i / HEAD_DIM, channel = i % HEAD_DIM;
    float total = partial[statistic][0][channel];
    for (int row = 1; row < kRowsPerPass; ++row) total = combine(statistic, total, partial[statistic][row][channel]);
    totals[statistic][channel] = total;
  }
  cluster_sync();
  if (rank == 0 && threadIdx.x < HEAD_DIM) {
    const int channel = threadIdx.x;
    float total[kStatistics];
#pragma unroll
    for (int i = 0; i < kStatistics; ++i) {
      total[i] = totals[i][channel];
#pragma unroll
      for (u32 other = 1; other < kClusterSize; ++other)
        total[i] = combine(i, total[i], load_from_cta(&totals[i][channel], other));
    }
    finish(channel, total);
  }
  cluster_sync();  // all see what CTA 0 wrote, and none leaves while another reads its shared memory
}

DEVICE void prepare_keys(const Int8Params& p, int batch, int head, int rank, u32* shared) {
  const int length = valid_keys(p, batch);
  float* mean = p.key_mean + (i64(batch) * p.kv_heads + head) * HEAD_DIM;
  const u16* source = p.key + batch * p.key_strides[0] + head * p.key_strides[1];
  gather_statistics<1>(
      source, p.key_strides[2], length, p.head_dim, rank, shared,
      [&](int channel, const float (&total)[1]) { mean[channel] = total[kSum] / float(max(length, 1)); });
  if (rank < p.key_blocks) quantize_keys(p, p.key_blocks - 1 - rank, batch, head, shared);
  if (!p.lse_shift) return;
  const int query_heads = p.heads / p.kv_heads, blocks = ceil_div(p.query_rows, KEYS);
  for (int i = rank; i < query_heads * blocks; i += kClusterSize)
    quantize_query(p, i % blocks, batch, head * query_heads + i / blocks);
}

DEVICE void prepare_values(const Int8Params& p, int batch, int head, int rank, u32* shared) {
  const int length = valid_keys(p, batch);
  const i64 start = (i64(batch) * p.kv_heads + head) * HEAD_DIM;
  const u16* source = p.value + batch * p.value_strides[0] + head * p.value_strides[1];
  gather_statistics<3>(source, p.value_strides[2], length, p.head_dim, rank, shared,
                       [&](int channel, const float (&total)[3]) {
                         const float mean = total[kSum] / float(max(length, 1));
                         u32 largest = max(magnitude(total[kHigh] - mean), magnitude(mean - total[kLow]));
                         if (length == 0 || channel >= p.head_dim) largest = 0;
                         p.value_mean[start + channel] = mean;
                         p.value_scale[start + channel] = make_scale(largest, 448.f).scale;
                         p.value_error[start + channel] = 0;
                       });
  if (rank < p.key_blocks) quantize_values(p, p.key_blocks - 1 - rank, batch, head, shared);
}

// ---- launch --------------------------------------------------------------------------------------------------------

// Grid: 2 * 8 * B * Hkv, plus ceil(query_rows / KEYS) * B * H rounded up to whole clusters where no LSE is wanted.
// K and V begin first, because they take longest: with Q between them it took a tenth longer.
extern "C" __global__ void __cluster_dims__(kClusterSize, 1, 1) __launch_bounds__(kThreads, 3)
    int8_sm90_prepare(const __grid_constant__ Int8Params p) {
  constexpr int kStatisticWords = 3 * (kRowsPerPass + 1) * HEAD_DIM, kImageWords = KEYS * HEAD_DIM / 4;
  __shared__ __align__(16) u32 shared[kStatisticWords > kImageWords ? kStatisticWords : kImageWords];
  const int kv_heads = p.batch * p.kv_heads, rank = blockIdx.x % kClusterSize;
  const int cluster = blockIdx.x / kClusterSize, batch_head = cluster % kv_heads;
  const int batch = batch_head / p.kv_heads, head = batch_head % p.kv_heads;
  if (cluster < kv_heads) {
    prepare_values(p, batch, head, rank, shared);
  } else if (cluster < 2 * kv_heads) {
    prepare_keys(p, batch, head, rank, shared);
  } else {
    const int index = blockIdx.x - 2 * kClusterSize * kv_heads, blocks = ceil_div(p.query_rows, KEYS);
    if (index < blocks * p.batch * p.heads)
      quantize_query(p, index % blocks, index / blocks / p.heads, index / blocks % p.heads);
  }
}
