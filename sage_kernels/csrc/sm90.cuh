// Hopper's instructions as functions, one each: mbarrier, bulk copy, wgmma, register reallocation.
// No header of the host or of CUDA is assumed, so that NVRTC needs no include path.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

#define DEVICE __device__ __forceinline__

DEVICE u32 shared_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// ---- mbarrier and bulk copy ----------------------------------------------------------------------------------------

DEVICE void mbarrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

DEVICE void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DEVICE void mbarrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// For `arrivals` threads at once.
DEVICE void mbarrier_arrive(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

DEVICE void mbarrier_arrive_expect_bytes(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

DEVICE void mbarrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Global to shared; both addresses and `bytes` are multiples of 16. Completes on the barrier's expected bytes.
DEVICE void bulk_load(u32 destination, const void* source, u32 bytes, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(destination),
      "l"(__cvta_generic_to_global(source)), "r"(bytes), "r"(barrier)
      : "memory");
}

// ---- shared memory, by address -------------------------------------------------------------------------------------

DEVICE float4 load_shared(u32 address) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(address));
  return x;
}

DEVICE void store_shared(u32 address, float4 x) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w));
}

DEVICE uint4 load_shared_words(u32 address) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address));
  return x;
}

DEVICE u32 load_shared_word(u32 address) {
  u32 x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address));
  return x;
}

