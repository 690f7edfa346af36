// What the backward kernels read of each query besides its channels, by tiles of 64 queries: LSE, -delta and steps of
// dQ, and a scale of the tile.
#pragma once
#include "sm90.cuh"

// As threads have queries in accumulators of transposed scores: thread t of four has 2t and 2t + 1 of every 8. Of LSE
// one 16-byte load brings those of 16 queries, of -delta those of 8, twice. dQ is added up in integer steps; how many
// there are in 1, kQuanta, and how large they are, kSteps, each query has.
constexpr int kDeltas = 64, kQuanta = 192, kSteps = 256, kQueryScale = 320, kRowFloats = 324;  // three unused
DEVICE int lse_place(int query) { return query / 16 * 16 + query % 8 / 2 * 4 + query / 8 % 2 * 2 + query % 2; }
DEVICE int delta_place(int query) { return kDeltas + query / 8 * 16 + query % 8 / 2 * 4 + query % 2; }
