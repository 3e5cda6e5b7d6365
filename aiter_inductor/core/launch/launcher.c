/* Launch kernels through hipModuleLaunchKernel or cuLaunchKernel, whose ABI is the same, without
 * either's headers. One Launcher per kernel: it checks, packs and launches. The twin of this file
 * is ctypes_launcher.py; both pass the same tests. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <structmember.h>

#define MAX_PARAMETERS 48
#define MAX_BUFFER_BYTES 1024
#define TENSOR_MAP_BYTES 128
#define TENSOR_MAP_ALIGN 64 /* of the map itself, in bytes */
#define MAPPED_ALIGN 16     /* of the tensor behind it */
#define MAX_DEVICES 64
#define CPU_DEVICE (-1) /* what Tensor.get_device() says for a CPU tensor */

typedef int (*launch_fn)(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                         unsigned block_x, unsigned block_y, unsigned block_z,
                         unsigned shared_bytes, void *stream, void **params, void **extra);
typedef int (*get_device_fn)(int *device);
typedef int (*replace_address_fn)(void *tensor_map, void *address);

/* CUlaunchAttribute and CUlaunchConfig of cuda.h, for cuLaunchKernelEx. */
typedef struct {
  int id, pad, value[16];
} Attribute;
typedef struct {
  unsigned grid[3], block[3], shared_bytes;
  void *stream;
  Attribute *attributes;
  unsigned num_attributes;
} LaunchConfig;
typedef int (*launch_early_fn)(const LaunchConfig *config, void *function, void **params,
                               void **extra);
#define PROGRAMMATIC_STREAM_SERIALIZATION 6

typedef struct {
  char kind; /* p i l f d m; see signature.py */
  char optional;
  unsigned align;
  unsigned offset;
  PyObject *name;
  PyObject *dtype; /* None takes any */
} Parameter;

typedef struct {
  PyObject_HEAD
  vectorcallfunc vectorcall;
  launch_fn launch;
  launch_early_fn launch_early; /* NULL for a kernel that does not wait for those before it */
  get_device_fn get_device; /* NULL for a kernel that runs on the CPU */
  replace_address_fn replace_address; /* NULL where there are no tensor maps */
  PyObject *name;
  PyObject *load;       /* load(device) -> function handle */
  PyObject *stream_of;  /* stream_of(device) -> stream handle */
  PyObject *enter;      /* enter(device) -> device that was current before */
  PyObject *fail;       /* fail(status) raises */
  void *functions[MAX_DEVICES + 1]; /* index: device + 1 */
  unsigned long long max_grid[3];
  unsigned long long max_items_x; /* grid_x * block_x; 0 is no limit */
  unsigned long long max_threads;
  unsigned long long max_shared_bytes;
  unsigned buffer_bytes;
  int end_marker; /* of the `extra` list; -1 passes `params` instead */
  int num_parameters;
  Parameter parameters[MAX_PARAMETERS];
} Launcher;

static PyObject *str_data_ptr, *str_dtype, *str_get_device;

static int refuse_value(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  PyErr_FormatV(PyExc_ValueError, format, arguments);
  va_end(arguments);
  return -1;
}

/* Raises what the runtime means by `status`. */
static int refuse_launch(Launcher *self, int status) {
  PyObject *nothing = PyObject_CallFunction(self->fail, "i", status);
  Py_XDECREF(nothing);
  if (nothing) PyErr_Format(PyExc_RuntimeError, "%U: launch status %d", self->name, status);
  return -1;
}

/* An int or a tuple of up to three; missing sizes are 1. */
static int read_sizes(Launcher *self, const char *what, PyObject *given,
                      unsigned long long out[3]) {
  Py_ssize_t count = 1;
  PyObject **items = &given;
  out[0] = out[1] = out[2] = 1;
  if (PyTuple_Check(given)) {
    count = PyTuple_GET_SIZE(given);
    items = ((PyTupleObject *)given)->ob_item;
  }
  if (count < 1 || count > 3)
    return refuse_value("%U: %s %R has %zd sizes, not 1 to 3", self->name, what, given, count);
  for (Py_ssize_t i = 0; i < count; i++) {
    long long size = PyLong_AsLongLong(items[i]);
    if (size == -1 && PyErr_Occurred()) return -1;
    if (size < 1) return refuse_value("%U: %s %R is not positive", self->name, what, given);
    out[i] = (unsigned long long)size;
  }
  return 0;
}

