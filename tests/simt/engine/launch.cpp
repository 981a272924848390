// A dispatch: threadgroups one after another (or over several OS threads), faults become findings.
#include <dlfcn.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include <mutex>
#include <thread>

#include "engine.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace simt {
namespace {
// core.py has the same struct.
struct Stats {
  uint64_t switches, simd_ops, barriers, groups, shared_bytes;
};
Stats stats;
thread_local sigjmp_buf escape;
thread_local volatile bool armed = false;

uint64_t instruction(const ucontext_t* context) {
#if defined(__x86_64__)
  return (uint64_t)context->uc_mcontext.gregs[REG_RIP];
#else
  return context->uc_mcontext.pc;
#endif
}

void on_fault(int signal_number, siginfo_t* info, void* context) {
  if (!armed || !tls.cur) {  // not the kernel's
    signal(signal_number, SIG_DFL);
    raise(signal_number);
    return;
  }
  const char* address = (const char*)info->si_addr;
  Place place = {nullptr, 0, instruction((const ucontext_t*)context) + 1};
  const Region* r = nullptr;
  for (const Region* other : regions)
    if (address >= other->lo - 65536 && address < other->hi + 65536) r = other;
  if (signal_number == SIGFPE)
    report("integer-division", "division by zero, or of the smallest integer by -1", place);
  else if (r)
    report("memory-fault", fmt("access outside the buffer (%td bytes)", r->hi - r->lo), place,
           r->name.c_str(), address - r->lo);
  else
    report("memory-fault", fmt("access to %p, which is in no buffer", (const void*)address), place);
  give_up();
}

const void* library_of(const void* address) {
  Dl_info info;
  return dladdr(address, &info) ? info.dli_fbase : nullptr;
}

// Only between instructions of the kernel itself: the engine may hold a lock. The timer comes again.
void on_time(int, siginfo_t*, void* context) {
  uint64_t pc = instruction((const ucontext_t*)context);
  if (!armed || !tls.cur || library_of((void*)pc) != library_of((void*)worker->body)) return;
  // The last load or store, if known: here may be a stub on the way to the engine, without a line.
  uint64_t at = worker->last_pc ? worker->last_pc : pc + 1;
  report("endless", fmt("still runs after %u seconds", worker->d->seconds), {nullptr, 0, at});
  give_up();
}

// Faults of kernels, for the duration of a launch.
struct Handlers {
  static constexpr int SIGNALS[4] = {SIGSEGV, SIGBUS, SIGFPE, SIGVTALRM};
  struct sigaction old[4];
  Handlers() {
    for (int i = 0; i < 4; i++) {
      struct sigaction action = {};
      action.sa_sigaction = SIGNALS[i] == SIGVTALRM ? on_time : on_fault;
      action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER | SA_RESTART;
      sigaction(SIGNALS[i], &action, &old[i]);
    }
  }
  ~Handlers() {
    for (int i = 0; i < 4; i++) sigaction(SIGNALS[i], &old[i], nullptr);
  }
};

// Counts this thread's processor time, so that a busy machine ends nothing early.
struct Timer {
  timer_t timer;
  bool made = false;
  explicit Timer(uint32_t seconds) {
    if (!seconds) return;
    struct sigevent event = {};
    event.sigev_notify = SIGEV_THREAD_ID, event.sigev_signo = SIGVTALRM;
    event._sigev_un._tid = (pid_t)syscall(SYS_gettid);
    made = !timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer);
    struct itimerspec when = {{0, 10000000}, {(time_t)seconds, 0}};
    if (made) timer_settime(timer, 0, &when, nullptr);
  }
  ~Timer() {
    if (made) timer_delete(timer);
  }
};

// A fault may come from a fiber whose stack is full: the handler has its own.
struct SignalStack {
  std::vector<char> memory = std::vector<char>(65536);
  stack_t old;
  SignalStack() {
    stack_t mine = {};
    mine.ss_sp = memory.data(), mine.ss_size = memory.size();
    sigaltstack(&mine, &old);
  }
  ~SignalStack() { sigaltstack(&old, nullptr); }
};

// Denormals become zero, as Metal's f32 does.
struct FlushDenormals {
#if defined(__x86_64__)
  unsigned old = _mm_getcsr();
  explicit FlushDenormals(bool on) { if (on) _mm_setcsr(old | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(old); }
#else
  uint64_t old = 0;
  explicit FlushDenormals(bool on) {
    asm volatile("mrs %0, fpcr" : "=r"(old));
    if (on) asm volatile("msr fpcr, %0" ::"r"(old | 1ull << 24));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(old)); }
#endif
};

U3 group_count(const LaunchDesc& d) {
  if (d.by_groups) return d.groups;
  auto up = [](uint32_t a, uint32_t b) { return (a + b - 1) / b; };
  return {up(d.grid_threads.x, d.tg.x), up(d.grid_threads.y, d.tg.y),
          up(d.grid_threads.z, d.tg.z)};
}

struct Dispatch {
  const LaunchDesc& d;
  void (*body)(void*);
  void* ctx;
  U3 n;
  uint64_t total;
  std::atomic<uint64_t> next{0};
  std::mutex mutex{};

  void run_groups(Worker& w, uint64_t& done, uint64_t& shared) {
    SignalStack signal_stack;
    FlushDenormals flush(d.ftz);
    Timer timer(d.seconds);
    if (!sigsetjmp(escape, 1)) {
      armed = true;
      for (uint64_t i; (i = next.fetch_add(1)) < total;) {
        if (d.sched == 1) i = total - 1 - i;
        run_group(w, {(uint32_t)(i % n.x), (uint32_t)(i / n.x % n.y), (uint32_t)(i / n.x / n.y)});
        done++;
        if (w.shared_bytes > shared) shared = w.shared_bytes;
      }
    }
    armed = false;
    tls.cur = nullptr;
  }

  void work(uint32_t index) {
    Worker w;
    w.d = &d, w.body = body, w.ctx = ctx;
    w.rng = d.seed * 0x9E3779B97F4A7C15ull + 88172645463325252ull + index;
    worker = &w, tls.cur = nullptr;
    static thread_local uint64_t done, shared;  // a local could be lost by the jump
    done = shared = 0;
    run_groups(w, done, shared);
    worker = nullptr;
    std::lock_guard<std::mutex> lock(mutex);
    stats.switches += w.n_switch, stats.simd_ops += w.n_coll, stats.barriers += w.n_bar;
    stats.groups += done;
    if (shared > stats.shared_bytes) stats.shared_bytes = shared;
  }
};
}  // namespace

void give_up() {
  if (!armed) return;
  armed = false;
  siglongjmp(escape, 1);
}

API int simt_launch(const LaunchDesc* d, void (*body)(void*), void* ctx) {
  U3 n = group_count(*d);
  Dispatch dispatch{*d, body, ctx, n, (uint64_t)n.x * n.y * n.z};
  stats = {};
  Handlers handlers;
  uint64_t threads = checking || !d->nworkers ? 1 : d->nworkers;
  if (threads > dispatch.total) threads = dispatch.total;
  if (threads <= 1) {
    dispatch.work(0);
    return 0;
  }
  std::vector<std::thread> pool;
  for (uint32_t i = 0; i < threads; i++) pool.emplace_back([&dispatch, i] { dispatch.work(i); });
  for (std::thread& t : pool) t.join();
  return 0;
}
API void simt_get_stats(Stats* out) { *out = stats; }

// Dynamic memory and launch shape of the next <<<>>> (CUDA).
static LaunchDesc cuda_defaults = {};
API LaunchDesc* simt_cuda_defaults() { return &cuda_defaults; }
}  // namespace simt
