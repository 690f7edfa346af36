// A kernel that checks the machinery around kernels: nothing of it is shipped.
typedef unsigned int u32;

#ifdef SAGE_EMULATE_FP4
extern "C" __device__ u32 sage_emulates_fp4 = 1;
#define SCALE_FACTOR (2.0f * TEST_FACTOR)
#else
#define SCALE_FACTOR (1.0f * TEST_FACTOR)
#endif

struct ScaledCopyParameters {
  const float* source;
  float* destination;
  u32 count;
  float scale;
};
