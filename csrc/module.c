/* The import hook of svdkern._C: loading the library registers the operators of ops.cpp; the module itself is empty.

   CPython's stable ABI (PEP 384) is declared here and not included: Python.h comes in a development package that a
   machine with Python, venv and g++ need not have. The layout below is PyModuleDef's, the same since Python 3.5. */
#include <stddef.h>

typedef struct _object PyObject;

static struct {
  ptrdiff_t ob_refcnt;
  void* ob_type;
  PyObject* (*m_init)(void);
  ptrdiff_t m_index;
  PyObject* m_copy;
  const char* m_name;
  const char* m_doc;
  ptrdiff_t m_size;
  void *m_methods, *m_slots, *m_traverse, *m_clear, *m_free;
} definition = {.ob_refcnt = 1, .m_name = "_C"};

enum { python_abi_version = 3 };

PyObject* PyModule_Create2(void* definition, int abi_version);
__attribute__((visibility("default"))) PyObject* PyInit__C(void);

PyObject* PyInit__C(void) { return PyModule_Create2(&definition, python_abi_version); }
