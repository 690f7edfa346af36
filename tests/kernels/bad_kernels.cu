// Kernels that the checks of the shipped cubins have to catch.
extern "C" __global__ void __launch_bounds__(1024, 2) spills(float* p) {
  float values[80];
#pragma unroll
  for (int i = 0; i < 80; ++i) values[i] = p[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 80; ++i) p[i * 1024 + threadIdx.x] = values[i] * values[79 - i];
}

extern "C" __global__ void multiplies_matrices(float* p) {
  unsigned a = threadIdx.x;
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, {%4,%4}, {%0,%1,%2,%3};"
      : "+f"(p[0]), "+f"(p[1]), "+f"(p[2]), "+f"(p[3])
      : "r"(a));
}

extern "C" __global__ void shares(float* p) {
  __shared__ float values[333];
  values[threadIdx.x] = p[threadIdx.x];
  __syncthreads();
  p[threadIdx.x] = values[332 - threadIdx.x];
}
