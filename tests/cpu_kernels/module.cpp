// The torch-free kernels bound to numpy, for the tests only: float32, float16, uint16 (the bits of bf16) and float64
// arrays with any strides become the Params of svdkern.h; nothing is checked, so the sanitizers see what the kernels
// really touch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <thread>
#include <vector>

#include "cpu/linear.h"
#include "cpu/skinny.h"

namespace py = pybind11;
using namespace svdkern;

namespace {

int pieces = 1;

// Every piece on a thread of its own, the split as uneven as `pieces` makes it.
void split(int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context) {
  const int64_t most = larger<int64_t>(1, (end - begin + grain - 1) / grain), n = smaller<int64_t>(pieces, most);
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < n; ++i)
    threads.emplace_back(body, begin + (end - begin) * i / n, begin + (end - begin) * (i + 1) / n, context);
  for (auto& thread : threads) thread.join();
}

DType dtype_of(const py::array& a) {
  const char kind = a.dtype().kind();
  const auto size = a.dtype().itemsize();
  if (kind == 'u' && size == 2) return DType::bf16;
  if (kind == 'f' && size == 2) return DType::f16;
  if (kind == 'f' && size == 8) return DType::f64;
  if (kind == 'f' && size == 4) return DType::f32;
  throw py::type_error("no such storage type");
}

template <class M>
M matrix_of(const py::object& object) {
  if (object.is_none()) return {};
  const auto a = object.cast<py::array>();
  const auto size = static_cast<int64_t>(a.dtype().itemsize());
  M m;
  m.data = const_cast<void*>(a.data());
  m.rows = a.shape(0), m.cols = a.shape(1);
  m.row_stride = a.strides(0) / size, m.col_stride = a.strides(1) / size;
  m.dtype = dtype_of(a);
  return m;
}
Matrix in(const py::object& object) { return matrix_of<Matrix>(object); }
MutableMatrix out(const py::object& object) { return matrix_of<MutableMatrix>(object); }

Vector vector_of(const py::object& object) {
  if (object.is_none()) return {};
  const auto a = object.cast<py::array>();
  return {a.data(), a.shape(0), a.strides(0) / static_cast<int64_t>(a.dtype().itemsize()), dtype_of(a)};
}
MutableVector out_vector(const py::object& object) {
  if (object.is_none()) return {};
  const auto a = object.cast<py::array>();
  return {const_cast<void*>(a.data()), a.shape(0), dtype_of(a)};
}
float* floats(const py::object& object) {
  return object.is_none() ? nullptr : static_cast<float*>(const_cast<void*>(object.cast<py::array>().data()));
}

Modulation modulation_of(const py::object& sigma, float scale, const py::object& core, const py::object& gate) {
  return {vector_of(sigma), in(core), in(gate), scale};
}

Dropout dropout_of(const py::tuple& d) {
  if (d.empty()) return {};
  return {d[0].cast<uint64_t>(), d[1].cast<uint64_t>(), d[2].cast<uint32_t>(), d[3].cast<int64_t>()};
}

const Kernels& kernels(const std::string& name) {
  const Kernels* found = select_kernels(name.c_str());
  if (found == nullptr) throw py::value_error(name);
  return *found;
}

std::vector<uint32_t> philox(std::vector<uint32_t> counter, std::vector<uint32_t> key, int rounds) {
  U64 c[4];
  for (int i = 0; i < 4; ++i) c[i] = U64{} + counter[i];
  if (rounds == 7)
    philox4x32<7>(c, key[0], key[1]);
  else
    philox4x32<10>(c, key[0], key[1]);
  std::vector<uint32_t> words;
  for (int i = 0; i < 4; ++i) words.push_back(static_cast<uint32_t>(c[i][0]));
  return words;
}

}  // namespace

PYBIND11_MODULE(cpu_kernels_module, m) {
  m.def("set_pieces", [](int n) { pieces = n; });
  m.def("isas", [] {
    Isa isas[max_isas];
    const int n = list_isas(isas);
    std::vector<std::pair<std::string, bool>> names;
    for (int i = 0; i < n; ++i) names.emplace_back(isas[i].kernels->name, isas[i].available);
    return names;
  });
  m.def("chosen", [](const std::string& forced) {
    const Kernels* found = select_kernels(forced.c_str());
    return found ? std::string(found->name) : std::string();
  });
  m.def("philox", philox);
  m.def("chunk_of", chunk_of);
  m.def("chunks_of", chunks_of);
  m.def("dot_width", dot_width);
  m.def("round_up", round_up);
  m.def("philox_bits",
        [](const std::string& isa, uint64_t seed, uint64_t offset, int64_t row, int64_t octet0, int64_t n) {
          std::vector<uint16_t> bits(static_cast<size_t>(round_up(n, 8) * 8));
          kernels(isa).philox_bits(seed, offset, row, octet0, n, bits.data());
          bits.resize(static_cast<size_t>(n * 8));
          return bits;
        });
  m.def("forward", [](const std::string& isa, py::object x, py::object weight, py::object u, py::object sigma,
                      py::object v, py::object bias, float scale, py::object core, py::object gate, py::tuple dropout,
                      py::object y, py::object h) {
    kernels(isa).forward({in(x), in(weight), in(u), in(v), modulation_of(sigma, scale, core, gate), vector_of(bias),
                          dropout_of(dropout), out(y), floats(h), split, pieces});
  });
  m.def("backward", [](const std::string& isa, py::object dy, py::object x, py::object weight, py::object u,
                       py::object sigma, py::object v, float scale, py::object core, py::object gate, py::object h,
                       py::tuple dropout, py::object dx, py::object du, py::object dsigma, py::object dv,
                       py::object dbias, py::object dscale, py::object dcore, py::object dgate) {
    kernels(isa).backward({in(dy), in(x), in(weight), in(u), in(v), in(h), modulation_of(sigma, scale, core, gate),
                           dropout_of(dropout), out(dx), out(du), out(dv), out(dcore), out_vector(dsigma),
                           out_vector(dbias), floats(dscale), floats(dgate), split, pieces});
  });
  m.def("shrink", [](const std::string& isa, py::object a, py::object f, py::tuple dropout, py::object result) {
    kernels(isa).shrink({in(a), in(f), dropout_of(dropout), floats(result), split, pieces});
  });
  m.def("outer", [](const std::string& isa, py::object a, py::object q, py::tuple dropout, py::object result) {
    kernels(isa).outer({in(a), in(q), dropout_of(dropout), out(result), split, pieces});
  });
  m.def("dropout", [](const std::string& isa, py::object x, py::tuple dropout, py::object result) {
    kernels(isa).dropout({in(x), dropout_of(dropout), out(result), split});
  });
  m.def("linear", [](const std::string& isa, py::object a, py::object w, py::object z, py::object f, py::object bias,
                     py::tuple dropout, py::object result) {
    kernels(isa).linear({in(a), in(w), in(z), in(f), vector_of(bias), dropout_of(dropout), out(result), split, pieces});
  });
  m.def("residual", [](const std::string& isa, py::object weight, py::object u, py::object sigma, py::object v,
                       double scale, py::object result) {
    kernels(isa).residual({in(weight), in(u), in(v), vector_of(sigma), scale, out(result), split});
  });
}
