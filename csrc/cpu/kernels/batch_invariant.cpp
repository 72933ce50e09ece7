#include "cpu/kernels/batch_invariant.h"

#include <atomic>

namespace moe_ext::cpu::kernels {
namespace {

std::atomic<bool> invariant{false};

}  // namespace

bool is_batch_invariant() { return invariant.load(std::memory_order_relaxed); }

void set_batch_invariant(bool enabled) { invariant.store(enabled); }

}  // namespace moe_ext::cpu::kernels
