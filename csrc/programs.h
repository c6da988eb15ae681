// Adds the programs of expressions to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace fastmeta {

void bind_programs(pybind11::module_& module);

}  // namespace fastmeta
