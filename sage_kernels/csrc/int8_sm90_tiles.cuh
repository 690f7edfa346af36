// Shared memory of int8_sm90_attention.cu, and the producer that fills it. Compile-time names as there.
#pragma once
#include "int8_sm90_schedule.cuh"

constexpr int kThreads = 128 * (WARPGROUPS + 1);
constexpr int kQueryBytes = 64 * HEAD_DIM;
constexpr int kTileBytes = KEYS * HEAD_DIM;  // of K, and of V
constexpr int kConsumerRegisters = WARPGROUPS == 2 ? 240 : 160;
constexpr int kProducerRegisters = WARPGROUPS == 2 ? 24 : 32;
constexpr int kValueRowBytes = KEYS % 128 == 0 ? 128 : KEYS % 64 == 0 ? 64 : 32;
constexpr int kScores = KEYS / 2;              // S registers of a thread
constexpr int kOutputs = HEAD_DIM / 2;         // O registers of a thread
constexpr int kColumns = kOutputs + 4 * ONES;  // with the row sums: of row lane / 4 first, of 8 rows on third
constexpr int kOnesBytes = ONES * 1024;        // behind each stage of V
static_assert(!ONES || KEYS == 128, "8 rows of ones follow V's in one swizzled image");
constexpr int kParkedBytes = PARK * 128 * kColumns * 4;  // of a warpgroup
static_assert(!PARK || PROMOTE, "sums are parked between promotions");

static_assert(!SHARE || WARPGROUPS <= STAGES, "a ring is advanced by one turn at most");

struct Ring {
  int stage = 0;
  u32 parity = 0;
  DEVICE void advance(int stages = 1) {
    stage += stages;
    if (stage >= STAGES) {
      stage = SHARE ? stage - STAGES : 0;
      parity ^= 1;
    }
  }
};

// Shared memory: Q [WARPGROUPS], K ring, V ring, barriers. Swizzles repeat every 1024 bytes, so tiles start at
// multiples.
struct Shared {
  u32 base;
  static constexpr int kKey = WARPGROUPS * kQueryBytes;
  static_assert(!SHARE || (WARPGROUPS - 1) * 128 * 4 * (kColumns + 4) <= STAGES * kTileBytes,
                "a unit is merged in K's ring");
  static constexpr int kValue = kKey + STAGES * kTileBytes;
  static constexpr int kParked = kValue + STAGES * (kTileBytes + kOnesBytes);
  static constexpr int kBarriers = kParked + WARPGROUPS * kParkedBytes;
  DEVICE u32 query(int warpgroup) const { return base + warpgroup * kQueryBytes; }
  DEVICE u32 key(int stage) const { return base + kKey + stage * kTileBytes; }
  DEVICE u32 value(int stage) const { return base + kValue + stage * (kTileBytes + kOnesBytes); }
  // Of a warpgroup but the first, float4 `index` of its part of a shared unit.
  DEVICE u32 part(int warpgroup, int index, int thread) const {
    return key(0) + ((warpgroup - 1) * (kColumns / 4 + 1) + index) * 2048 + thread % 128 * 16;
  }
  DEVICE u32 parked(int thread) const { return base + kParked + thread / 128 * kParkedBytes + thread % 128 * 16; }
  DEVICE u32 key_full(int stage) const { return base + kBarriers + 8 * stage; }
  DEVICE u32 key_empty(int stage) const { return key_full(STAGES + stage); }
  DEVICE u32 value_full(int stage) const { return key_full(2 * STAGES + stage); }
  DEVICE u32 value_empty(int stage) const { return key_full(3 * STAGES + stage); }
  DEVICE u32 query_full(int warpgroup) const { return key_full(4 * STAGES + warpgroup); }
  DEVICE u32 query_empty(int warpgroup) const { return key_full(4 * STAGES + WARPGROUPS + warpgroup); }
};

DEVICE void produce(const Int8Params& p, const Shared& shared) {
  Ring keys, values;
  u32 query_parities = ~0u;  // a bit for each warpgroup
  Schedule schedule(p);
  Tile tile;
  while (schedule.advance(tile)) {
    const u8* query = p.query_codes + (i64(tile.batch * p.heads + tile.head) * p.query_rows + tile.row) * HEAD_DIM;
    const u8* key = p.key_codes + i64(tile.kv_head) * p.key_blocks * kTileBytes;
    const u8* value = p.value_codes + i64(tile.kv_head) * p.key_blocks * kTileBytes;
    for (int block = 0; block <= tile.key_blocks; ++block) {
      if (block < tile.key_blocks) {
        mbarrier_wait(shared.key_empty(keys.stage), keys.parity ^ 1);
        mbarrier_arrive_expect_bytes(shared.key_full(keys.stage), kTileBytes);
        bulk_load(shared.key(keys.stage), key + i64(block) * kTileBytes, kTileBytes, shared.key_full(keys.stage));
        keys.advance();
      }
      if (block == 0) {
        for (int warpgroup = 0; warpgroup < (tile.is_shared ? WARPGROUPS : tile.units); ++warpgroup) {
          mbarrier_wait(shared.query_empty(warpgroup), query_parities >> warpgroup & 1);
          query_parities ^= 1 << warpgroup;
          mbarrier_arrive_expect_bytes(shared.query_full(warpgroup), kQueryBytes);
          bulk_load(shared.query(warpgroup), query + (tile.is_shared ? 0 : warpgroup) * kQueryBytes, kQueryBytes,
                    shared.query_full(warpgroup));
        }
      } else {
        mbarrier_wait(shared.value_empty(values.stage), values.parity ^ 1);
        mbarrier_arrive_expect_bytes(shared.value_full(values.stage), kTileBytes);
        bulk_load(shared.value(values.stage), value + i64(block - 1) * kTileBytes, kTileBytes,
                  shared.value_full(values.stage));
        values.advance();
      }
    }
  }
}
