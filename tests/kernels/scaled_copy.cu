// destination = source * scale * TEST_FACTOR, by way of dynamic shared memory.
#include "scaled_copy.cuh"

extern "C" __global__ void scaled_copy(const __grid_constant__ ScaledCopyParameters p) {
  extern __shared__ float staged[];
  u32 index = blockIdx.x * blockDim.x + threadIdx.x;
  u32 top = TEST_SHARED_BYTES / 4 - blockDim.x;  // the last words, so that the whole allocation has to be there
  if (index < p.count) staged[top + threadIdx.x] = p.source[index] * p.scale;
  __syncthreads();
  if (index < p.count) p.destination[index] = staged[top + threadIdx.x] * SCALE_FACTOR;
}
