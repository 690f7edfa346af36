// Sizes of the packed operand images (formats/nvfp4_tiles.py defines their contents), and the kinds of masks.
#pragma once

#include "ptx.cuh"

#ifndef HEAD_DIM
#error "compile with -DHEAD_DIM=64, 96 or 128"
#endif

#ifndef QK_FP8
#define QK_FP8 0  // 1: Q and K in MXFP8 (formats/mxfp8_tiles.py); of K's digits in NVFP4 only the second is left
#endif

enum MaskKind : int { MASK_BOOL = 0, MASK_F32 = 1, MASK_F16 = 2, MASK_BF16 = 3 };

constexpr u32 GROUP = 16;        // elements that share a scale
constexpr u32 QUERY_BLOCK = 32;  // query rows that one warp holds and that share a mean
constexpr u32 BLOCKS = 8;        // query blocks of one thread block
constexpr u32 QUERY_TILE = QUERY_BLOCK * BLOCKS;
constexpr u32 KEY_TILE = 64;
constexpr u32 K_STEPS = HEAD_DIM > 64 ? 2 : 1;            // contractions of 64 along head_dim
constexpr u32 QK_STEPS = QK_FP8 ? 2 * K_STEPS : K_STEPS;  // MMAs of Q K^T along head_dim; in MXFP8 of 32 each
constexpr u32 KEY_COLUMNS = KEY_TILE / 8;                 // n-tiles of Q K^T
constexpr u32 VALUE_COLUMNS = HEAD_DIM / 8;               // n-tiles of P V
constexpr u32 VALUE_SCALES = VALUE_COLUMNS > 8 ? 4 : 2;   // words a lane

constexpr u32 QUERY_CODE_BYTES = 2 * QK_STEPS * WARP * 16;
constexpr u32 QUERY_BYTES = QUERY_CODE_BYTES + 2 * WARP * 4;
constexpr u32 MEAN_CODE_BYTES = K_STEPS * WARP * 8;
constexpr u32 MEAN_BYTES = MEAN_CODE_BYTES + WARP * 4;
constexpr u32 KEY_CODE_BYTES = KEY_TILE * QK_STEPS * 32;
constexpr u32 KEY_SCALES = QK_FP8 ? 1 : K_STEPS;  // words a lane for half a tile
constexpr u32 KEY_BYTES = KEY_CODE_BYTES + WARP * 2 * KEY_SCALES * 4;
// K's digits in NVFP4, for delta_s: K and what that misses, or what MXFP8 misses.
constexpr u32 DIGITS = QK_FP8 ? 1 : 2;
constexpr u32 DIGIT_OFFSET = QK_FP8 ? KEY_BYTES : 0;
constexpr u32 DIGIT_CODE_BYTES = KEY_TILE * K_STEPS * 32;
constexpr u32 DIGIT_BYTES = DIGIT_CODE_BYTES + WARP * 2 * K_STEPS * 4;
constexpr u32 VALUE_CODE_BYTES = HEAD_DIM * KEY_TILE / 2;
constexpr u32 VALUE_BYTES = VALUE_CODE_BYTES + WARP * VALUE_SCALES * 4;
constexpr u32 VALUE_OFFSET = DIGIT_OFFSET + DIGITS * DIGIT_BYTES;
constexpr u32 TILE_BYTES = VALUE_OFFSET + VALUE_BYTES;
