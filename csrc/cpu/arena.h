// Memory of a thread that is kept from call to call.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastmeta::cpu {

// Memory that grows and is kept, one for each thread.
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { std::free(data_); }
  void* at_least(std::size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      const std::size_t page = bytes < kHugePage ? kAlignment : kHugePage;
      const std::size_t whole = (bytes + page - 1) / page * page;
      data_ = std::aligned_alloc(page, whole);
      if (data_ == nullptr) throw std::bad_alloc();
#if defined(__linux__)
      // Only asked for: without huge pages it is as right, and slower.
      if (page == kHugePage) madvise(data_, whole, MADV_HUGEPAGE);
#endif
      size_ = whole;
    }
    return data_;
  }

 private:
  static constexpr std::size_t kAlignment = 4096, kHugePage = 2 << 20;

  void* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace fastmeta::cpu
