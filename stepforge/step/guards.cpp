// The guards of a kept plan, in C++: a placeholder with one function that needs torch's headers.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <torch/csrc/autograd/python_variable.h>
#include <ATen/core/Tensor.h>

namespace {

PyObject* is_tensor(PyObject*, PyObject* object) {
    return PyBool_FromLong(THPVariable_Check(object));
}

PyMethodDef methods[] = {
    {"is_tensor", is_tensor, METH_O, "Return True if an object is a torch.Tensor."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_guards", nullptr, -1, methods,
                          nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__guards() { return PyModule_Create(&definition); }
