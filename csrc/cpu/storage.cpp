// Memory of a whole call that is kept for later ones.

#include "storage.h"

#include <mutex>

namespace fastmeta::cpu {
namespace {

// More are given back to the system: of calls that overlapped once.
constexpr std::size_t kMostKept = 2;

struct Kept {
  std::mutex mutex;
  std::vector<std::unique_ptr<Arena>> arenas;
};

// Never destroyed: a storage may outlive whatever is destroyed when the process ends.
Kept& kept() {
  static Kept* const all = new Kept;
  return *all;
}

}  // namespace

Storage::Storage(std::size_t bytes) {
  {
    const std::lock_guard<std::mutex> lock(kept().mutex);
    auto& arenas = kept().arenas;
    if (!arenas.empty()) {
      arena_ = std::move(arenas.back());
      arenas.pop_back();
    }
  }
  if (arena_ == nullptr) arena_ = std::make_unique<Arena>();
  data_ = static_cast<char*>(arena_->at_least(bytes));
}

Storage::~Storage() {
  const std::lock_guard<std::mutex> lock(kept().mutex);
  auto& arenas = kept().arenas;
  if (arenas.size() < kMostKept) arenas.push_back(std::move(arena_));
}

}  // namespace fastmeta::cpu