static int check_sizes(Launcher *self, unsigned long long grid[3], unsigned long long block[3],
                       unsigned long long shared_bytes) {
  unsigned long long threads = block[0] * block[1] * block[2];
  if (block[0] > self->max_threads || block[1] > self->max_threads ||
      block[2] > self->max_threads || threads > self->max_threads)
    return refuse_value("%U: a block of %llu x %llu x %llu threads exceeds %llu", self->name,
                        block[0], block[1], block[2], self->max_threads);
  if (grid[0] > self->max_grid[0] || grid[1] > self->max_grid[1] || grid[2] > self->max_grid[2])
    return refuse_value("%U: a grid of %llu x %llu x %llu exceeds %llu x %llu x %llu", self->name,
                        grid[0], grid[1], grid[2], self->max_grid[0], self->max_grid[1],
                        self->max_grid[2]);
  if (self->max_items_x && grid[0] * block[0] > self->max_items_x)
    return refuse_value("%U: %llu blocks of %llu threads exceed %llu work items", self->name,
                        grid[0], block[0], self->max_items_x);
  if (shared_bytes > self->max_shared_bytes)
    return refuse_value("%U: %llu bytes of dynamic shared memory exceed %llu", self->name,
                        shared_bytes, self->max_shared_bytes);
  return 0;
}

static int check_device(Launcher *self, Parameter *parameter, int device, int *common) {
  if (*common == device) return 0;
  if (device == CPU_DEVICE && self->get_device)
    return refuse_value("%U: %U is on the CPU; the kernel runs on a GPU", self->name,
                        parameter->name);
  if (device != CPU_DEVICE && !self->get_device)
    return refuse_value("%U: %U is on device %d; the kernel runs on the CPU", self->name,
                        parameter->name, device);
  if (*common == INT_MIN) {
    *common = device;
    return 0;
  }
  return refuse_value("%U: %U is on device %d, the arguments before it on device %d", self->name,
                      parameter->name, device, *common);
}

/* The tensor's address, on the device common to all arguments so far. */
static int read_address(Launcher *self, Parameter *parameter, PyObject *given, unsigned align,
                        int *device, uintptr_t *address) {
  PyObject *found = PyObject_CallMethodNoArgs(given, str_get_device);
  if (!found) {
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return -1;
    PyErr_Format(PyExc_TypeError, "%U: %U is %s, not a tensor", self->name, parameter->name,
                 Py_TYPE(given)->tp_name);
    return -1;
  }
  int index = (int)PyLong_AsLong(found);
  Py_DECREF(found);
  if (check_device(self, parameter, index, device)) return -1;
  if (parameter->dtype != Py_None) {
    PyObject *dtype = PyObject_GetAttr(given, str_dtype);
    if (!dtype) return -1;
    Py_DECREF(dtype); /* dtypes are immortal singletons */
    if (dtype != parameter->dtype)
      return refuse_value("%U: %U is %R; the kernel takes %R", self->name, parameter->name, dtype,
                          parameter->dtype);
  }
  found = PyObject_CallMethodNoArgs(given, str_data_ptr);
  if (!found) return -1;
  *address = (uintptr_t)PyLong_AsUnsignedLongLong(found);
  Py_DECREF(found);
  if (*address & (align - 1))
    return refuse_value("%U: %U lies at an address that is not a multiple of %u bytes", self->name,
                        parameter->name, align);
  return PyErr_Occurred() ? -1 : 0;
}

static int pack_pointer(Launcher *self, Parameter *parameter, PyObject *given, void *slot,
                        int *device) {
  uintptr_t address = 0;
  if ((given != Py_None || !parameter->optional) &&
      read_address(self, parameter, given, parameter->align, device, &address))
    return -1;
  memcpy(slot, &address, sizeof address);
  return 0;
}

