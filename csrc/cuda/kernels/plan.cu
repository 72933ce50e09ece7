#include <cub/device/device_radix_sort.cuh>

#include "common/score_function.h"
#include "cuda/kernels/device.cuh"

namespace moe_ext::cuda::kernels {
namespace {

// Skipped slots sort behind all experts.
template <class Id>
__global__ void plan_keys_kernel(
    const Id* ids, const int32_t* order, int64_t N, int64_t E, uint32_t* keys, int32_t* slots) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= N) return;
  const int64_t slot = order ? order[i] : i;
  const Id id = slot < 0 ? Id(-1) : ids[slot];
  keys[i] = static_cast<uint32_t>(is_valid(id, E) ? id : E);
  slots[i] = static_cast<int32_t>(slot);
}

// keys [N] ascending. A place where they grow from a to b begins the experts a + 1 to b.
__global__ void plan_rows_kernel(
    const uint32_t* keys, const int32_t* slot_of_row, int64_t N, int64_t E, int32_t* row_map,
    int32_t* expert_offsets) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row > N) return;
  const int64_t before = row == 0 ? int64_t(-1) : int64_t(keys[row - 1]);
  const int64_t here = row == N ? E : int64_t(keys[row]);
  for (int64_t e = before + 1; e <= here; ++e) expert_offsets[e] = static_cast<int32_t>(row);
  if (row == N || !row_map || slot_of_row[row] < 0) return;
  row_map[slot_of_row[row]] = here < E ? static_cast<int32_t>(row) : -1;
}

__global__ void invert_kernel(const int32_t* row_map, int64_t N, int32_t* slot_of_row) {
  const int64_t slot = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (slot < N && row_map[slot] >= 0) slot_of_row[row_map[slot]] = static_cast<int32_t>(slot);
}

int key_bits(int64_t E) {
  int bits = 1;
  while ((int64_t(1) << bits) <= E) ++bits;  // E itself is a key
  return bits;
}

struct PlanWorkspace {
  uint32_t *keys, *sorted_keys;
  int32_t* slots;
  char* sort;
  size_t sort_bytes = 0, bytes;

  // Without data: only the sizes.
  PlanWorkspace(void* data, int64_t N, int64_t E) {
    Arena arena(data);
    keys = arena.take<uint32_t>(N);
    sorted_keys = arena.take<uint32_t>(N);
    slots = arena.take<int32_t>(N);
    cub::DeviceRadixSort::SortPairs(
        nullptr, sort_bytes, keys, sorted_keys, slots, slots, static_cast<int>(N), 0, key_bits(E));
    sort = arena.take<char>(sort_bytes);
    bytes = arena.bytes();
  }
};

}  // namespace

size_t plan_workspace(int64_t N, int64_t E) { return PlanWorkspace(nullptr, N, E).bytes; }

void make_plan(
    IdType type, const void* ids, const int32_t* order, int64_t N, int64_t E, int32_t* row_map,
    int32_t* expert_offsets, int32_t* slot_of_row, void* workspace_data, cudaStream_t stream) {
  PlanWorkspace workspace(workspace_data, N, E);
  if (N > 0) {
    dispatch_ids(type, ids, [&](const auto* typed) {
      launch(
          plan_keys_kernel<std::decay_t<decltype(*typed)>>, ceil_div(N, kThreads), kThreads, 0,
          stream, typed, order, N, E, workspace.keys, workspace.slots);
    });
    cub::DeviceRadixSort::SortPairs(
        workspace.sort, workspace.sort_bytes, workspace.keys, workspace.sorted_keys,
        workspace.slots, slot_of_row, static_cast<int>(N), 0, key_bits(E), stream);
  }
  launch(
      plan_rows_kernel, ceil_div(N + 1, kThreads), kThreads, 0, stream,
      static_cast<const uint32_t*>(workspace.sorted_keys), static_cast<const int32_t*>(slot_of_row),
      N, E, row_map, expert_offsets);
}

void invert_row_map(const int32_t* row_map, int64_t N, int32_t* slot_of_row, cudaStream_t stream) {
  if (N == 0) return;
  launch(invert_kernel, ceil_div(N, kThreads), kThreads, 0, stream, row_map, N, slot_of_row);
}

}  // namespace moe_ext::cuda::kernels
