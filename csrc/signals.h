// Python's signal handlers, run while a step computes without the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include "cpu/interrupt.h"

namespace fastmeta {

// Runs the handlers of signals that have arrived. Throws what one raises; false where handlers are
// another thread's to run.
inline bool handle_signals() {
  namespace py = pybind11;
  thread_local bool is_main = false;  // who once is stays so
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  if (is_main) return true;
  const py::object main = py::module_::import("threading").attr("main_thread")();
  return is_main = main.attr("ident").cast<unsigned long>() == PyThread_get_thread_ident();
}

// Calls `work` without the GIL; signals are answered meanwhile.
template <class Work>
void without_gil(Work work) {
  const pybind11::gil_scoped_release release;
  cpu::interruptible(&handle_signals, work);
}

}  // namespace fastmeta