static int pack_number(Launcher *self, Parameter *parameter, PyObject *given, void *slot) {
  if (parameter->kind == 'f' || parameter->kind == 'd') {
    double wide = PyFloat_AsDouble(given);
    float narrow = (float)wide;
    if (wide == -1.0 && PyErr_Occurred()) return -1;
    if (parameter->kind == 'f')
      memcpy(slot, &narrow, sizeof narrow);
    else
      memcpy(slot, &wide, sizeof wide);
    return 0;
  }
  int overflow;
  long long wide = PyLong_AsLongLongAndOverflow(given, &overflow);
  int32_t narrow = (int32_t)wide;
  if (wide == -1 && PyErr_Occurred()) return -1;
  if (overflow || (parameter->kind == 'i' && narrow != wide))
    return refuse_value("%U: %U=%R does not fit %s bits", self->name, parameter->name, given,
                        parameter->kind == 'i' ? "32" : "64");
  if (parameter->kind == 'i')
    memcpy(slot, &narrow, sizeof narrow);
  else
    memcpy(slot, &wide, sizeof wide);
  return 0;
}

/* Bytes that the caller encoded, copied, so that nothing needs to outlive the launch; or such bytes,
 * a tensor and an offset into it in bytes, at which the map is to start: that is then `moved`. */
static int pack_tensor_map(Launcher *self, Parameter *parameter, PyObject *given, void *slot,
                           int *device, uintptr_t *moved) {
  PyObject *map = given, *tensor = NULL;
  if (self->replace_address && PyTuple_Check(given) && PyTuple_GET_SIZE(given) == 3) {
    map = PyTuple_GET_ITEM(given, 0);
    tensor = PyTuple_GET_ITEM(given, 1);
  }
  if (!PyBytes_Check(map)) {
    PyErr_Format(PyExc_TypeError, "%U: %U is %s, not the bytes of a tensor map", self->name,
                 parameter->name, Py_TYPE(map)->tp_name);
    return -1;
  }
  if (PyBytes_GET_SIZE(map) != TENSOR_MAP_BYTES)
    return refuse_value("%U: %U has %zd bytes; a tensor map has %d", self->name, parameter->name,
                        PyBytes_GET_SIZE(map), TENSOR_MAP_BYTES);
  memcpy(slot, PyBytes_AS_STRING(map), TENSOR_MAP_BYTES);
  if (!tensor) return 0;
  if (read_address(self, parameter, tensor, 1, device, moved)) return -1;
  *moved += PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(given, 2));
  if (PyErr_Occurred()) return -1;
  if (*moved & (MAPPED_ALIGN - 1))
    return refuse_value("%U: %U lies at an address that is not a multiple of %u bytes", self->name,
                        parameter->name, MAPPED_ALIGN);
  return 0;
}

/* Calls callable(device); the result is an integer of pointer size. */
static int ask(PyObject *callable, int device, intptr_t *answer) {
  PyObject *argument = PyLong_FromLong(device);
  if (!argument) return -1;
  PyObject *result = PyObject_CallOneArg(callable, argument);
  Py_DECREF(argument);
  if (!result) return -1;
  *answer = (intptr_t)PyLong_AsVoidPtr(result);
  Py_DECREF(result);
  return PyErr_Occurred() ? -1 : 0;
}

/* Blocks may start while the kernel before this one in the stream still runs. */
static int launch_early(Launcher *self, void *function, unsigned long long grid[3],
                        unsigned long long block[3], unsigned shared_bytes, void *stream,
                        void **params) {
  Attribute early = {.id = PROGRAMMATIC_STREAM_SERIALIZATION, .value = {1}};
  LaunchConfig config = {.shared_bytes = shared_bytes, .stream = stream, .attributes = &early,
                         .num_attributes = 1};
  for (int i = 0; i < 3; i++) {
    config.grid[i] = (unsigned)grid[i];
    config.block[i] = (unsigned)block[i];
  }
  return self->launch_early(&config, function, params, NULL);
}

