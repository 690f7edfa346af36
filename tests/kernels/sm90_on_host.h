// csrc/sm90.cuh for a host: each thread of a block is a thread, wgmma is computed where it is issued, from the same
// descriptors and swizzles. For csrc/training_sm90_*.cu; what they don't use is not here.
#pragma once
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

using std::max;
using std::min;
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

#define DEVICE inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

struct Dim {
  int x;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint2 {
  u32 x, y;
};
struct uint4 {
  u32 x, y, z, w;
};
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static thread_local Dim threadIdx;
static Dim blockIdx;
alignas(1024) static u8 shared_memory[227 << 10];
static pthread_barrier_t all_threads, warpgroup_threads[4], warp_threads[16];

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
inline void __syncwarp() {}
inline void __syncthreads() { pthread_barrier_wait(&all_threads); }
inline u32 shared_address(const void*) { return 0; }

// ---- mbarrier and bulk copy ----------------------------------------------------------------------------------------

struct Barrier {
  int arrivals, pending, bytes, phase;
};
static Barrier barriers[128];
static std::mutex mutex;

inline void update_barrier(u32 address, int arrivals, int bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  Barrier& b = barriers[address / 8 % 128];
  b.pending -= arrivals;
  b.bytes += bytes;
  if (b.pending == 0 && b.bytes == 0) {
    ++b.phase;
    b.pending = b.arrivals;
  }
}
inline void mbarrier_init(u32 address, u32 n) { barriers[address / 8 % 128] = {int(n), int(n), 0, 0}; }
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(u32 address) { update_barrier(address, 1, 0); }
inline void mbarrier_arrive_expect_bytes(u32 address, u32 bytes) { update_barrier(address, 1, bytes); }
inline void mbarrier_wait(u32 address, u32 parity) {
  for (;;) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      if (u32(barriers[address / 8 % 128].phase & 1) != parity) return;
    }
    usleep(20);
  }
}
inline void bulk_load(u32 destination, const void* source, u32 bytes, u32 barrier) {
  memcpy(shared_memory + destination, source, bytes);
  update_barrier(barrier, 0, -int(bytes));
}

// `map`: address, sizes of D, N, H and B, strides in bytes of the last three.
template <class Map>
inline void load_rows_16bit(u32 destination, int slab_bytes, const Map& map, int row, int head, int heads,
                            u32 barrier) {
  const u64* words = map.words;
  const u8* matrix = reinterpret_cast<const u8*>(words[0]) + head % heads * words[6] + head / heads * words[7];
  for (int slab = 0; slab < HEAD_DIM / 64; ++slab)
    for (int i = 0; i < 64; ++i)
      for (int chunk = 0; chunk < 8; ++chunk) {
        u8* place = shared_memory + destination + slab * slab_bytes + i * 128 + (chunk ^ i % 8) * 16;
        memset(place, 0, 16);
        if (u64(row + i) < words[2] && u64(slab * 64 + chunk * 8) < words[1])
          memcpy(place, matrix + (row + i) * words[5] + slab * 128 + chunk * 16, 16);
      }
  update_barrier(barrier, 0, -(HEAD_DIM / 64) * 64 * 128);
}

static struct {
  unsigned arrived, phase;
} named_barriers[16];

inline unsigned named_barrier_arrive(u32 id, u32 threads) {
  std::lock_guard<std::mutex> lock(mutex);
  auto& barrier = named_barriers[id];
  const unsigned phase = barrier.phase;
  if (++barrier.arrived == threads) barrier.arrived = 0, ++barrier.phase;
  return phase;
}
inline void named_barrier_sync(u32 id, u32 threads) {
  const unsigned phase = named_barrier_arrive(id, threads);
  for (;; usleep(20)) {
    std::lock_guard<std::mutex> lock(mutex);
    if (named_barriers[id].phase != phase) return;
  }
}

template <int kRegisters>
inline void shrink_registers() {}
template <int kRegisters>
inline void grow_registers() {}

// ---- arithmetic ----------------------------------------------------------------------------------------------------

