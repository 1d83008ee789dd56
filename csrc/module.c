/* The import hook of svdkern._C: loading the library registers the operators of ops.cpp; the module itself is empty. */
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, .m_name = "_C", .m_size = 0};

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&definition); }
