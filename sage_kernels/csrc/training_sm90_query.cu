// dQ from the integers that training_sm90_gradients.cu added up. Bound by memory bandwidth.
#define WARPGROUPS 1  // of the header; here a thread block is one
#include "training_sm90.cuh"

struct TrainQueryParams {
  const int* query_sums;  // [B * H, query_tiles][HEAD_DIM / 2][128]: register i of thread t
  const float* rows;      // [B * H, query_tiles][kRowFloats]
  u16* d_query;           // [B * H, Nq, D]
  int query_length, query_tiles, head_dim;
  float factor;  // the softmax scale
};

// Grid: B * H * query_tiles, a warpgroup each.
extern "C" __global__ void __launch_bounds__(128) training_sm90_query(const __grid_constant__ TrainQueryParams p) {
  const int head = blockIdx.x / p.query_tiles, tile = blockIdx.x % p.query_tiles;
  const int* sums = p.query_sums + i64(blockIdx.x) * (64 * HEAD_DIM) + threadIdx.x;
  const float* rows = p.rows + i64(blockIdx.x) * kRowFloats;
  const float* steps = rows + kSteps + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  const float scale = p.factor + rows[kQueryScale] * 0.f;  // NaN where Q was not finite: integers are not
  const float factor[2] = {scale * steps[0], scale * steps[8]};
  float d_query[HEAD_DIM / 2];
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 2; ++i) d_query[i] = static_cast<float>(sums[128 * i]);
  store_rows(p.d_query + i64(head) * p.query_length * p.head_dim, d_query, factor, tile * kQueryTile, p.query_length,
             p.head_dim);
}
