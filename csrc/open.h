// The open passes as a Python class.
#pragma once

#include <pybind11/pybind11.h>

namespace fastmeta {

void bind_open(pybind11::module_& module);

}  // namespace fastmeta
