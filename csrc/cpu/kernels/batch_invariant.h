// The batch-invariant mode: every product takes one order of summing, whatever the number of rows.
#pragma once

namespace moe_ext::cpu::kernels {

// Of the whole process; operators read it once, when they begin.
bool is_batch_invariant();
void set_batch_invariant(bool enabled);

}  // namespace moe_ext::cpu::kernels
