// The convolutional meta-step as a Python class.
#pragma once

#include <pybind11/pybind11.h>

namespace fastmeta {

void bind_layered(pybind11::module_& module);

}  // namespace fastmeta
