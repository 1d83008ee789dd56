// One instruction set's kernels behind a C function, for blocks.py: built once for every value of a block size.
#include "cpu/primitives.h"

using namespace svdkern;

namespace {

int64_t threads = 1;

void split(int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context) {
  const int64_t most = larger<int64_t>(1, (end - begin + grain - 1) / larger<int64_t>(1, grain));
  const int64_t n = smaller(threads, most);
#pragma omp parallel for num_threads(n)  // threads that stay, as PyTorch's do: their workspace stays with them
  for (int64_t i = 0; i < n; ++i) body(begin + (end - begin) * i / n, begin + (end - begin) * (i + 1) / n, context);
}

Matrix rows(const void* data, int64_t m, int64_t n, DType dtype) { return {data, m, n, n, 1, dtype}; }

}  // namespace

// Forward and backward of one layer, all gradients: contiguous tensors, factors fp32, no sigma, bias or dropout.
extern "C" void layer(int32_t dtype, int64_t many, int64_t m, int64_t k, int64_t n, int64_t r, const void* x,
                      const void* weight, const float* u, const float* v, const void* dy, void* y, float* h, void* dx,
                      float* du, float* dv) {
  threads = many;
  const DType type = static_cast<DType>(dtype);
  const Kernels kernels = kernels_named("tried");
  ForwardParams f;
  f.x = rows(x, m, k, type), f.weight = rows(weight, n, k, type);
  f.u = rows(u, k, r, DType::f32), f.v = rows(v, n, r, DType::f32);
  f.y = {y, m, n, n, 1, type}, f.h = h;
  f.parallel_for = split, f.threads = many;
  kernels.forward(f);
  BackwardParams b;
  b.dy = rows(dy, m, n, type), b.x = f.x, b.weight = f.weight, b.u = f.u, b.v = f.v;
  b.h = rows(h, m, r, DType::f32);
  b.dx = {dx, m, k, k, 1, type};
  b.du = {du, k, r, r, 1, DType::f32}, b.dv = {dv, n, r, r, 1, DType::f32};
  b.parallel_for = split, b.threads = many;
  kernels.backward(b);
}
