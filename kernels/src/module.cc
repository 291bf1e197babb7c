// The Python module: the handlers as capsules, and the choice of instruction set.
#include <Python.h>

#include "ffi.h"
#include "ops.h"

namespace {

using precast::FindOps;

// XLA accepts handlers in capsules of this name.
PyObject* Capsule(XLA_FFI_Handler* handler) {
  return PyCapsule_New(reinterpret_cast<void*>(handler), "xla._CUSTOM_CALL_TARGET", nullptr);
}

PyObject* Targets(PyObject*, PyObject*) {
  return Py_BuildValue("{s:N,s:N,s:N,s:N,s:N,s:N,s:N}", "precast.argmax.v1", Capsule(PrecastArgmaxV1),
                       "precast.argmax.v2", Capsule(PrecastArgmaxV2), "precast.attention.v2",
                       Capsule(PrecastAttentionV2), "precast.embed.v1", Capsule(PrecastEmbedV1), "precast.layers.v2",
                       Capsule(PrecastLayersV2), "precast.linear.v1", Capsule(PrecastLinearV1), "precast.reserve.v1",
                       Capsule(PrecastReserveV1));
}

PyObject* Isa(PyObject*, PyObject*) { return PyUnicode_FromString(precast::CurrentOps().name); }

PyObject* Supported(PyObject*, PyObject* args) {
  const char* name;
  if (!PyArg_ParseTuple(args, "s", &name)) return nullptr;
  return PyBool_FromLong(FindOps(name) != nullptr);
}

PyObject* ForceIsa(PyObject*, PyObject* args) {
  const char* name;
  if (!PyArg_ParseTuple(args, "z", &name)) return nullptr;
  const precast::Ops* ops = name == nullptr ? nullptr : FindOps(name);
  if (name != nullptr && ops == nullptr)
    return PyErr_Format(PyExc_ValueError, "this CPU has no kernels for '%s'", name);
  precast::ForceOps(ops);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"targets", Targets, METH_NOARGS, "Return custom-call target names and their XLA-FFI handlers as capsules."},
    {"isa", Isa, METH_NOARGS, "Return the instruction set in use."},
    {"supported", Supported, METH_VARARGS, "Return True if this CPU runs the kernels of an instruction set."},
    {"force_isa", ForceIsa, METH_VARARGS, "Use an instruction set; None restores the widest that this CPU runs."},
    {nullptr, nullptr, 0, nullptr}};

int Exec(PyObject* module) { return PyModule_AddIntConstant(module, "ABI_VERSION", precast::kAbiVersion); }

PyModuleDef_Slot slots[] = {{Py_mod_exec, reinterpret_cast<void*>(Exec)}, {0, nullptr}};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_kernels", "precast's CPU kernels.", 0, methods, slots, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__kernels() { return PyModuleDef_Init(&definition); }
