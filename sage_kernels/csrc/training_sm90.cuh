// What the kernels that multiply share: parameters of the backward pass, wgmma, rows of results. Compile-time: HEAD_DIM
// 64 | 128, to which tiles are padded; BFLOAT16 1 | 0 (float16), of all 16-bit numbers; WARPGROUPS of consumers.
#pragma once
#include "training_sm90_rows.cuh"

// A CUtensorMap: of a matrix [B, H, N, D] of 16 bits in any strides, copied in boxes of 64 rows and 64 channels.
struct alignas(64) TensorMap {
  u64 words[16];
};

// Tiles of codes as training_sm90_quantize.cu lays them out: rows of 64 or 128 bytes, 16-byte chunks swizzled as wgmma
// reads them.
struct TrainParams {
  TensorMap d_output, value;
  TensorMap query_16bit, key_16bit;  // the second of K without its mean
  const u8* query;                   // [B * H, query_tiles][64][HEAD_DIM]: codes
  float* rows;                       // [B * H, query_tiles][kRowFloats]
  const u8* key;                     // [B * Hkv, key_tiles][128][HEAD_DIM]: codes
  const float* key_scales;           // [B * Hkv, key_tiles]
  int* query_sums;                   // [B * H, query_tiles][HEAD_DIM / 2][128]: dQ in integer steps, at first 0
  u16* d_key;                        // [B * Hkv, Nk, D]
  u16* d_value;
  int heads, kv_heads, query_length, key_length, query_tiles, key_tiles, head_dim, is_causal;
  float softmax_scale;  // not negative: its sign is in the codes of Q
  float query_sign;
  u64 unused[4];  // up to the size that tensor maps ask for
};

constexpr int kQueryTile = 64, kKeyTile = 128;
constexpr int kWarpgroups = WARPGROUPS;  // of consumers, 2 | 3
constexpr int kThreads = 128 * (kWarpgroups + 1);
constexpr int kConsumerRegisters = kWarpgroups == 2 ? 240 : 160, kProducerRegisters = kWarpgroups == 2 ? 24 : 32;
constexpr int kSlabs = HEAD_DIM / 64;  // of 16-bit rows: 64 channels are the 128 bytes that a swizzle spans
constexpr float kLog2E = 1.4426950408889634f;

struct Ring {
  int stage = 0;
  u32 parity = 0;
  template <int kStages>
  DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

DEVICE float load_shared_float(u32 address) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address));
  return x;
}

// 64 rows from `row` on of one head, swizzled as wgmma reads them, in slabs of 64 channels so many bytes apart; zero
// where the matrix ends. `head` is of all batches, which have `heads` each.
DEVICE void load_rows_16bit(u32 destination, int slab_bytes, const TensorMap& map, int row, int head, int heads,
                            u32 barrier) {
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab)
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%2, %3, %4, %5}], [%6];" ::"r"(destination + slab * slab_bytes),
        "l"(&map), "r"(slab * 64), "r"(row), "r"(head % heads), "r"(head / heads), "r"(barrier)
        : "memory");
}

// Four matrices of 8 rows of 8 numbers of 16 bits: lane l has where row l % 8 of matrix l / 8 goes.
DEVICE void store_matrices(u32 address, const u32* x) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]), "r"(x[1]),
               "r"(x[2]), "r"(x[3])
               : "memory");
}

// Two 16-bit numbers by two.
DEVICE u32 multiply_pairs(u32 x, u32 y) {
  u32 product;
#if BFLOAT16
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(x), "r"(y));
#else
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(x), "r"(y));
#endif
  return product;
}

DEVICE int round_to_integer(float x) { return __float2int_rn(x); }

DEVICE void add_to_global(int* address, int x) {
  asm volatile("red.global.add.s32 [%0], %1;" ::"l"(__cvta_generic_to_global(address)), "r"(x) : "memory");
}

