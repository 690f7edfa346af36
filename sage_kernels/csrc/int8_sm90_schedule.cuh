// Which thread block of int8_sm90_attention.cu computes what, for its producer and its consumers alike.
// Compile-time: KEYS of a block, WARPGROUPS of 64 query rows each, SHARE whether they share a last unit.
#pragma once
#include "int8_sm90_params.cuh"

// Rows of one head, 64 for each of the first `units` warpgroups, and the key blocks that they see. Where one unit is
// left for the end, all warpgroups share it (`is_shared`): each takes every WARPGROUPS-th of its key blocks.
struct Tile {
  int batch, head, kv_head, row, units, key_blocks, key_length;
  bool is_shared;
};

// What a thread block computes, one tile after another: in turns with the others, so that blocks at work share their
// keys in the L2 cache, or, where turns would leave many idle in the end, an even share of all rows.
struct Schedule {
  const Int8Params& p;
  int next, end;

  DEVICE Schedule(const Int8Params& p) : p(p) {
    const int units_per_head = ceil_div(p.query_length, 64);
    const int heads = p.batch * p.heads;
    next = blockIdx.x;
    end = heads * ceil_div(units_per_head, WARPGROUPS);
    if (p.even_shares) {
      next = i64(heads) * units_per_head * blockIdx.x / gridDim.x;
      end = i64(heads) * units_per_head * (blockIdx.x + 1) / gridDim.x;
    }
  }

  DEVICE bool advance(Tile& tile) {
    if (next >= end) return false;
    const int units_per_head = ceil_div(p.query_length, 64);
    int batch_head, unit, units = WARPGROUPS;
    if (p.even_shares) {
      batch_head = next / units_per_head;
      unit = next % units_per_head;
      units = min(units, end - next);
    } else {
      const int tiles = ceil_div(units_per_head, WARPGROUPS);
      batch_head = next / tiles;
      unit = next % tiles * WARPGROUPS;
      if (p.is_causal) unit = (tiles - 1) * WARPGROUPS - unit;  // longest first
    }
    tile.units = min(units, units_per_head - unit);
    next += p.even_shares ? tile.units : gridDim.x;
    tile.batch = batch_head / p.heads;
    tile.head = batch_head % p.heads;
    tile.kv_head = tile.batch * p.kv_heads + tile.head / (p.heads / p.kv_heads);
    tile.row = 64 * unit;
    tile.key_length = p.key_length;
    if (p.key_lengths) tile.key_length = max(0, min(p.key_length, p.key_lengths[tile.batch]));
    const int seen = p.is_causal ? min(tile.key_length, tile.row + 64 * tile.units) : tile.key_length;
    tile.key_blocks = ceil_div(seen, KEYS);
    tile.is_shared = SHARE && p.even_shares && next >= end && tile.units == 1 && tile.key_blocks >= 2 * WARPGROUPS;
    return true;
  }
};
