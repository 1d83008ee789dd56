// Splitting work over the caller's threads. Items are independent, so how they are split changes no bit of the result.
#pragma once

#include "vec.h"

namespace svdkern {
namespace {

constexpr int64_t worth_a_thread = 1 << 18;  // multiply-adds: 10 to 20 us, a few times what waking a thread costs

// body(begin, end) over [0, count), each item about `cost` multiply-adds.
template <class Body>
inline void parallel(ParallelFor parallel_for, int64_t count, int64_t cost, const Body& body) {
  if (count <= 0) return;
  const int64_t grain = worth_a_thread / larger<int64_t>(cost, 1) + 1;
  if (grain >= count || parallel_for == nullptr) return body(int64_t{0}, count);
  parallel_for(
      0, count, grain,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<Body*>(&body));
}

}  // namespace
}  // namespace svdkern
