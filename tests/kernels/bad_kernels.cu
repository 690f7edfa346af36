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

// What pairs of E4M3 codes, packed into words, lose: two conversions, each read by the word and by the way back.
extern "C" __global__ void loses_a_conversion(const float* p, unsigned* words, float* lost) {
  float error = 0.f;
  unsigned word = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float a = p[threadIdx.x * 4 + 2 * half], b = p[threadIdx.x * 4 + 2 * half + 1];
    unsigned short pair;
    float rounded_a, rounded_b;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(b), "f"(a));
    asm("{\n.reg .b32 halves;\n.reg .b16 low, high;\ncvt.rn.f16x2.e4m3x2 halves, %2;\nmov.b32 {low, high}, halves;\n"
        "cvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}\n"
        : "=f"(rounded_a), "=f"(rounded_b)
        : "h"(pair));
    error += (a - rounded_a) + (b - rounded_b);
    word |= unsigned(pair) << 16 * half;
  }
  words[threadIdx.x] = word;
  lost[threadIdx.x] = error;
}

// Reads what other threads write, without waiting for them.
extern "C" __global__ void races(float* p) {
  __shared__ volatile float values[128];
  values[threadIdx.x] = p[threadIdx.x];
  p[threadIdx.x] = values[127 - threadIdx.x];
}
