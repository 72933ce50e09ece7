#include <cub/device/device_radix_sort.cuh>

#include "cuda/kernels/ranked_slots.cuh"

namespace moe_ext::cuda::kernels {
namespace {

template <class T>
struct SortWorkspace {
  Key<T>*keys, *sorted_keys;
  int32_t* slots;
  char* memory;
  size_t bytes = 0;

  SortWorkspace(Arena& arena, int64_t N)
      : keys(arena.take<Key<T>>(N)),
        sorted_keys(arena.take<Key<T>>(N)),
        slots(arena.take<int32_t>(N)) {
    sort(nullptr, N, slots, nullptr);
    memory = arena.take<char>(bytes);
  }

  void sort(void* workspace, int64_t N, int32_t* order, cudaStream_t stream) {
    cub::DeviceRadixSort::SortPairs(
        workspace, bytes, static_cast<const Key<T>*>(keys), sorted_keys,
        static_cast<const int32_t*>(slots), order, static_cast<int>(N), 0, 8 * int(sizeof(T)),
        stream);
  }
};

template <class T>
__global__ void weight_keys_kernel(const T* weights, int64_t N, Key<T>* keys, int32_t* slots) {
  const int64_t slot = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (slot >= N) return;
  keys[slot] = descending_key(weights[slot]);
  slots[slot] = static_cast<int32_t>(slot);
}

// All first choices before all second ones.
__global__ void choice_order_kernel(int64_t num_tokens, int64_t K, int32_t* order) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < num_tokens * K) order[i] = static_cast<int32_t>(i % num_tokens * K + i / num_tokens);
}

__global__ void count_routed_kernel(
    const int64_t* ids, int64_t num_tokens, int64_t K, int64_t E, unsigned long long* routed) {
  const int64_t t = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (t < num_tokens && has_choice(ids + t * K, K, E)) atomicAdd(routed, 1ull);
}

__global__ void capacity_limits_kernel(CapacityArgs args, RankedSlots slots) {
  const int64_t e = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (e < args.E) slots.limits[e] = capacity_in(args, slots);
}

__global__ void keep_kernel(RankedSlots slots, int64_t N, int64_t E, int64_t* kept_ids) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= N) return;
  const int64_t e = expert_of_row(slots.offsets, E, i);
  const bool is_kept = e >= 0 && i - slots.offsets[e] < slots.limits[e];
  kept_ids[slots.ranked[i]] = is_kept ? e : -1;
}

}  // namespace

void rank_slots(
    Type type, const CapacityArgs& args, const void* weights, const RankedSlots& slots,
    Arena& arena, cudaStream_t stream) {
  const int64_t N = args.T * args.K, blocks = ceil_div(N, kThreads);
  dispatch_compute(type, [&](auto number) {
    using T = decltype(number);
    SortWorkspace<T> sort(arena, N);
    if (N > 0 && weights) {
      launch(
          weight_keys_kernel<T>, blocks, kThreads, 0, stream, static_cast<const T*>(weights), N,
          sort.keys, sort.slots);
      sort.sort(sort.memory, N, slots.order, stream);
    } else if (N > 0) {
      launch(choice_order_kernel, blocks, kThreads, 0, stream, args.T, args.K, slots.order);
    }
  });
  make_plan(
      IdType::kI64, args.ids, slots.order, N, args.E, nullptr, slots.offsets, slots.ranked,
      arena.take<char>(0), stream);
  cudaMemsetAsync(slots.routed, 0, sizeof(*slots.routed), stream);
  if (args.T == 0) return;
  launch(
      count_routed_kernel, ceil_div(args.T, kThreads), kThreads, 0, stream, args.ids, args.T,
      args.K, args.E, slots.routed);
}

void keep_slots(
    const CapacityArgs& args, const RankedSlots& slots, int64_t* kept_ids, cudaStream_t stream) {
  const int64_t N = args.T * args.K;
  if (N == 0) return;
  launch(keep_kernel, ceil_div(N, kThreads), kThreads, 0, stream, slots, N, args.E, kept_ids);
}

size_t capacity_workspace(Type type, const CapacityArgs& args) {
  Arena arena(nullptr);
  const int64_t N = args.T * args.K;
  RankedSlots(arena, N, args.E);
  dispatch_compute(type, [&](auto number) { SortWorkspace<decltype(number)>(arena, N); });
  return arena.bytes() + plan_workspace(N, args.E);
}

void apply_capacity(
    Type type, const CapacityArgs& args, const void* weights, int64_t* kept_ids, void* workspace,
    cudaStream_t stream) {
  Arena arena(workspace);
  const RankedSlots slots(arena, args.T * args.K, args.E);
  rank_slots(type, args, weights, slots, arena, stream);
  launch(capacity_limits_kernel, ceil_div(args.E, kThreads), kThreads, 0, stream, args, slots);
  keep_slots(args, slots, kept_ids, stream);
}

}  // namespace moe_ext::cuda::kernels
