// A network and its layout as bytes that are right at one address of device memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "call.h"

namespace fastmeta::cuda {

// `evaluates` [K + 1]: whether the query loss after each number of steps is asked for.
std::string image(const Description&, const Layout&, const std::vector<char>& evaluates,
                  uintptr_t address);

}  // namespace fastmeta::cuda
