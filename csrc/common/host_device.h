#pragma once

// Marks the functions that the host compiler and nvcc share.
#ifdef __CUDACC__
#define MOE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MOE_HOST_DEVICE inline
#endif
