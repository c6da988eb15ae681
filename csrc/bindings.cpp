// The Python face of the compiled kernels: fastmeta._C.

#include <pybind11/pybind11.h>

#include <string>

#include "cpu/features.h"
#include "fused.h"
#include "layered.h"
#include "open.h"
#include "programs.h"

namespace fastmeta {
namespace {

namespace py = pybind11;

py::dict cpu_features() {
  py::dict result;
  for (const cpu::Feature& feature : cpu::features()) result[feature.name] = feature.live;
  return result;
}

std::string compiler() {
#if defined(__clang__)
  return std::string("Clang ") + __clang_version__;
#elif defined(__GNUC__)
  return std::string("GCC ") + __VERSION__;
#elif defined(_MSC_VER)
  return "MSVC " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "fastmeta's compiled kernels; called through fastmeta, never directly.";
  module.def(
      "version", [] { return FASTMETA_VERSION; }, "The fastmeta version this was built for.");
  module.def("cpu_features", &cpu_features, "Which instruction sets this processor has.");
  bind_programs(module);
  bind_fused(module);
  bind_layered(module);
  bind_open(module);
  module.def("compiler", &compiler, "The compiler that built this module.");
}

}  // namespace fastmeta