inline float __uint_as_float(u32 x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
inline u32 __float_as_uint(float x) {
  u32 y;
  memcpy(&y, &x, 4);
  return y;
}
inline float __int_as_float(int x) { return __uint_as_float(x); }
inline int __float_as_int(float x) { return int(__float_as_uint(x)); }
inline float infinity() { return INFINITY; }
inline float exp2_approx(float x) { return exp2f(x); }
inline float log2_approx(float x) { return log2f(x); }
inline float reciprocal_approx(float x) { return 1.f / x; }
inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
  const u64 bytes = u64(b) << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; ++i) result |= u32(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
inline u32 to_bfloat16(float x) {
  const u32 bits = __float_as_uint(x);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline u32 pack_bfloat16(float low, float high) { return to_bfloat16(low) | to_bfloat16(high) << 16; }
inline float from_float16(u16 bits) {
  _Float16 x;
  memcpy(&x, &bits, 2);
  return x;
}
inline u32 pack_float16(float low, float high) {
  const _Float16 pair[2] = {_Float16(low), _Float16(high)};
  u32 packed;
  memcpy(&packed, pair, 4);
  return packed;
}

inline int __shfl_sync(u32, int x, int) { return x; }  // of what a warp agrees on
static u32 exchanged[16][32];
inline int __shfl_xor_sync(u32, int x, int mask) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  exchanged[warp][lane] = x;
  pthread_barrier_wait(&warp_threads[warp]);
  const int y = exchanged[warp][lane ^ mask];
  pthread_barrier_wait(&warp_threads[warp]);
  return y;
}
inline float __shfl_xor_sync(u32 all, float x, int mask) {
  return __int_as_float(__shfl_xor_sync(all, __float_as_int(x), mask));
}
inline bool __any_sync(u32 all, bool x) {
  int any = x;
  for (int mask = 1; mask < 32; mask *= 2) any |= __shfl_xor_sync(all, any, mask);
  return any;
}
inline float load_shared_float(u32 address) {
  float x;
  memcpy(&x, shared_memory + address, 4);
  return x;
}
inline u32 load_shared_word(u32 address) {
  u32 x;
  memcpy(&x, shared_memory + address, 4);
  return x;
}
inline void store_shared_word(u32 address, u32 x) { memcpy(shared_memory + address, &x, 4); }
inline uint4 load_shared_words(u32 address) {
  uint4 x;
  memcpy(&x, shared_memory + address, 16);
  return x;
}
inline float4 load_shared(u32 address) {
  float4 x;
  memcpy(&x, shared_memory + address, 16);
  return x;
}
inline void store_shared(u32 address, float4 x) { memcpy(shared_memory + address, &x, 16); }

// ---- wgmma ---------------------------------------------------------------------------------------------------------

template <int kRowBytes>
inline u64 matrix_descriptor(u32 address) {
  constexpr u64 swizzle = kRowBytes == 128 ? 1 : 2, stride = 8 * kRowBytes >> 4;
  return swizzle << 62 | stride << 32 | 1ull << 16 | (address & 0x3ffff) >> 4;
}
template <class T, int kCount>
inline void wgmma_fence(T (&)[kCount]) {}
template <int kPending, class T, int kCount>
inline void wgmma_wait(T (&)[kCount]) {}
inline void wgmma_commit() {}
template <int kCount>
inline void pin_registers(u32 (&)[kCount]) {}
inline void compute_before_waiting(u32) {}

// Where a byte of an operand's row is: the swizzle exchanges address bits 4.. by bits 7...
inline u32 operand_address(u64 descriptor, int row, int byte) {
  const bool is_wide = descriptor >> 62 == 1;
  const u32 start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  const u32 slab =
      is_wide ? byte / 128 * ((descriptor >> 16 & 0x3fff) << 4) : 0;  // of operands whose rows are summed over
  const u32 address = start + slab + row / 8 * stride + row % 8 * (is_wide ? 128 : 64) + (is_wide ? byte % 128 : byte);
  return address ^ (address >> 7 & (is_wide ? 7 : 3)) << 4;
}
inline int operand_code(u64 descriptor, int row, int k) {
  return static_cast<signed char>(shared_memory[operand_address(descriptor, row, k)]);
}
inline float to_float(u16 bits) { return BFLOAT16 ? __uint_as_float(u32(bits) << 16) : from_float16(bits); }
inline float operand_16bit(u64 descriptor, int row, int k) {
  u16 bits;
  memcpy(&bits, shared_memory + operand_address(descriptor, row, 2 * k), 2);
  return to_float(bits);
}

// Row and column of a thread's accumulator, as the PTX ISA has them for wgmma.
inline int fragment_row(int i) { return threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4 + i / 2 % 2 * 8; }
inline int fragment_column(int i) { return i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2; }

template <int kCount>
inline void multiply_codes(u32 (&d)[kCount], u64 a, u64 b, bool accumulates) {
  for (int i = 0; i < kCount; ++i) {
    int sum = accumulates ? d[i] : 0;
    for (int k = 0; k < 32; ++k) sum += operand_code(a, fragment_row(i), k) * operand_code(b, fragment_column(i), k);
    d[i] = sum;
  }
}
template <int kCount>
inline void multiply_16bit(u32 (&d)[kCount], u64 a, u64 b, bool accumulates) {
  for (int i = 0; i < kCount; ++i) {
    float sum = accumulates ? __uint_as_float(d[i]) : 0.f;
    for (int k = 0; k < 16; ++k) sum += operand_16bit(a, fragment_row(i), k) * operand_16bit(b, fragment_column(i), k);
    d[i] = __float_as_uint(sum);
  }
}

// Left operands in registers: 64 rows of 32 bytes of each warpgroup.
static u8 register_operand[4][64][32];
inline auto exchange_operand(const u32* a) -> u8 (&)[64][32] {
  const int warpgroup = threadIdx.x / 128;
  auto& rows = register_operand[warpgroup];
  for (int j = 0; j < 4; ++j) memcpy(&rows[fragment_row(2 * j)][j / 2 * 16 + threadIdx.x % 4 * 4], &a[j], 4);
  pthread_barrier_wait(&warpgroup_threads[warpgroup]);
  return rows;
}

template <int kCount>
inline void multiply_codes(u32 (&d)[kCount], const u32* a, u64 b, bool accumulates) {
  const auto& rows = exchange_operand(a);
  for (int i = 0; i < kCount; ++i) {
    int sum = accumulates ? d[i] : 0;
    for (int k = 0; k < 32; ++k)
      sum += static_cast<signed char>(rows[fragment_row(i)][k]) * operand_code(b, fragment_column(i), k);
    d[i] = sum;
  }
  pthread_barrier_wait(&warpgroup_threads[threadIdx.x / 128]);
}

// Rows of B, and of A in shared memory, are what the product sums over: of 64 columns in 128 bytes.
template <int kCount>
inline void multiply_16bit(float (&d)[kCount], const u32* a, u64 b) {
  const auto& rows = exchange_operand(a);
  for (int i = 0; i < kCount; ++i)
    for (int k = 0; k < 16; ++k) {
      u16 bits;
      memcpy(&bits, &rows[fragment_row(i)][2 * k], 2);
      d[i] += to_float(bits) * operand_16bit(b, k, fragment_column(i));
    }
  pthread_barrier_wait(&warpgroup_threads[threadIdx.x / 128]);
}
inline void multiply_16bit(float (&d)[32], u64 a, u64 b, bool accumulates) {
  for (int i = 0; i < 32; ++i) {
    float sum = accumulates ? d[i] : 0.f;
    for (int k = 0; k < 16; ++k) sum += operand_16bit(a, k, fragment_row(i)) * operand_16bit(b, k, fragment_column(i));
    d[i] = sum;
  }
}

// Rows of 8 numbers of four matrices, where the lane that has the row's number says.
inline void store_matrices(u32 address, const u32* x) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  exchanged[warp][lane] = address;
  pthread_barrier_wait(&warp_threads[warp]);
  for (int i = 0; i < 4; ++i) memcpy(shared_memory + exchanged[warp][8 * i + lane / 4] + lane % 4 * 4, &x[i], 4);
  pthread_barrier_wait(&warp_threads[warp]);
}
inline void shared_stores_fence() {}
inline u32 multiply_pairs(u32 x, u32 y) {
  const float low = to_float(u16(x)) * to_float(u16(y)), high = to_float(x >> 16) * to_float(y >> 16);
  return BFLOAT16 ? pack_bfloat16(low, high) : pack_float16(low, high);
}
inline int round_to_integer(float x) { return static_cast<int>(rintf(x)); }
inline void add_to_global(int* address, int x) { __atomic_fetch_add(address, x, __ATOMIC_RELAXED); }

// ---- launch --------------------------------------------------------------------------------------------------------

// Where there is a warpgroup of producers, it is the first, and its first thread alone works.
template <class Parameters>
inline void launch_on_host(void (*kernel)(Parameters), const Parameters& p, int blocks, int thread_count,
                           bool has_producers) {
  pthread_barrier_init(&all_threads, nullptr, has_producers ? thread_count - 127 : thread_count);
  for (auto& barrier : warpgroup_threads) pthread_barrier_init(&barrier, nullptr, 128);
  for (auto& barrier : warp_threads) pthread_barrier_init(&barrier, nullptr, 32);
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    memset(shared_memory, 0x7f, sizeof shared_memory);
    std::vector<std::thread> threads;
    memset(named_barriers, 0, sizeof named_barriers);
    for (int i = 0; i < thread_count; ++i)
      if (i == 0 || i >= 128 || !has_producers)
        threads.emplace_back([=, &p] {
          threadIdx.x = i;
          kernel(p);
        });
    for (auto& thread : threads) thread.join();
  }
}
