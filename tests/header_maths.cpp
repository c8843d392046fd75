// Lets Python tests call the torch-free headers directly: numbers in, numbers out. Built by tests/conftest.py, never
// installed.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(header_maths, m) { m.doc() = "The torch-free headers of csrc/"; }
