// In place of torch's: see tests/emulation/emulate.py.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/library.h>

#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(library, key, m) _TORCH_LIBRARY_IMPL(library, CPU, m, C10_UID)

namespace c10::cuda {
inline cudaStream_t getCurrentCUDAStream() { return nullptr; }
}  // namespace c10::cuda
