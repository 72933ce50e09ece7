#include "cpu/memory/system.h"

#ifdef __linux__
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#else
#include <cstdlib>
#endif

namespace moe_ext::cpu::memory {

#ifdef __linux__

void* map_block(int64_t bytes) {
  const int64_t length = bytes + kHugePage;
  void* mapped = mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* begin = static_cast<char*>(mapped);
  char* block = reinterpret_cast<char*>(
      round_up(static_cast<int64_t>(reinterpret_cast<uintptr_t>(begin)), kHugePage));
  if (block > begin) munmap(begin, block - begin);
  if (block + bytes < begin + length) munmap(block + bytes, begin + length - (block + bytes));
#ifdef MADV_HUGEPAGE
  madvise(block, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);  // advice only
#endif
  return block;
}

void unmap_block(void* block, int64_t bytes) { munmap(block, bytes); }

void discard(void* begin, int64_t bytes) { madvise(begin, bytes, MADV_DONTNEED); }

bool read_process_memory(int64_t* now, int64_t* highest) {
  const int file = open("/proc/self/status", O_RDONLY | O_CLOEXEC);
  if (file < 0) return false;
  char text[4096];
  const ssize_t length = read(file, text, sizeof(text) - 1);
  close(file);
  if (length <= 0) return false;
  text[length] = 0;
  const auto field = [&](const char* name, int64_t* bytes) {
    const char* found = std::strstr(text, name);
    long long kib = 0;
    if (!found || std::sscanf(found + std::strlen(name), " %lld", &kib) != 1) return false;
    *bytes = kib * 1024;
    return true;
  };
  return field("VmRSS:", now) && field("VmHWM:", highest);
}

#else

void* map_block(int64_t bytes) { return std::aligned_alloc(kPage, bytes); }
void unmap_block(void* block, int64_t) { std::free(block); }
void discard(void*, int64_t) {}
bool read_process_memory(int64_t*, int64_t*) { return false; }

#endif

}  // namespace moe_ext::cpu::memory
