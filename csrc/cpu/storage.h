// Memory of a whole call that is kept for later ones, so that its pages are not fresh each time.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "arena.h"

namespace fastmeta::cpu {

// Borrows an arena as long as it lives; calls that overlap borrow different ones.
class Storage {
 public:
  explicit Storage(std::size_t bytes);
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;
  ~Storage();
  char* data() const { return data_; }

 private:
  std::unique_ptr<Arena> arena_;
  char* data_;
};

}  // namespace fastmeta::cpu
