// A ticket thread pool: callers and workers claim chunks, the join waits for chunks and never for
// a worker the system has descheduled, so that a busy machine slows a job instead of stalling it.
#pragma once
#include <stdint.h>

#include <type_traits>

namespace hm {

// Runs body(ctx, 0..count-1), each once, on the calling thread and the workers; returns when all are
// done. Nested or concurrent calls run inline. Results must not depend on who ran a chunk.
void parallel(uint32_t count, void (*body)(void* ctx, uint32_t chunk), void* ctx);

template <class Body>
void parallel(uint32_t count, Body&& body) {
  parallel(
      count, [](void* ctx, uint32_t chunk) { (*static_cast<std::remove_reference_t<Body>*>(ctx))(chunk); }, &body);
}

// Splits [0, n) into about 4 chunks a thread, at least `grain` long, and runs body(begin, end).
template <class Body>
void parallel_range(int64_t n, int64_t grain, Body&& body);

int thread_count();
void set_thread_count(int count);  // >= 1; not while an op runs

template <class Body>
void parallel_range(int64_t n, int64_t grain, Body&& body) {
  if (n <= 0) return;
  int64_t chunks = 4 * int64_t(thread_count());
  int64_t step = (n + chunks - 1) / chunks;
  if (step < grain) step = grain;
  uint32_t count = uint32_t((n + step - 1) / step);
  parallel(count, [&](uint32_t chunk) {
    int64_t begin = int64_t(chunk) * step;
    body(begin, begin + step < n ? begin + step : n);
  });
}

}  // namespace hm
