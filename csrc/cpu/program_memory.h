// Memory of a thread for the registers of programs.
#pragma once

#include <cstddef>

namespace fastmeta::cpu {

// At least so many bytes, aligned to a page. Not inline: what units of several instruction sets share
// must be compiled for none of them.
void* program_memory(std::size_t bytes);

}  // namespace fastmeta::cpu
