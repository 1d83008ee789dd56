// The launchers of the torch-free kernels and the plain structs that they take. csrc/ops.cpp fills these from tensors;
// the tests fill them from numpy arrays. Nothing here allocates, checks or knows PyTorch.
#pragma once

#include <cstdint>

namespace svdkern {

enum class DType : int32_t { f32, bf16, f16, f64 };

// A strided 2-D operand; strides count elements and may be any 64-bit value. data == nullptr: not given.
struct Matrix {
  const void* data = nullptr;
  int64_t rows = 0, cols = 0;
  int64_t row_stride = 0, col_stride = 0;
  DType dtype = DType::f32;
};

struct MutableMatrix {
  void* data = nullptr;
  int64_t rows = 0, cols = 0;
  int64_t row_stride = 0, col_stride = 0;
  DType dtype = DType::f32;
};

struct Vector {
  const void* data = nullptr;
  int64_t size = 0, stride = 0;
  DType dtype = DType::f32;
};

struct MutableVector {
  void* data = nullptr;
  int64_t size = 0;
  DType dtype = DType::f32;
};

// The mask D of a (rows, cols) matrix: philox.h. threshold 0: D == 1, nothing is drawn. 0 <= threshold < 65536.
struct Dropout {
  uint64_t seed = 0, offset = 0;
  uint32_t threshold = 0;
  int64_t row0 = 0;  // row of the stream that row 0 of the matrix is
};

// Runs body on disjoint ranges that cover [begin, end), each but the last at least `grain` long, possibly at once.
using RangeBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context);
// `threads` beside it: how many pieces it can run at once; decides how work is cut, not a bit of any result.

// What stands between h and z: z = s (h sigma | h R | h) g.                       cpu/modulation.h
struct Modulation {
  Vector sigma;        // (r,)
  Matrix core;         // R (r, r); at most one of the two
  Matrix gate;         // g float32 (M, r), or (1, r) for all rows
  float scale = 1.0f;  // s
};

// h = (D*x) U, y = x W^T + z V^T + b.                               x (M, K), weight (N, K), u (K, r), v (N, r)
// x and y have unit column stride and one dtype, which weight and bias share; weight has one unit stride.
struct ForwardParams {
  Matrix x, weight, u, v;
  Modulation by;
  Vector bias;
  Dropout dropout;
  MutableMatrix y;
  float* h = nullptr;  // (M, r), contiguous
  ParallelFor parallel_for = nullptr;
  int64_t threads = 1;
};

// p = dy V, t = s p g, q = t sigma | t R^T | t, dx = dy W + D*(q U^T), dU = (D*x)^T q, dV = dy^T z, dsigma = sum h t,
// dR = h^T t, dg = s p (h sigma | h R | h), db = sum dy, ds = sum p z / s. An output whose data is null is not
// computed.
struct BackwardParams {
  Matrix dy, x, weight, u, v, h;
  Modulation by;
  Dropout dropout;
  MutableMatrix dx, du, dv, dcore;
  MutableVector dsigma, dbias;
  float* dscale = nullptr;
  float* dgate = nullptr;  // (M, r), contiguous
  ParallelFor parallel_for = nullptr;
  int64_t threads = 1;
};

// out = (D*a) f, float32 (M, r), contiguous.                        a (M, L) with unit column stride, f (L, r)
struct ShrinkParams {
  Matrix a, f;
  Dropout dropout;
  float* out = nullptr;
  ParallelFor parallel_for = nullptr;
  int64_t threads = 1;
};

// out = (D*a)^T q, (L, r), any dtype and strides.                   a (M, L) with unit column stride, q (M, r) float32
struct OuterParams {
  Matrix a, q;
  Dropout dropout;
  MutableMatrix out;
  ParallelFor parallel_for = nullptr;
  int64_t threads = 1;
};

// out = D*x, same dtype; both with unit column stride.
struct DropoutParams {
  Matrix x;
  Dropout dropout;
  MutableMatrix out;
  ParallelFor parallel_for = nullptr;
};

// out = a w + D*(z f^T) + bias.            a (M, in), w (in, out), z (M, r) contiguous float32, f (out, r); w, z
// optional
struct LinearParams {
  Matrix a, w, z, f;
  Vector bias;
  Dropout dropout;
  MutableMatrix out;
  ParallelFor parallel_for = nullptr;
  int64_t threads = 1;
};

// y = s a x, z = s a^T y from one read of a.   a (M, L) with one unit stride, x (L, b) fp32 with unit column stride
struct NormalParams {
  Matrix a, x;
  float scale = 1.0f;
  bool rough = false;  // errors of 2^-16 may be made where that is faster: cpu/normal_amx.h
  float* y = nullptr;  // (M, b), contiguous
  float* z = nullptr;  // (L, b), contiguous
  ParallelFor parallel_for = nullptr;
};

// out = sum of the squares of s a, in fp64.                                  a (M, L) with unit column stride
struct EnergyParams {
  Matrix a;
  float scale = 1.0f;
  double* out = nullptr;
  ParallelFor parallel_for = nullptr;
};

// out (rows, columns), f32 or f64, contiguous: +-1 by the seed and the place, columns from `first` on: cpu/sketch.h.
struct SketchParams {
  uint64_t seed = 0;
  int64_t first = 0;
  MutableMatrix out;
  ParallelFor parallel_for = nullptr;
};

// out = a^T a (L, L), fp32, contiguous, on units that multiply bf16.            a (M, L) bf16 with one unit stride
struct GramParams {
  Matrix a;
  float* out = nullptr;
  ParallelFor parallel_for = nullptr;
};

// out = weight - sum_i v_i (s sigma_i u_i)^T, in fp64 and in one fixed order, so that every instruction set and device
// gives the same bits: cpu/residual.h.                                            weight f32, bf16, f16 or f64
struct ResidualParams {
  Matrix weight, u, v;
  Vector sigma;
  double scale = 1.0;
  MutableMatrix out;
  ParallelFor parallel_for = nullptr;
};

// One instruction set's kernels. Results do not depend on how parallel_for splits the work.
struct Kernels {
  const char* name;
  void (*forward)(const ForwardParams&);
  void (*backward)(const BackwardParams&);
  void (*shrink)(const ShrinkParams&);
  void (*outer)(const OuterParams&);
  void (*dropout)(const DropoutParams&);
  void (*linear)(const LinearParams&);
  void (*normal)(const NormalParams&);
  void (*energy)(const EnergyParams&);
  void (*sketch)(const SketchParams&);
  void (*residual)(const ResidualParams&);
  void (*gram)(const GramParams&);  // null where outer is as fast
  void (*philox_bits)(uint64_t seed, uint64_t offset, int64_t row, int64_t octet0, int64_t octets, uint16_t* bits);
};

// Every instruction set compiled in, best first; `available` says whether this CPU (and its OS) runs it.
struct Isa {
  const Kernels* kernels;
  bool available;
};
constexpr int max_isas = 5;
int list_isas(Isa (&isas)[max_isas]);

// The kernels named `forced`, or the best available where forced is null or empty; null where that one cannot run.
const Kernels* select_kernels(const char* forced);

}  // namespace svdkern