/* `moved`: for each parameter the address of its tensor map, which the driver sets in a context. */
static int launch_on(Launcher *self, int device, unsigned long long grid[3],
                     unsigned long long block[3], unsigned shared_bytes, char *buffer,
                     const uintptr_t *moved) {
  intptr_t handle = 0, stream = 0;
  if (device < CPU_DEVICE || device >= MAX_DEVICES)
    return refuse_value("%U: device %d is outside 0 to %d", self->name, device, MAX_DEVICES - 1);
  if (!self->functions[device + 1]) {
    if (ask(self->load, device, &handle)) return -1;
    self->functions[device + 1] = (void *)handle;
  }
  if (ask(self->stream_of, device, &stream)) return -1;
  void *params[MAX_PARAMETERS];
  for (int i = 0; i < self->num_parameters; i++) {
    params[i] = buffer + self->parameters[i].offset;
    if (self->parameters[i].kind != 'm' || !moved[i]) continue;
    int refused = self->replace_address(params[i], (void *)moved[i]);
    if (refused) return refuse_launch(self, refused);
  }
  size_t size = self->buffer_bytes;
  void *extra[] = {(void *)1, buffer, (void *)2, &size, (void *)(intptr_t)self->end_marker};
  int by_extra = self->end_marker >= 0;
  void *function = self->functions[device + 1];
  int status = self->launch_early
                   ? launch_early(self, function, grid, block, shared_bytes, (void *)stream, params)
                   : self->launch(function, (unsigned)grid[0], (unsigned)grid[1], (unsigned)grid[2],
                                  (unsigned)block[0], (unsigned)block[1], (unsigned)block[2],
                                  shared_bytes, (void *)stream, by_extra ? NULL : params,
                                  by_extra ? extra : NULL);
  return status ? refuse_launch(self, status) : 0;
}

/* Runs launch_on with `device` current, and leaves the device as it was. */
static int launch_in_context(Launcher *self, int device, unsigned long long grid[3],
                             unsigned long long block[3], unsigned shared_bytes, char *buffer,
                             const uintptr_t *moved) {
  int current = CPU_DEVICE;
  intptr_t previous = CPU_DEVICE;
  int unknown = self->get_device && self->get_device(&current);
  if (device == INT_MIN) device = current;
  if (!self->get_device || (!unknown && current == device))
    return launch_on(self, device, grid, block, shared_bytes, buffer, moved);
  if (ask(self->enter, device, &previous)) return -1;
  int failed = launch_on(self, device, grid, block, shared_bytes, buffer, moved);
  if (previous == device) return failed;
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);
  int stuck = ask(self->enter, (int)previous, &previous);
  if (failed) PyErr_Restore(type, value, traceback);
  return failed || stuck ? -1 : 0;
}

/* launcher(grid, block, shared_bytes, *arguments) */
static PyObject *call(PyObject *callable, PyObject *const *given, size_t flagged,
                      PyObject *keywords) {
  Launcher *self = (Launcher *)callable;
  Py_ssize_t count = PyVectorcall_NARGS(flagged);
  unsigned long long grid[3], block[3];
  _Alignas(TENSOR_MAP_ALIGN) char buffer[MAX_BUFFER_BYTES];
  uintptr_t moved[MAX_PARAMETERS];
  int device = INT_MIN;
  if (keywords && PyTuple_GET_SIZE(keywords))
    return PyErr_Format(PyExc_TypeError, "%U takes no keyword arguments", self->name);
  if (count != self->num_parameters + 3)
    return PyErr_Format(PyExc_TypeError, "%U takes %d arguments after grid, block and shared_bytes",
                        self->name, self->num_parameters);
  if (read_sizes(self, "grid", given[0], grid) || read_sizes(self, "block", given[1], block))
    return NULL;
  unsigned long long shared_bytes = PyLong_AsUnsignedLongLong(given[2]);
  if (PyErr_Occurred() || check_sizes(self, grid, block, shared_bytes)) return NULL;
  for (int i = 0; i < self->num_parameters; i++) {
    Parameter *parameter = &self->parameters[i];
    void *slot = buffer + parameter->offset;
    moved[i] = 0;
    int failed =
        parameter->kind == 'p' ? pack_pointer(self, parameter, given[i + 3], slot, &device)
        : parameter->kind == 'm'
            ? pack_tensor_map(self, parameter, given[i + 3], slot, &device, &moved[i])
            : pack_number(self, parameter, given[i + 3], slot);
    if (failed) return NULL;
  }
  if (launch_in_context(self, device, grid, block, (unsigned)shared_bytes, buffer, moved))
    return NULL;
  Py_RETURN_NONE;
}