// Never stores, for P is not negative; but the assembler lets no later wait pass this, and so what P needs.
DEVICE void compute_before_waiting(u32 weight) {
  asm volatile("{\n.reg .pred p;\nsetp.lt.s32 p, %0, 0;\n@p st.shared.u32 [%0], %0;\n}\n" ::"r"(weight) : "memory");
}

// ---- wgmma, on registers that hold S, dP and products in turn, as bits ----------------------------------------------
// multiply_codes: INT8, A and B in shared memory, or A in registers. multiply_16bit: float32 sums, both in shared
// memory; further down, with operands whose rows are what the product sums over.
#if BFLOAT16
#define WGMMA_16BIT "f32.bf16.bf16"
#else
#define WGMMA_16BIT "f32.f16.f16"
#endif

#define DEFINE_TRAIN_WGMMA(count, columns, a0, a1, a2, a3, b, accumulate)                                          \
  DEVICE void multiply_codes(u32(&d)[count], u64 a, u64 b_matrix, bool accumulates) {                              \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #a2                                                          \
                 ", 0;\n"                                                                                          \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k32.s32.s8.s8 " REGS_##count ", %" #a0 ", %" #a1    \
                                                                                            ", p;\n}\n"            \
                 : ARRAY_##count("+r", d)                                                                          \
                 : "l"(a), "l"(b_matrix), "r"(static_cast<int>(accumulates)));                                     \
  }                                                                                                                \
  DEVICE void multiply_16bit(u32(&d)[count], u64 a, u64 b_matrix, bool accumulates) {                              \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #a2                                                          \
                 ", 0;\n"                                                                                          \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k16." WGMMA_16BIT " " REGS_##count                  \
                 ", %" #a0 ", %" #a1 ", p, 1, 1, 0, 0;\n}\n"                                                       \
                 : ARRAY_##count("+r", d)                                                                          \
                 : "l"(a), "l"(b_matrix), "r"(static_cast<int>(accumulates)));                                     \
  }                                                                                                                \
  DEVICE void multiply_codes(u32(&d)[count], const u32* a, u64 b_matrix, bool accumulates) {                       \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #accumulate                                                  \
                 ", 0;\n"                                                                                          \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k32.s32.s8.s8 " REGS_##count                        \
                 ", {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b ", p;\n}\n"                                    \
                 : ARRAY_##count("+r", d)                                                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_matrix), "r"(static_cast<int>(accumulates))); \
  }

DEFINE_TRAIN_WGMMA(32, 64, 32, 33, 34, 35, 36, 37)
DEFINE_TRAIN_WGMMA(64, 128, 64, 65, 66, 67, 68, 69)

// What the product sums over is what B's rows are. A is in registers, and the first adds to d; or its rows are, too.
DEVICE void multiply_16bit(float (&d)[32], const u32* a, u64 b_matrix) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16." WGMMA_16BIT " " REGS_32
               ", {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
               : ARRAY_32("+f", d)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_matrix));
}
DEVICE void multiply_16bit(float (&d)[64], const u32* a, u64 b_matrix) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16." WGMMA_16BIT " " REGS_64
               ", {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
               : ARRAY_64("+f", d)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_matrix));
}
DEVICE void multiply_16bit(float (&d)[32], u64 a_matrix, u64 b_matrix, bool accumulates) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16." WGMMA_16BIT " " REGS_32 ", %32, %33, p, 1, 1, 1, 1;\n}\n"
      : ARRAY_32("+f", d)
      : "l"(a_matrix), "l"(b_matrix), "r"(static_cast<int>(accumulates)));
}

// matrix_descriptor of `address` in units of 16 bytes + `offset` bytes, in few instructions.
template <int kRowBytes>
DEVICE u64 operand(u32 address, int offset) {
  const u64 zero = matrix_descriptor<kRowBytes>(0);
  return zero >> 32 << 32 | (address + static_cast<u32>(zero) + (offset >> 4));
}

