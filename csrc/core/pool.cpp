#include "pool.h"

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace hm {
namespace {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

// A small virtual machine's kernel may leave two spinning threads on one processor for seconds while
// another idles. A worker that finds itself on the caller's asks to be put elsewhere.
inline int current_cpu() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}
inline void leave_cpu(int cpu) {
#if defined(__linux__)
  cpu_set_t allowed, others;
  if (sched_getaffinity(0, sizeof allowed, &allowed) || CPU_COUNT(&allowed) < 2) return;
  others = allowed;
  CPU_CLR(cpu, &others);
  if (sched_setaffinity(0, sizeof others, &others) == 0) sched_setaffinity(0, sizeof allowed, &allowed);
#else
  (void)cpu;
#endif
}

// Decoding leaves gaps of a few hundred microseconds between jobs; a worker that parks in one costs
// 20-60 us to wake, so it spins about a millisecond first.
constexpr auto kSpin = std::chrono::microseconds(1000);

class Pool {
 public:
  explicit Pool(int threads) {
    workers_.reserve(size_t(threads));
    try {
      for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
    } catch (const std::system_error&) {  // as many as the system grants: chunks are claimed, not handed out
    }
  }
  ~Pool() {
    stop_ = true;
    {
      std::lock_guard<std::mutex> lock(park_);
      generation_.fetch_add(1);
    }
    unpark_.notify_all();
    for (auto& w : workers_) w.join();
  }

  void run(uint32_t count, void (*body)(void*, uint32_t), void* ctx) {
    // Odd generations close the door: late workers of the last job leave before job_ changes.
    uint32_t closed = generation_.load(std::memory_order_relaxed) + 1;
    ticket_.store(uint64_t(closed) << 32 | UINT32_MAX);
    generation_.store(closed);
    caller_cpu_.store(current_cpu(), std::memory_order_relaxed);
    while (inside_.load()) relax();
    job_ = {body, ctx, count};
    done_.store(0, std::memory_order_relaxed);
    uint32_t open = closed + 1;
    ticket_.store(uint64_t(open) << 32);
    generation_.store(open);
    if (parked_.load()) {
      std::lock_guard<std::mutex> lock(park_);
      unpark_.notify_all();
    }
    claim_all(open, job_);
    for (int spins = 0; done_.load(std::memory_order_acquire) < count;) {
      relax();
      if (++spins > 4000) std::this_thread::yield(), spins = 0;
    }
  }

 private:
  struct Job {
    void (*body)(void*, uint32_t);
    void* ctx;
    uint32_t count;
  };

  // A ticket is generation << 32 | next chunk: a worker of an old generation can claim nothing.
  void claim_all(uint32_t generation, const Job& job) {
    uint64_t t = ticket_.load(std::memory_order_acquire);
    while (uint32_t(t >> 32) == generation && uint32_t(t) < job.count) {
      if (!ticket_.compare_exchange_weak(t, t + 1, std::memory_order_acq_rel)) continue;
      job.body(job.ctx, uint32_t(t));
      done_.fetch_add(1, std::memory_order_acq_rel);
      t = ticket_.load(std::memory_order_acquire);
    }
  }

  void work() {
    uint32_t seen = 0;
    for (;;) {
      uint32_t generation = await(seen);
      if (stop_) return;
      seen = generation;
      if (const int cpu = current_cpu(); cpu >= 0 && cpu == caller_cpu_.load(std::memory_order_relaxed)) leave_cpu(cpu);
      inside_.fetch_add(1);
      if (generation_.load() == generation && !(generation & 1)) {
        Job job = job_;
        claim_all(generation, job);
      }
      inside_.fetch_sub(1, std::memory_order_release);
    }
  }

  uint32_t await(uint32_t seen) {
    auto start = std::chrono::steady_clock::now();
    for (int spins = 0;; ++spins) {
      uint32_t generation = generation_.load(std::memory_order_acquire);
      if (generation != seen) return generation;
      relax();
      if (spins % 64 == 63 && std::chrono::steady_clock::now() - start > kSpin) break;
    }
    std::unique_lock<std::mutex> lock(park_);
    parked_.fetch_add(1);
    unpark_.wait(lock, [&] { return generation_.load() != seen; });
    parked_.fetch_sub(1);
    return generation_.load();
  }

  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<uint32_t> done_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<uint32_t> inside_{0};
  std::atomic<uint32_t> parked_{0};
  std::atomic<int> caller_cpu_{-1};
  std::atomic<bool> stop_{false};
  Job job_{};
  std::vector<std::thread> workers_;
  std::mutex park_;
  std::condition_variable unpark_;
};

std::mutex owner;  // held by the one caller whose job the pool runs
Pool* pool = nullptr;
std::atomic<int> wanted{0};

// Threads do not survive fork(): the child starts over with its own pool.
void after_fork_in_child() {
  pool = nullptr;
  new (&owner) std::mutex();
}

}  // namespace

int thread_count() {
  if (!wanted) {
    int n = int(std::thread::hardware_concurrency());
    wanted = n < 1 ? 1 : n;
  }
  return wanted;
}

void set_thread_count(int count) {
  std::lock_guard<std::mutex> lock(owner);
  delete pool;
  pool = nullptr;
  wanted = count < 1 ? 1 : count;
}

void parallel(uint32_t count, void (*body)(void*, uint32_t), void* ctx) {
  std::unique_lock<std::mutex> lock(owner, std::defer_lock);
  if (count <= 1 || thread_count() == 1 || !lock.try_lock()) {
    for (uint32_t i = 0; i < count; ++i) body(ctx, i);
    return;
  }
  if (!pool) {
    static const int registered = pthread_atfork(nullptr, nullptr, after_fork_in_child);
    (void)registered;
    pool = new Pool(thread_count());
  }
  pool->run(count, body, ctx);
}

}  // namespace hm
