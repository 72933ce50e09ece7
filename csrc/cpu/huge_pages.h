// Large results in huge pages: a fresh tensor of a gigabyte costs a quarter of a million page
// faults else, more time than computing what goes into it.
#pragma once

#include <ATen/core/Tensor.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace moe_ext::cpu {

// Advice only: where the system declines, nothing changes.
inline void advise_huge_pages(const at::Tensor& fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  if (!fresh.defined() || fresh.nbytes() < 4 * kHugePage) return;
  const auto begin = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + fresh.nbytes()) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace moe_ext::cpu