// S or its transpose: rows of HEAD_DIM codes each.
template <int kCount>
DEVICE void issue_scores(u32 (&scores)[kCount], u32 left, u32 right) {
  const u64 a = operand<HEAD_DIM>(left, 0), b = operand<HEAD_DIM>(right, 0);
  wgmma_fence(scores);
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 32; ++step) multiply_codes(scores, a + 2 * step, b + 2 * step, step > 0);
  wgmma_commit();
}

// dP or its transpose, added to sums if so: slabs of 64 channels, so many bytes apart.
template <int kCount>
DEVICE void issue_weight_gradients(u32 (&sums)[kCount], u32 left, int left_slab, u32 right, int right_slab,
                                   bool accumulates = false) {
  wgmma_fence(sums);
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab) {
    const u64 a = operand<128>(left, slab * left_slab), b = operand<128>(right, slab * right_slab);
#pragma unroll
    for (int step = 0; step < 4; ++step)
      multiply_16bit(sums, a + 2 * step, b + 2 * step, accumulates || slab + step > 0);
  }
  wgmma_commit();
}

// Codes times a transposed tile with rows of kTokens bytes.
template <int kTokens, int kCount, int kCodes>
DEVICE void issue_product(u32 (&product)[kCount], u32 (&codes)[kCodes], u32 right, int offset = 0) {
  const u64 b = operand<kTokens>(right, offset);
  pin_registers(codes);
  wgmma_fence(product);
#pragma unroll
  for (int step = 0; step < kTokens / 32; ++step) multiply_codes(product, codes + 4 * step, b + 2 * step, step > 0);
  wgmma_commit();
}

constexpr int kSlabBytes = 64 * 128;

// An operand whose rows are what a product sums over; 16 of them are 2048 bytes.
DEVICE u64 operand_rows(u32 address) {
  constexpr u64 slab = u64(kSlabBytes / 16 - 1) << 16;
  return operand<128>(address, 0) + slab;
}

// Adds a product whose right operand's rows are what it sums over.
template <int kCount, int kLeft>
DEVICE void issue_product(float (&sums)[kCount], u32 (&left)[kLeft], u32 right) {
  const u64 b = operand_rows(right);
  pin_registers(left);
  wgmma_fence(sums);
#pragma unroll
  for (int step = 0; step < kLeft / 4; ++step) multiply_16bit(sums, left + 4 * step, b + 128 * step);
  wgmma_commit();
}

// ---- results in registers ------------------------------------------------------------------------------------------
// A thread holds rows lane / 4 and lane / 4 + 8 of its warp's 16: register i of an accumulator is of row i / 2 % 2.

// The largest of a row over the four threads that share it.
DEVICE int row_maximum(int x) {
  x = max(x, __shfl_xor_sync(~0u, x, 1));
  return max(x, __shfl_xor_sync(~0u, x, 2));
}

// Accumulators as left operand.
template <int kCount>
DEVICE void pack(u32 (&packed)[kCount / 2], const u32 (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const float low = __uint_as_float(x[2 * i]), high = __uint_as_float(x[2 * i + 1]);
    packed[i] = BFLOAT16 ? pack_bfloat16(low, high) : pack_float16(low, high);
  }
}

// Rows of a warpgroup to [.., head_dim], row `first` + those of the thread, up to `length`.
template <int kCount>
DEVICE void store_rows(u16* output, const float (&sums)[kCount], const float (&factor)[2], int first, int length,
                       int head_dim) {
  const int lane = threadIdx.x % 32, row = first + threadIdx.x / 32 % 4 * 16 + lane / 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (row + 8 * r >= length) continue;
    u16* line = output + i64(row + 8 * r) * head_dim;
#pragma unroll
    for (int i = 2 * r; i < kCount; i += 4) {
      const int column = i / 4 * 8 + lane % 4 * 2;
      const float low = sums[i] * factor[r], high = sums[i + 1] * factor[r];
      if (column < head_dim)
        *reinterpret_cast<u32*>(line + column) = BFLOAT16 ? pack_bfloat16(low, high) : pack_float16(low, high);
    }
  }
}
