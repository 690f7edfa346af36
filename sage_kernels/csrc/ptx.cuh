// Instructions that sm_90a and sm_120a share, one function each.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

constexpr u32 WARP = 32;
constexpr u32 ALL_LANES = 0xFFFFFFFFu;
constexpr float LARGEST_FLOAT = 3.4028234663852886e38f;
#define INFINITE __int_as_float(0x7F800000)

__device__ __forceinline__ u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// threadIdx.x, read anew.
__device__ __forceinline__ u32 thread_index() {
  u32 x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

// The same value, but the compiler must keep it: it would compute cheap ones anew in an inner loop.
__device__ __forceinline__ u32 keep(u32 x) {
  asm volatile("mov.b32 %0, %0;" : "+r"(x));
  return x;
}

__device__ __forceinline__ const u8* keep(const u8* pointer) {
  asm volatile("mov.b64 %0, %0;" : "+l"(pointer));
  return pointer;
}

// Loads that stay where they are written: gathered, they would need a register each.
__device__ __forceinline__ u32 load_global_1(const u8* address) {
  u32 x;
  asm volatile("ld.global.u8 %0, [%1];" : "=r"(x) : "l"(address));
  return x;
}

__device__ __forceinline__ u16 load_global_2(const u8* address) {
  u16 x;
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(x) : "l"(address));
  return x;
}

__device__ __forceinline__ u32 load_global_4(const u8* address) {
  u32 x;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(x) : "l"(address));
  return x;
}

template <u32 OFFSET>
__device__ __forceinline__ uint4 load_shared_16(u32 address) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address), "n"(OFFSET));
  return x;
}

template <u32 OFFSET>
__device__ __forceinline__ uint2 load_shared_8(u32 address) {
  uint2 x;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2 + %3];" : "=r"(x.x), "=r"(x.y) : "r"(address), "n"(OFFSET));
  return x;
}

template <u32 OFFSET>
__device__ __forceinline__ u32 load_shared_4(u32 address) {
  u32 x;
  asm volatile("ld.shared.b32 %0, [%1 + %2];" : "=r"(x) : "r"(address), "n"(OFFSET));
  return x;
}

__device__ __forceinline__ void store_shared_16(u32 address, float x, float y, float z, float w) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
}

__device__ __forceinline__ void store_shared_16(u32 address, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

// Barriers (mbarrier objects) are 8 bytes of shared memory, given by address.
__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_expect_bytes(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ bool barrier_test(u32 barrier, u32 phase) {
  u32 done;
  asm volatile(
      "{\n\t.reg .pred p;\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
      "selp.u32 %0, 1, 0, p;\n\t}"
      : "=r"(done)
      : "r"(barrier), "r"(phase)
      : "memory");
  return done != 0;
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 phase) {
  while (!barrier_test(barrier, phase)) {
  }
}

// One bulk copy from global to shared memory; both addresses and the size are multiples of 16 bytes. (The destination
// is shared::cta: for shared::cluster, compilers add a system call on sm_120.)
__device__ __forceinline__ void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

template <u32 REGISTERS>
__device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <u32 REGISTERS>
__device__ __forceinline__ void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float divide_approx(float x, float y) {
  float quotient;
  asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(quotient) : "f"(x), "f"(y));
  return quotient;
}

// Unlike fmaxf, a NaN wins.
__device__ __forceinline__ float max_nan(float a, float b) {
  float y;
  asm("max.NaN.ftz.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

__device__ __forceinline__ u32 permute_bytes(u32 a, u32 b, u32 selector) {
  u32 y;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(selector));
  return y;
}

// E4M3 of two floats, rounded to nearest even, `low` in the low byte; NaN and infinities give NaN (0x7F) as in
// formats/fp8_e4m3.py.
__device__ __forceinline__ u32 to_e4m3x2(float low, float high) {
  u32 y;
  asm("{\n\t.reg .b16 y, zero;\n\tmov.b16 zero, 0;\n\tcvt.rn.satfinite.e4m3x2.f32 y, %1, %2;\n\t"
      "mov.b32 %0, {y, zero};\n\t}"
      : "=r"(y)
      : "f"(high), "f"(low));
  return y;
}

__device__ __forceinline__ u32 to_e4m3(float x) { return to_e4m3x2(x, 0.0f); }

__device__ __forceinline__ void from_e4m3x2(u32 bytes, float& low, float& high) {
  u32 half2;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(half2) : "h"(static_cast<u16>(bytes)));
  asm("{\n\t.reg .b16 l, h;\n\tmov.b32 {l, h}, %2;\n\tcvt.f32.f16 %0, l;\n\tcvt.f32.f16 %1, h;\n\t}"
      : "=f"(low), "=f"(high)
      : "r"(half2));
}

__device__ __forceinline__ float from_e4m3(u32 byte) {
  float low, high;
  from_e4m3x2(byte, low, high);
  return low;
}

// Two floats as packed bf16 or fp16, `low` in the low half.
__device__ __forceinline__ u32 to_bf16x2(float low, float high) {
  u32 y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

__device__ __forceinline__ u32 to_f16x2(float low, float high) {
  u32 y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

__device__ __forceinline__ float from_f16(u16 bits) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
  return y;
}

__device__ __forceinline__ float from_bf16(u16 bits) { return __uint_as_float(static_cast<u32>(bits) << 16); }

// A number as a type, for loops that the compiler must unroll into template arguments.
template <u32 VALUE>
struct Constant {
  static constexpr u32 value = VALUE;
};
