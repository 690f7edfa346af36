// Parameters of the attention kernel, its work items, and the ring of stages in shared memory.
#pragma once

#include "nvfp4_images.cuh"

#ifndef MASK
#error "compile with -DMASK=0 or 1"
#endif

struct Parameters {
  const u8* queries;           // [B, H, query tiles, BLOCKS] images
  const u8* means;             // [B, H, query tiles] images
  const u8* keys_values;       // [B, Hkv, key tiles] images
  const float* query_factors;  // [B, H, query tiles, BLOCKS]: what one unit of the packed Q is worth
  const float* key_factors;    // [B, Hkv]
  const float* value_factors;  // [B, Hkv]
  const float* value_means;    // [B, Hkv, HEAD_DIM]
  const float* lse_shifts;     // [B, H, Nq] q . mean(k), or null
  const int* key_lengths;      // [B], or null
  const u8* mask;              // or null
  const u8* tile_seen;         // [mask B, mask H, query tiles, key tiles]: 0 where the mask hides all, or null
  void* output;                // [B, H, Nq, head_dim], bf16 or fp16
  float* lse;                  // [B, H, Nq], or null
  i64 output_strides[3];       // of B, H and N, in elements; head_dim is contiguous
  i64 mask_strides[4];         // in elements
  i64 tile_seen_strides[2];    // of B and H
  int batch, heads, kv_heads, query_length, key_length, head_dim, query_tiles, key_tiles;
  int causal, output_is_bf16, mask_kind;
  float scale_log2e;  // |softmax scale| * log2(e)
  float scale;        // softmax scale, for LSE
};

constexpr u32 CORRECTION_WARPS = 4;
constexpr u32 THREADS = (CORRECTION_WARPS + BLOCKS) * WARP;
constexpr u32 DELTA_BYTES =
    BLOCKS * KEY_TILE * 8;  // each value twice: a whole accumulator fragment is one 16-byte load
constexpr u32 STAGE_BYTES = TILE_BYTES + DELTA_BYTES + 32;  // and three barriers
// In MXFP8 the last steps of Q along head_dim, for which there are no registers, wait behind the stages.
constexpr u32 PARKED_STEPS = QK_FP8 && HEAD_DIM > 64 ? 2 + MASK : 0;
constexpr u32 STAGES = QK_FP8 ? (HEAD_DIM > 64 ? 3 : 7) : (HEAD_DIM > 64 ? 5 : 9);
constexpr u32 HELD_STEPS = QK_STEPS - PARKED_STEPS;
constexpr u32 PARKED_BYTES = PARKED_STEPS * 2 * WARP * 16;  // of one consumer warp
constexpr u32 CORRECTION_REGISTERS = 40;
constexpr u32 CONSUMER_REGISTERS = 232;

extern __shared__ __align__(128) u8 memory[];

// Where a consumer lane's words of the parked steps of Q are: behind the stages.
__device__ __forceinline__ u32 parked_address(u32 thread) {
  u32 consumer = thread - CORRECTION_WARPS * WARP;
  return shared_address(memory) + STAGES * STAGE_BYTES + consumer / WARP * PARKED_BYTES + consumer % WARP * 16;
}

// A position in the ring of stages: the address of a stage, and two bits: whether the ring went round an odd number of
// times, and whether the tile is taken a second time.
struct Pipeline {
  u32 stage, bits;

  __device__ __forceinline__ Pipeline() : stage(shared_address(memory)), bits(0) {}
  __device__ __forceinline__ u32 phase() const { return bits & 1; }
  __device__ __forceinline__ bool second_time() const { return bits & 2; }
  __device__ __forceinline__ void stay() { bits |= 2; }
  __device__ __forceinline__ void advance() {
    bits &= 1;
    stage += STAGE_BYTES;
    if (stage == shared_address(memory) + STAGES * STAGE_BYTES) stage = shared_address(memory), bits ^= 1;
  }
  // Barriers: the tile has arrived; delta_s is beside it; consumers are done with both.
  __device__ __forceinline__ u32 full() const { return stage + TILE_BYTES + DELTA_BYTES; }
  __device__ __forceinline__ u32 corrected() const { return full() + 8; }
  __device__ __forceinline__ u32 empty() const { return full() + 16; }
};

// One work item: 256 query rows of one head.
struct Item {
  u32 batch, head, kv_head, query_tile, tiles;
  int keys;
  const u8* tile_seen;
};

__device__ __forceinline__ u32 item_count(const Parameters& p) { return u32(p.batch) * p.heads * p.query_tiles; }

__device__ __forceinline__ Item get_item(const Parameters& p, u32 index) {
  Item item;
  u32 head_index = index / p.query_tiles;
  item.query_tile = index % p.query_tiles;
  if (p.causal) item.query_tile = p.query_tiles - 1 - item.query_tile;  // the longest first
  item.batch = head_index / p.heads;
  item.head = head_index % p.heads;
  item.kv_head =
      item.batch * p.kv_heads + item.head / (keep(u32(p.heads)) / p.kv_heads);  // no register for a whole item
  item.keys = p.key_length;
  if (p.key_lengths) item.keys = max(0, min(item.keys, p.key_lengths[item.batch]));
  int last = item.keys;
  if (p.causal) last = min(last, int((item.query_tile + 1) * QUERY_TILE));
  item.tiles = (last + KEY_TILE - 1) / KEY_TILE;
  item.tile_seen = nullptr;
  if (MASK)
    item.tile_seen = p.tile_seen + item.batch * p.tile_seen_strides[0] + item.head * p.tile_seen_strides[1] +
                     i64(item.query_tile) * p.key_tiles;
  return item;
}

__device__ __forceinline__ bool is_skipped(const Item& item, u32 tile) { return MASK && item.tile_seen[tile] == 0; }