DEVICE void store_shared_word(u32 address, u32 x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

// ---- roles ---------------------------------------------------------------------------------------------------------

template <int kRegisters>
DEVICE void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
DEVICE void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

DEVICE void named_barrier_sync(u32 id, u32 threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

DEVICE void named_barrier_arrive(u32 id, u32 threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- arithmetic ----------------------------------------------------------------------------------------------------

DEVICE float infinity() { return __uint_as_float(0x7f800000); }

// Volatile, as pack_integers: compilers would move it behind a later wait for wgmma.
DEVICE float exp2_approx(float x) {
  float y;
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE float from_float16(u16 bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

// Two integers, given in units of 2^-24, rounded to nearest and negative ones to 0: the bits of float16 denormals.
DEVICE u32 pack_integers(float low, float high) {
  u32 packed;
  asm volatile("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// Four floats as E4M3 bytes, a in the lowest; saturates at 448, NaN stays NaN.
DEVICE u32 pack_e4m3(float a, float b, float c, float d) {
  u32 packed;
  asm("{\n"
      ".reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n"
      "}\n"
      : "=r"(packed)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return packed;
}

DEVICE u32 pack_bfloat16(float low, float high) {
  u32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

DEVICE u32 pack_float16(float low, float high) {
  u32 packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// ---- wgmma ---------------------------------------------------------------------------------------------------------
// Operand lists for asm statements: REGS_n names the first n operands, R_n / F_n are read-write arrays of n.

#define REGS_10(a) "%" #a "0, %" #a "1, %" #a "2, %" #a "3, %" #a "4, %" #a "5, %" #a "6, %" #a "7, %" #a "8, %" #a "9"
#define REGS_32 "{" REGS_10() ", " REGS_10(1) ", " REGS_10(2) ", %30, %31}"
#define REGS_36 "{" REGS_10() ", " REGS_10(1) ", " REGS_10(2) ", %30, %31, %32, %33, %34, %35}"
#define REGS_48 \
  "{" REGS_10() ", " REGS_10(1) ", " REGS_10(2) ", " REGS_10(3) ", %40, %41, %42, %43, %44, %45, %46, %47}"
#define REGS_64 \
  "{" REGS_10() ", " REGS_10(1) ", " REGS_10(2) ", " REGS_10(3) ", " REGS_10(4) ", " REGS_10(5) ", %60, %61, %62, " \
                                                                                                "%63}"
#define REGS_68 \
  "{" REGS_10() ", " REGS_10(1) ", " REGS_10(2) ", " REGS_10(3) ", " REGS_10(4) ", " REGS_10(5) ", %60, %61, %62, %63, " \
  "%64, %65, %66, %67}"

#define ARRAY_8(c, x, i) \
  c(x[i]), c(x[i + 1]), c(x[i + 2]), c(x[i + 3]), c(x[i + 4]), c(x[i + 5]), c(x[i + 6]), c(x[i + 7])
#define ARRAY_32(c, x) ARRAY_8(c, x, 0), ARRAY_8(c, x, 8), ARRAY_8(c, x, 16), ARRAY_8(c, x, 24)
#define ARRAY_36(c, x) ARRAY_32(c, x), c(x[32]), c(x[33]), c(x[34]), c(x[35])
#define ARRAY_48(c, x) ARRAY_32(c, x), ARRAY_8(c, x, 32), ARRAY_8(c, x, 40)
#define ARRAY_64(c, x) ARRAY_48(c, x), ARRAY_8(c, x, 48), ARRAY_8(c, x, 56)
#define ARRAY_68(c, x) ARRAY_64(c, x), c(x[64]), c(x[65]), c(x[66]), c(x[67])

// Shared-memory operand, K-major, rows of kRowBytes with the swizzle of that width; 14-bit fields in units of 16 bytes.
template <int kRowBytes>
DEVICE u64 matrix_descriptor(u32 address) {
  constexpr u64 swizzle = kRowBytes == 128 ? 1 : kRowBytes == 64 ? 2 : 3;
  constexpr u64 stride = 8 * kRowBytes >> 4;
  return (swizzle << 62) | (stride << 32) | (1ull << 16) | ((address & 0x3ffff) >> 4);
}

// Orders this thread's ordinary shared-memory stores before reads by wgmma, which a barrier must still separate.
DEVICE void shared_stores_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Registers that a wgmma in flight reads as its operand A: what writes them stays before this, what reuses them behind.
template <int kCount>
DEVICE void pin_registers(u32 (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(x[i]));
}

// Overloads by accumulator: u32 arrays hold the bits of s32 (QK), float arrays f32 (PV); n registers are n * 2 columns.
// wgmma_fence: ordinary instructions wrote the registers. wgmma_wait: at most kPending groups are still in flight.
// wgmma_qk: accumulator += A (shared) * B (shared), INT8. wgmma_pv: accumulator (+)= A (registers) * B (shared), E4M3.
#define DEFINE_REGISTER_FENCES(type, constraint, count)                                 \
  DEVICE void wgmma_fence(type(&x)[count]) {                                            \
    asm volatile("wgmma.fence.sync.aligned;" : ARRAY_##count(constraint, x)::"memory"); \
  }                                                                                     \
  template <int kPending>                                                               \
  DEVICE void wgmma_wait(type(&x)[count]) {                                             \
    asm volatile("wgmma.wait_group.sync.aligned %" #count ";"                           \
                 : ARRAY_##count(constraint, x)                                         \
                 : "n"(kPending)                                                        \
                 : "memory");                                                           \
  }

#define DEFINE_WGMMA_QK(count, columns, a, b, accumulate)                                                     \
  DEVICE void wgmma_qk(u32(&d)[count], u64 query, u64 key) {                                                  \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #accumulate                                             \
                 ", 0;\n"                                                                                     \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k32.s32.s8.s8 " REGS_##count ", %" #a ", %" #b \
                                                                                            ", p;\n}\n"       \
                 : ARRAY_##count("+r", d)                                                                     \
                 : "l"(query), "l"(key), "n"(1));                                                             \
  }

#define DEFINE_WGMMA_PV(count, columns, a0, a1, a2, a3, b, accumulate)                             \
  DEVICE void wgmma_pv(float (&d)[count], const u32* weights, u64 value, bool accumulates) {       \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #accumulate                                  \
                 ", 0;\n"                                                                          \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k32.f32.e4m3.e4m3 " REGS_##count    \
                 ", {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b ", p, 1, 1;\n}\n"              \
                 : ARRAY_##count("+f", d)                                                          \
                 : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "l"(value), \
                   "r"(static_cast<int>(accumulates)));                                            \
  }

DEFINE_REGISTER_FENCES(u32, "+r", 64)
DEFINE_REGISTER_FENCES(u32, "+r", 48)
DEFINE_REGISTER_FENCES(u32, "+r", 32)
DEFINE_REGISTER_FENCES(float, "+f", 64)
DEFINE_REGISTER_FENCES(float, "+f", 32)
DEFINE_WGMMA_QK(64, 128, 64, 65, 66)
DEFINE_WGMMA_QK(48, 96, 48, 49, 50)
DEFINE_WGMMA_QK(32, 64, 32, 33, 34)
DEFINE_REGISTER_FENCES(float, "+f", 68)
DEFINE_REGISTER_FENCES(float, "+f", 36)
DEFINE_WGMMA_PV(68, 136, 68, 69, 70, 71, 72, 73)
DEFINE_WGMMA_PV(36, 72, 36, 37, 38, 39, 40, 41)
DEFINE_WGMMA_PV(64, 128, 64, 65, 66, 67, 68, 69)
DEFINE_WGMMA_PV(32, 64, 32, 33, 34, 35, 36, 37)
