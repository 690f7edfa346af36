// Sizes that the parts of kv_cache_decode.cu share.
#pragma once
#include "kv_cache_params.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef ROW_TILES
#define ROW_TILES 1
#endif

#ifndef BLOCKS  // of a multiprocessor, at least: one fewer for the compilers of Blackwell, which would spill
#define BLOCKS ((HEAD_DIM == 64 ? 5 : 4) - ROW_TILES - (__CUDA_ARCH__ >= 1200))
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
