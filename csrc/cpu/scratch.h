// Working memory that survives between calls: taking some costs a few instructions, where malloc of a megabyte costs
// page faults that would be a good part of a small layer's time. One stack of blocks a thread; a Scratch gives back on
// destruction what was taken through it, in the reverse order of construction.
#pragma once

#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "vec.h"

namespace svdkern {
namespace {

class Arena {
 public:
  static constexpr int max_blocks = 40;
  static constexpr int64_t first_block = 256 << 10, kept = 32 << 20, huge_page = 2 << 20;

  ~Arena() { free_from(0); }

  char* take(int64_t bytes) {
    bytes = round_up(bytes, 64);
    while (block_ < blocks_ && used_ + bytes > size_[block_]) ++block_, used_ = 0;
    if (block_ == blocks_) {
      int64_t size = larger(first_block << smaller(blocks_, 12), round_up(bytes, 4096));
      const bool huge = size >= huge_page;
      if (huge) size = round_up(size, huge_page);
      void* p = blocks_ < max_blocks ? std::aligned_alloc(huge ? huge_page : 64, size) : nullptr;
      if (p == nullptr) throw std::bad_alloc();
#if defined(__linux__)
      if (huge) madvise(p, size, MADV_HUGEPAGE);  // panels are walked with large strides
#endif
      data_[blocks_] = static_cast<char*>(p), size_[blocks_] = size, ++blocks_, used_ = 0;
    }
    char* p = data_[block_] + used_;
    used_ += bytes;
    return p;
  }

  int block() const { return block_; }
  int64_t used() const { return used_; }

  void give_back(int block, int64_t used) {
    block_ = block, used_ = used;
    if (block_ != 0 || used_ != 0) return;
    int64_t total = 0;
    for (int i = 0; i < blocks_; ++i) {
      total += size_[i];
      if (total > kept) return free_from(i);
    }
  }

 private:
  void free_from(int first) {
    for (int i = first; i < blocks_; ++i) std::free(data_[i]);
    blocks_ = smaller(first, blocks_);
  }

  char* data_[max_blocks];
  int64_t size_[max_blocks];
  int blocks_ = 0, block_ = 0;
  int64_t used_ = 0;
};

class Scratch {
 public:
  Scratch() : arena_(arena()), block_(arena_.block()), used_(arena_.used()) {}
  ~Scratch() { arena_.give_back(block_, used_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* take(int64_t count) {
    return reinterpret_cast<T*>(arena_.take(count * static_cast<int64_t>(sizeof(T))));
  }

 private:
  static Arena& arena() {
    static thread_local Arena it;
    return it;
  }

  Arena& arena_;
  int block_;
  int64_t used_;
};

}  // namespace
}  // namespace svdkern
