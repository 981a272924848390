// Memory of one call, kept by its thread for the next one: a decoded token asks for the same few
// megabytes a hundred times, and fresh pages would cost more than the arithmetic done in them.
#pragma once
#include <stdint.h>

#include <memory>
#include <vector>

namespace hm {

// Takes are freed together when the Scratch ends; Scratches of one thread nest.
class Scratch {
 public:
  Scratch() : slab_(arena().slab), used_(arena().used), live_(arena().live) { ++arena().depth; }
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    Arena& a = arena();
    a.slab = slab_;
    a.used = used_;
    a.live = live_;
    if (--a.depth == 0) a.settle();
  }

  // `count` values, aligned to a cache line, not cleared.
  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(arena().take(count * int64_t(sizeof(T))));
  }
  float* floats(int64_t count) { return take<float>(count); }

 private:
  static constexpr int64_t kLine = 64, kFirst = 1 << 20, kKept = 128 << 20;  // bytes; 512 tokens take 80 MB

  struct Slab {
    std::unique_ptr<char[]> memory;
    int64_t size;
  };
  struct Arena {
    std::vector<Slab> slabs;
    size_t slab = 0;  // in use, and how much of it
    int64_t used = 0, live = 0, peak = 0;
    int depth = 0;

    void* take(int64_t bytes) {
      bytes = (bytes + kLine - 1) / kLine * kLine;
      while (slab < slabs.size() && used + bytes > slabs[slab].size) {
        ++slab;
        used = 0;
      }
      if (slab == slabs.size()) {
        int64_t size = slabs.empty() ? kFirst : 2 * slabs.back().size;
        if (size < bytes) size = bytes;
        slabs.push_back({std::unique_ptr<char[]>(new char[size_t(size + kLine)]), size});
      }
      char* base = slabs[slab].memory.get();
      char* at = base + (kLine - reinterpret_cast<uintptr_t>(base) % kLine) % kLine + used;
      used += bytes;
      live += bytes;
      if (live > peak) peak = live;
      return at;
    }
    // Several slabs become one; what a call needs beyond the limit goes back.
    void settle() {
      if (slabs.size() > 1 || (!slabs.empty() && slabs[0].size > kKept)) {
        slabs.clear();
        if (peak <= kKept) slabs.push_back({std::unique_ptr<char[]>(new char[size_t(peak + kLine)]), peak});
      }
      peak = 0;
    }
  };
  static Arena& arena() {
    static thread_local Arena a;
    return a;
  }

  size_t slab_;
  int64_t used_, live_;
};

}  // namespace hm
