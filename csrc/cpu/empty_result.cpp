#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include "cpu/memory/block_cache.h"
#include "ops/operands.h"

namespace moe_ext {
namespace cpu {
namespace {

using memory::BlockCache;

// Tells torch's profiler, as torch's own allocator does; sign: 1 for a new block, -1 for one that
// goes.
void report(void* block, int64_t sign) {
  if (!c10::memoryProfilingEnabled()) return;
  const BlockCache::Stats stats = BlockCache::instance().stats();
  c10::reportMemoryUsageToProfiler(
      block, sign * BlockCache::instance().size_of(block), stats.bytes_in_use,
      stats.bytes_in_use + stats.bytes_held, c10::kCPU);
}

// What tensors of large blocks name as their allocator: resize_ comes here, for any size.
struct BlockAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < BlockCache::kLeastBytes) return c10::GetCPUAllocator()->allocate(bytes);
    void* block = BlockCache::instance().allocate(bytes);
    report(block, 1);
    return {block, block, &free, c10::kCPU};
  }
  static void free(void* block) {
    report(block, -1);
    BlockCache::instance().free(block);
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

c10::Allocator* allocator_for(size_t bytes) {
  static BlockAllocator* const blocks = new BlockAllocator;  // as long as any tensor
  if (bytes >= BlockCache::kLeastBytes) return blocks;
  BlockCache::instance().give_back_stale();
  return c10::GetCPUAllocator();
}

}  // namespace
}  // namespace cpu

at::Tensor empty_result(c10::SymIntArrayRef sizes, const at::TensorOptions& options) {
  const auto known = c10::asIntArrayRefSlowOpt(sizes);
  const at::Context& context = at::globalContext();
  const bool filled =
      context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory();
  if (!known || !options.device().is_cpu() || filled) return at::empty_symint(sizes, options);
  const at::ScalarType dtype = c10::typeMetaToScalarType(options.dtype());
  const size_t bytes =
      at::detail::computeStorageNbytesContiguous(*known, options.dtype().itemsize());
  return at::detail::empty_generic(
      *known, cpu::allocator_for(bytes), c10::DispatchKeySet(c10::DispatchKey::CPU), dtype,
      std::nullopt);
}

}  // namespace moe_ext