static int add_parameter(Launcher *self, PyObject *described) {
  Parameter *parameter = &self->parameters[self->num_parameters];
  const char *letter;
  if (self->num_parameters == MAX_PARAMETERS)
    return refuse_value("%U has more than %d parameters", self->name, MAX_PARAMETERS);
  if (!PyArg_ParseTuple(described, "UsOII", &parameter->name, &letter, &parameter->dtype,
                        &parameter->align, &parameter->offset))
    return -1;
  Py_INCREF(parameter->name);
  Py_INCREF(parameter->dtype);
  self->num_parameters++;
  parameter->optional = *letter == 'P';
  parameter->kind = *letter == 'P' ? 'p' : *letter;
  unsigned size = parameter->kind == 'm'                             ? TENSOR_MAP_BYTES
                  : parameter->kind == 'i' || parameter->kind == 'f' ? 4
                                                                     : 8;
  self->buffer_bytes = parameter->offset + size;
  if (self->buffer_bytes > MAX_BUFFER_BYTES)
    return refuse_value("%U: %U lies beyond the argument buffer", self->name, parameter->name);
  return 0;
}

static int init(Launcher *self, PyObject *arguments, PyObject *keywords) {
  static char *names[] = {"name",        "parameters", "max_grid",         "max_items_x",
                          "max_threads", "max_shared_bytes", "launch_address", "early_address",
                          "device_address", "replace_address", "end_marker", "load",
                          "stream_of",   "enter",      "fail",             NULL};
  PyObject *name, *parameters, *load, *stream_of, *enter, *fail;
  unsigned long long launch_address, early_address, device_address, replace_address;
  if (self->name) return refuse_value("a launcher is initialised once");
  if (!PyArg_ParseTupleAndKeywords(
          arguments, keywords, "UO!(KKK)KKKKKKKiOOOO", names, &name, &PyTuple_Type, &parameters,
          &self->max_grid[0], &self->max_grid[1], &self->max_grid[2], &self->max_items_x,
          &self->max_threads, &self->max_shared_bytes, &launch_address, &early_address,
          &device_address, &replace_address, &self->end_marker, &load, &stream_of, &enter, &fail))
    return -1;
  self->launch = (launch_fn)(uintptr_t)launch_address;
  self->launch_early = (launch_early_fn)(uintptr_t)early_address;
  self->get_device = (get_device_fn)(uintptr_t)device_address;
  self->replace_address = (replace_address_fn)(uintptr_t)replace_address;
  self->name = Py_NewRef(name);
  self->load = Py_NewRef(load);
  self->stream_of = Py_NewRef(stream_of);
  self->enter = Py_NewRef(enter);
  self->fail = Py_NewRef(fail);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(parameters); i++)
    if (add_parameter(self, PyTuple_GET_ITEM(parameters, i))) return -1;
  self->vectorcall = call;
  return 0;
}

static PyObject *call_before_init(PyObject *self, PyObject *const *given, size_t flagged,
                                  PyObject *keywords) {
  return PyErr_Format(PyExc_TypeError, "this launcher was never initialised");
}

static PyObject *create(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
  Launcher *self = (Launcher *)type->tp_alloc(type, 0);
  if (self) self->vectorcall = call_before_init;
  return (PyObject *)self;
}

static void destroy(Launcher *self) {
  for (int i = 0; i < self->num_parameters; i++) {
    Py_XDECREF(self->parameters[i].name);
    Py_XDECREF(self->parameters[i].dtype);
  }
  Py_XDECREF(self->name);
  Py_XDECREF(self->load);
  Py_XDECREF(self->stream_of);
  Py_XDECREF(self->enter);
  Py_XDECREF(self->fail);
  Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyTypeObject LauncherType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "aiter_inductor.Launcher",
    .tp_basicsize = sizeof(Launcher),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_vectorcall_offset = offsetof(Launcher, vectorcall),
    .tp_call = PyVectorcall_Call,
    .tp_new = create,
    .tp_init = (initproc)init,
    .tp_dealloc = (destructor)destroy,
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "launcher", "Checked, packed kernel launches.", -1, NULL};

PyMODINIT_FUNC PyInit_launcher(void) {
  str_data_ptr = PyUnicode_InternFromString("data_ptr");
  str_dtype = PyUnicode_InternFromString("dtype");
  str_get_device = PyUnicode_InternFromString("get_device");
  if (!str_data_ptr || !str_dtype || !str_get_device || PyType_Ready(&LauncherType)) return NULL;
  PyObject *module = PyModule_Create(&definition);
  if (module && PyModule_AddObjectRef(module, "Launcher", (PyObject *)&LauncherType)) {
    Py_DECREF(module);
    return NULL;
  }
  return module;
}
