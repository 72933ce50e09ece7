// All kernels, for the host; cuda_emulation.h comes before everything.
#include "cuda/kernels/aux_loss.cu"
#include "cuda/kernels/experts.cu"
#include "cuda/kernels/grouped_gemm.cu"
#include "cuda/kernels/pairs.cu"
#include "cuda/kernels/plan.cu"
#include "cuda/kernels/router.cu"
#include "cuda/kernels/unpermute.cu"
