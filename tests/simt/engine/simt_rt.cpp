// simt runtime: fiber engine + memory checker. One OS thread runs one threadgroup at a time,
// one fiber per GPU thread.
#include "../include/simt/abi.h"
#include <sys/mman.h>
#include <signal.h>
#include <setjmp.h>
#include <string.h>
#include <cmath>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <stdarg.h>
#include <atomic>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <vector>
#include <set>
#include <tuple>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#define API extern "C" __attribute__((visibility("default")))
#define NOSAN __attribute__((no_sanitize("address","undefined")))
namespace simt {
thread_local Tls tls __attribute__((tls_model("initial-exec")));

// ---------------------------------------------------------------- context switch
#if defined(__x86_64__)
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.globl simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch,.-simt_switch
)");
static void* make_stack(char* top, void (*entry)()) {
  uintptr_t t = (uintptr_t)top & ~(uintptr_t)15;
  void** p = (void**)t;
  *--p = nullptr;               // alignment: at entry rsp%16==8
  *--p = (void*)entry;          // return address
  for (int i = 0; i < 6; i++) *--p = nullptr;
  return p;
}
#elif defined(__aarch64__)
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.globl simt_switch
.type simt_switch,%function
simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size simt_switch,.-simt_switch
)");
static void* make_stack(char* top, void (*entry)()) {
  uintptr_t t = (uintptr_t)top & ~(uintptr_t)15;
  void** p = (void**)(t - 160);
  memset(p, 0, 160);
  p[11] = (void*)entry;         // x30
  return p;
}
#else
#error "no context switch for this machine"
#endif

// ---------------------------------------------------------------- reports
struct Report { std::string kind, msg, file; uint32_t line; uint64_t pc; uint64_t count; };
static std::mutex rep_mu;
static std::vector<Report> reports;
static std::map<std::tuple<std::string, std::string, uint32_t, uint64_t>, size_t> rep_ix;
static std::atomic<bool> abort_flag{false};
static void report(const char* kind, const std::string& msg, const char* file, uint32_t line, uint64_t pc) {
  std::lock_guard<std::mutex> l(rep_mu);
  auto key = std::make_tuple(std::string(kind), std::string(file ? file : ""), line, pc);
  auto it = rep_ix.find(key);
  if (it != rep_ix.end()) { reports[it->second].count++; return; }
  if (reports.size() > 200) return;
  rep_ix[key] = reports.size();
  reports.push_back({kind, msg, file ? file : "", line, pc, 1});
}
static std::string fmt(const char* f, ...) {
  char b[512]; va_list a; va_start(a, f); vsnprintf(b, sizeof b, f, a); va_end(a); return b;
}
extern "C" void simt_fail(const char* kind, const char* msg, const char* file, uint32_t line) {
  report(kind, msg, file, line, 0);
}

// ---------------------------------------------------------------- memory regions + shadow
struct Cell { uint32_t w_thr, w_ep, r_thr, r_ep; uint16_t w_sep, r_sep; uint8_t r_multi, pad[3]; };
struct Region {
  const char* lo; const char* hi; std::string name; bool readonly, is_tg; uint32_t gran;
  std::vector<Cell> cells; std::vector<uint8_t> valid; // valid: 0 out of any object, 1 allocated, 2 written
  std::atomic<uint64_t> rd{0}, wr{0};
};
static std::vector<Region*> regions;
static bool checking = false;

// ---------------------------------------------------------------- worker
constexpr size_t STACK = 192 * 1024;
constexpr size_t ARENA = 1 << 20;
struct Simd { uint64_t ready, coll, bar, live; uint32_t epoch; uint32_t base, n; };
struct SharedVar { size_t off, size; std::string name; };
struct Worker {
  void* main_sp = nullptr;
  std::vector<Lane> lanes;
  std::vector<Simd> simds;
  char* stacks = nullptr; size_t nstacks = 0;
  char* arena = nullptr; size_t arena_used = 0; size_t shared_bytes = 0; size_t arena_hi = 0;
  std::unordered_map<const void*, size_t> var_off;
  size_t dyn_off[8];
  const LaunchDesc* d = nullptr;
  void (*body)(void*) = nullptr; void* ctx = nullptr;
  uint32_t tg_epoch = 1, dev_epoch = 1;
  uint64_t rng = 1;
  Region tg;
  uint64_t n_switch = 0, n_coll = 0, n_bar = 0;
  std::vector<std::vector<char>> slots;
};
static thread_local Worker* W = nullptr;

static inline uint64_t rnd(Worker& w) { uint64_t x = w.rng; x ^= x << 13; x ^= x >> 7; x ^= x << 17; return w.rng = x; }
static inline Lane* pick(Worker& w, Simd& s) {
  uint64_t m = s.ready;
  if (w.d->sched == 0) return &w.lanes[s.base + __builtin_ctzll(m)];
  if (w.d->sched == 1) return &w.lanes[s.base + 63 - __builtin_clzll(m)];
  int k = rnd(w) % __builtin_popcountll(m);
  while (k--) m &= m - 1;
  return &w.lanes[s.base + __builtin_ctzll(m)];
}
static inline void block(State st) {
  Worker& w = *W; Lane* me = tls.cur; Simd& s = w.simds[me->simd];
  uint64_t bit = 1ull << me->lane;
  me->st = st; s.ready &= ~bit;
  if (st == AT_COLL) s.coll |= bit; else if (st == AT_BAR) s.bar |= bit; else s.live &= ~bit;
  w.n_switch++;
  if (s.ready) { Lane* nx = pick(w, s); tls.cur = nx; simt_switch(&me->sp, nx->sp); }
  else { tls.cur = nullptr; simt_switch(&me->sp, w.main_sp); }
}
static void fiber_main() {
  Worker& w = *W;
  w.body(w.ctx);
  block(DONE);
  abort();
}
extern "C" void simt_exit_thread() { block(DONE); abort(); }
extern "C" void simt_block_coll(void* val, uint64_t arg, uint64_t need, ResolveFn rf, const char* file, uint32_t line) {
  Lane* me = tls.cur; me->val = val; me->arg = arg; me->need = need; me->rf = rf; me->file = file; me->line = line;
  block(AT_COLL);
}
static void resolve_simd_barrier(Lane** l, int n, Lane**, int) { W->simds[l[0]->simd].epoch++; }
extern "C" void simt_simd_barrier(uint32_t flags, uint64_t need, const char* file, uint32_t line) {
  simt_block_coll(nullptr, flags, need, resolve_simd_barrier, file, line);
}
extern "C" void simt_barrier(uint32_t flags, const char* file, uint32_t line) {
  Lane* me = tls.cur; me->flags = flags | (me->flags & 0x80); me->file = file; me->line = line;
  block(AT_BAR);
}
extern "C" void* simt_shared(const void* key, size_t size, size_t align, const char* name) {
  Worker& w = *W; bool zero = align >> 32; align &= 0xffffffff;
  auto it = w.var_off.find(key);
  if (it != w.var_off.end()) return w.arena + it->second;
  size_t o = (w.arena_used + align - 1) / align * align;
  w.shared_bytes = (w.shared_bytes + align - 1) / align * align + size;
  if (o + size + 128 > ARENA) { fprintf(stderr, "simt: arena overflow\n"); abort(); }
  w.var_off[key] = o; w.arena_used = o + size + 128;   // red zone
  if (w.shared_bytes > w.d->shared_limit) report("threadgroup-memory-limit", fmt("%zu bytes of threadgroup memory, limit %llu (at '%s')", w.shared_bytes, (unsigned long long)w.d->shared_limit, name), "", 0, 0);
  memset(w.arena + o, zero ? 0 : 0xFF, size);
  if (checking) { memset(&w.tg.valid[o], zero ? 2 : 1, size); memset((void*)&w.tg.cells[o], 0, size * sizeof(Cell)); }
  return w.arena + o;
}
extern "C" void* simt_dyn_shared(uint32_t i) {
  Worker& w = *W;
  static char keys[8];
  return simt_shared(&keys[i], w.d->dyn_bytes[i] ? w.d->dyn_bytes[i] : 1, 128, "dynamic");
}

static void resolve_simd(Worker& w, Simd& s) {
  // group blocked lanes by (function, site)
  uint64_t todo = s.coll; bool any = false;
  int ngroups = 0;
  while (todo) {
    Lane* first = &w.lanes[s.base + __builtin_ctzll(todo)];
    Lane* part[64]; Lane* by[64]; memset(by, 0, sizeof by); int n = 0; uint64_t mask = 0;
    for (uint64_t m = todo; m; m &= m - 1) {
      int i = __builtin_ctzll(m); Lane* l = &w.lanes[s.base + i];
      if (l->rf == first->rf && l->line == first->line && (l->file == first->file || !strcmp(l->file, first->file)) && l->need == first->need) { part[n++] = l; by[i] = l; mask |= 1ull << i; }
    }
    todo &= ~mask; ngroups++;
    uint64_t need = first->need;
    if (need) {
      uint64_t exist = s.n == 64 ? ~0ull : ((1ull << s.n) - 1);
      uint64_t want = need & exist;
      if (want & ~mask) {
        if (want & ~mask & s.coll) { if (todo || (s.coll & ~mask)) {} }
        report("mask-mismatch", fmt("lanes %#llx named in the mask %#llx are not at this operation (present %#llx, exited %#llx)", (unsigned long long)(want & ~mask), (unsigned long long)need, (unsigned long long)mask, (unsigned long long)(exist & ~s.live)), first->file, first->line, 0);
      }
      if (mask & ~need) report("mask-mismatch", fmt("lanes %#llx execute the operation but are not in its mask %#llx", (unsigned long long)(mask & ~need), (unsigned long long)need), first->file, first->line, 0);
    } else if (mask != (s.n == 64 ? ~0ull : ((1ull << s.n) - 1))) {
      report("divergent-simd-op", fmt("only lanes %#llx of %u take part (exited %#llx, at barrier %#llx, at another op %#llx)", (unsigned long long)mask, s.n, (unsigned long long)(((s.n == 64 ? ~0ull : ((1ull << s.n) - 1))) & ~s.live), (unsigned long long)s.bar, (unsigned long long)(s.coll & ~mask)), first->file, first->line, 0);
    }
    first->rf(part, n, by, w.d->width);
    w.n_coll++;
    for (int i = 0; i < n; i++) part[i]->st = READY;
    s.ready |= mask; any = true;
  }
  s.coll = 0; (void)any;
}

static void run_group(Worker& w, U3 gid) {
  const LaunchDesc& d = *w.d; GroupInfo& g = tls.g;
  g.gid = gid; g.gsize_nominal = d.tg; g.width = d.width; g.cuda = d.cuda; g.order = d.order;
  auto cl = [](uint32_t a, uint32_t b) { return a < b ? a : b; };
  if (d.by_groups) { g.ngroups = d.groups; g.gsize = d.tg; g.grid = {d.groups.x * d.tg.x, d.groups.y * d.tg.y, d.groups.z * d.tg.z}; }
  else {
    g.grid = d.grid_threads;
    g.ngroups = {(g.grid.x + d.tg.x - 1) / d.tg.x, (g.grid.y + d.tg.y - 1) / d.tg.y, (g.grid.z + d.tg.z - 1) / d.tg.z};
    g.gsize = {cl(d.tg.x, g.grid.x - gid.x * d.tg.x), cl(d.tg.y, g.grid.y - gid.y * d.tg.y), cl(d.tg.z, g.grid.z - gid.z * d.tg.z)};
  }
  g.group_lin = gid.x + g.ngroups.x * (gid.y + g.ngroups.y * gid.z);
  uint32_t n = g.gsize.x * g.gsize.y * g.gsize.z;
  g.nthreads = n; g.nsimd = (n + d.width - 1) / d.width;
  if (w.nstacks < n) {
    if (w.stacks) munmap(w.stacks, w.nstacks * STACK);
    w.stacks = (char*)mmap(nullptr, n * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    w.nstacks = n;
  }
  if (!w.arena) { w.arena = (char*)mmap(nullptr, ARENA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); if (((uintptr_t)w.arena >> 32) != (((uintptr_t)w.arena + ARENA) >> 32)) { fprintf(stderr, "simt: arena straddles 4 GiB\n"); abort(); } }
  if (checking) {
    if (w.tg.valid.empty()) { w.tg.valid.resize(ARENA); w.tg.cells.resize(ARENA); w.tg.is_tg = true; w.tg.name = "threadgroup"; w.tg.gran = 1; w.tg.readonly = false; }
    memset(w.tg.valid.data(), 0, w.arena_hi > w.arena_used ? w.arena_hi : w.arena_used);
    w.tg.lo = w.arena; w.tg.hi = w.arena + ARENA;
  }
  w.arena_hi = w.arena_used > w.arena_hi ? w.arena_used : w.arena_hi;
  w.arena_used = 64; w.shared_bytes = 0; w.var_off.clear();
  w.tg_epoch = 1; w.dev_epoch = 1; w.slots.clear();
  w.lanes.resize(n); w.simds.resize(g.nsimd);
  for (uint32_t s = 0; s < g.nsimd; s++) {
    uint32_t c = cl(d.width, n - s * d.width); uint64_t m = c == 64 ? ~0ull : ((1ull << c) - 1);
    w.simds[s] = {m, 0, 0, m, 1, s * d.width, c};
  }
  uint32_t i = 0;
  for (uint32_t z = 0; z < g.gsize.z; z++) for (uint32_t y = 0; y < g.gsize.y; y++) for (uint32_t x = 0; x < g.gsize.x; x++, i++) {
    Lane& l = w.lanes[i];
    l.st = READY; l.flags = 0; l.lin = i; l.simd = i / d.width; l.lane = i % d.width; l.tid = {x, y, z}; l.file = ""; l.line = 0;
    char* top = w.stacks + (i + 1) * STACK - 64 - (i * 192) % 4096;
    l.sp = make_stack(top, fiber_main);
  }
  for (;;) {
    uint32_t off = d.sched == 2 ? rnd(w) % g.nsimd : 0;
    for (uint32_t k = 0; k < g.nsimd; k++) {
      uint32_t si = d.sched == 1 ? g.nsimd - 1 - k : (k + off) % g.nsimd;
      Simd& s = w.simds[si];
      for (;;) {
        if (s.ready) { Lane* nx = pick(w, s); tls.cur = nx; simt_switch(&w.main_sp, nx->sp); tls.cur = nullptr; }
        if (s.coll && !s.ready) { resolve_simd(w, s); continue; }
        if (!s.ready) break;
      }
    }
    uint32_t live = 0, bar = 0; Lane* fb = nullptr; bool mixed = false;
    for (auto& s : w.simds) {
      live += __builtin_popcountll(s.live); bar += __builtin_popcountll(s.bar);
      for (uint64_t m = s.bar; m; m &= m - 1) { Lane* l = &w.lanes[s.base + __builtin_ctzll(m)]; if (!fb) fb = l; else if (l->line != fb->line || (l->file != fb->file && strcmp(l->file, fb->file))) mixed = true; }
    }
    if (!live) break;
    if (bar != live) { fprintf(stderr, "simt: internal scheduling error\n"); abort(); }
    if (live != n && !d.cuda) report("divergent-barrier", fmt("%u of %u threads returned before this threadgroup barrier", n - live, n), fb->file, fb->line, 0);
    if (mixed) { Lane* o = nullptr; for (auto& l : w.lanes) if (l.st == AT_BAR && (l.line != fb->line || strcmp(l.file, fb->file))) { o = &l; break; }
      report("divergent-barrier", fmt("threads of one group wait at different barriers: %s:%u and %s:%u", fb->file, fb->line, o->file, o->line), fb->file, fb->line, 0); }
    uint32_t fl = fb->flags;
    if (fl & MEM_TG) w.tg_epoch++;
    if (fl & MEM_DEVICE) w.dev_epoch++;
    w.n_bar++;
    for (auto& s : w.simds) { for (uint64_t m = s.bar; m; m &= m - 1) w.lanes[s.base + __builtin_ctzll(m)].st = READY; s.ready = s.bar; s.bar = 0; }
  }
}

// ---------------------------------------------------------------- checker
static Region* find_region(Worker& w, const char* p) {
  if (p >= w.tg.lo && p < w.tg.hi) return &w.tg;
  for (Region* r : regions) if (p >= r->lo && p < r->hi) return r;
  for (Region* r : regions) if (p >= r->lo - 4096 && p < r->hi + 4096) return r;
  return nullptr;
}
static std::unordered_set<uint64_t> ok_pages;  // static data of loaded modules
static NOSAN void access(const char* p, size_t n, bool wr, bool atomic, uint64_t pc) {
  Lane* me = tls.cur; if (!me || !checking || (me->flags & 0x80)) return;
  Worker& w = *W;
  // own stack (private memory)
  const char* slo = w.stacks + me->lin * STACK;
  if (p >= slo && p < slo + STACK) return;
  Region* r = find_region(w, p);
  if (!r) {
    if (p >= w.stacks && p < w.stacks + w.nstacks * STACK) { report("private-escape", fmt("thread %u touches the private memory of thread %zu", me->lin, (size_t)(p - w.stacks) / STACK), "", 0, pc); return; }
    if (wr) report("wild-write", fmt("%zu-byte write outside every buffer", n), "", 0, pc);
    return;  // reads of static tables are fine
  }
  (wr ? r->wr : r->rd).fetch_add(n, std::memory_order_relaxed);
  if (p < r->lo || p + n > r->hi) { report("out-of-bounds", fmt("%zu-byte %s at offset %td of '%s' (size %td), thread %u of group %u", n, wr ? "write" : "read", p - r->lo, r->name.c_str(), r->hi - r->lo, me->lin, tls.g.group_lin), "", 0, pc); return; }
  if (wr && r->readonly) report("write-to-input", fmt("write to read-only buffer '%s'", r->name.c_str()), "", 0, pc);
  if ((uintptr_t)p % (n > 16 ? 16 : n) && (n & (n - 1)) == 0) report("misaligned", fmt("%zu-byte access at address %% %zu = %zu in '%s'", n, n, (size_t)((uintptr_t)p % n), r->name.c_str()), "", 0, pc);
  size_t o = p - r->lo;
  uint32_t ep = r->is_tg ? w.tg_epoch : w.dev_epoch;
  uint16_t sep = (uint16_t)w.simds[me->simd].epoch;
  uint32_t thr = (tls.g.group_lin + 1) * 1024 + me->lin;
  size_t c0 = o / r->gran, c1 = (o + n - 1) / r->gran;
  for (size_t c = c0; c <= c1; c++) {
    uint8_t& v = r->valid[c];
    if (!v) { report("out-of-bounds", fmt("%zu-byte %s at threadgroup offset %zu hits a red zone between variables, thread %u", n, wr ? "write" : "read", o, me->lin), "", 0, pc); return; }
    if (!wr && v == 1) { report("uninitialised-read", fmt("%zu-byte read of never written memory at offset %zu of '%s', thread %u of group %u", n, o, r->name.c_str(), me->lin, tls.g.group_lin), "", 0, pc); }
    if (r->readonly) continue;
    Cell& k = r->cells[c];
    auto conflicts = [&](uint32_t othr, uint32_t oep, uint16_t osep) {
      if (!othr || othr == thr) return false;
      if (othr / 1024 != thr / 1024) return true;            // another group
      if (oep != ep) return false;                            // separated by a group barrier
      if ((othr % 1024) / tls.g.width == me->simd && osep != sep) return false;  // separated by a simdgroup barrier
      return true;
    };
    if (!atomic) {
      if (conflicts(k.w_thr, k.w_ep, k.w_sep)) report(wr ? "race-write-write" : "race-read-write", fmt("thread %u and thread %u of group %u/%u on offset %zu of '%s' without a barrier in between", me->lin, k.w_thr % 1024, tls.g.group_lin, k.w_thr / 1024 - 1, o, r->name.c_str()), "", 0, pc);
      if (wr && (conflicts(k.r_thr, k.r_ep, k.r_sep) || (k.r_multi && k.r_ep == ep))) report("race-write-read", fmt("thread %u writes what thread %u of group %u read, offset %zu of '%s', no barrier in between", me->lin, k.r_thr % 1024, tls.g.group_lin, o, r->name.c_str()), "", 0, pc);
    }
    if (wr) { if (!atomic) { k.w_thr = thr; k.w_ep = ep; k.w_sep = sep; } v = 2; k.r_thr = 0; k.r_multi = 0; }
    else if (!atomic) {
      if (k.r_thr && k.r_thr != thr && k.r_ep == ep && ((k.r_thr % 1024) / tls.g.width != me->simd)) k.r_multi = 1;
      else if (k.r_ep != ep) k.r_multi = 0;
      k.r_thr = thr; k.r_ep = ep; k.r_sep = sep;
    }
  }
}
extern "C" void simt_note_atomic(const void* p, size_t n, int wr, void* pc) { if (checking) access((const char*)p, n, wr, true, (uint64_t)pc); }
#define PC ((uint64_t)__builtin_return_address(0))
#define RW(N) \
  API NOSAN void __tsan_read##N(void* p) { access((char*)p, N, false, false, PC); } \
  API NOSAN void __tsan_write##N(void* p) { access((char*)p, N, true, false, PC); } \
  API NOSAN void __tsan_unaligned_read##N(void* p) { access((char*)p, N, false, false, PC); } \
  API NOSAN void __tsan_unaligned_write##N(void* p) { access((char*)p, N, true, false, PC); } \
  API NOSAN void __tsan_read_write##N(void* p) { access((char*)p, N, false, false, PC); access((char*)p, N, true, false, PC); } \
  API NOSAN void __tsan_unaligned_read_write##N(void* p) { access((char*)p, N, false, false, PC); access((char*)p, N, true, false, PC); }
RW(1) RW(2) RW(4) RW(8) RW(16)
API void __tsan_init() {}
API void __tsan_func_entry(void*) {}
API void __tsan_func_exit() {}
API void __tsan_vptr_update(void**, void*) {}
API void __tsan_vptr_read(void**) {}
API NOSAN void __tsan_read_range(void* p, long n) { access((char*)p, n, false, false, PC); }
API NOSAN void __tsan_write_range(void* p, long n) { access((char*)p, n, true, false, PC); }
API NOSAN void* __tsan_memcpy(void* d, const void* s, size_t n) { if (n) { access((const char*)s, n, false, false, PC); access((char*)d, n, true, false, PC); } return memcpy(d, s, n); }
API NOSAN void* __tsan_memmove(void* d, const void* s, size_t n) { if (n) { access((const char*)s, n, false, false, PC); access((char*)d, n, true, false, PC); } return memmove(d, s, n); }
API NOSAN void* __tsan_memset(void* d, int c, size_t n) { if (n) access((char*)d, n, true, false, PC); return memset(d, c, n); }
#define TA(N, T) \
  API NOSAN T __tsan_atomic##N##_load(const volatile T* p, int) { return __atomic_load_n(p, 5); } API NOSAN void __tsan_atomic##N##_store(volatile T* p, T v, int) { __atomic_store_n(p, v, 5); } \
  API NOSAN T __tsan_atomic##N##_exchange(volatile T* p, T v, int) { return __atomic_exchange_n(p, v, 5); } API NOSAN T __tsan_atomic##N##_fetch_add(volatile T* p, T v, int) { return __atomic_fetch_add(p, v, 5); } API NOSAN T __tsan_atomic##N##_fetch_sub(volatile T* p, T v, int) { return __atomic_fetch_sub(p, v, 5); } API NOSAN T __tsan_atomic##N##_fetch_or(volatile T* p, T v, int) { return __atomic_fetch_or(p, v, 5); } API NOSAN T __tsan_atomic##N##_fetch_and(volatile T* p, T v, int) { return __atomic_fetch_and(p, v, 5); } API NOSAN T __tsan_atomic##N##_fetch_xor(volatile T* p, T v, int) { return __atomic_fetch_xor(p, v, 5); } \
  API NOSAN int __tsan_atomic##N##_compare_exchange_strong(volatile T* p, T* e, T v, int, int) { return __atomic_compare_exchange_n(p, e, v, false, 5, 5); } API NOSAN int __tsan_atomic##N##_compare_exchange_weak(volatile T* p, T* e, T v, int, int) { return __atomic_compare_exchange_n(p, e, v, true, 5, 5); } API NOSAN T __tsan_atomic##N##_compare_exchange_val(volatile T* p, T e, T v, int, int) { __atomic_compare_exchange_n(p, &e, v, false, 5, 5); return e; }
TA(8, uint8_t) TA(16, uint16_t) TA(32, uint32_t) TA(64, uint64_t)
API void __tsan_atomic_thread_fence(int) {} API void __tsan_atomic_signal_fence(int) {}
// UBSan handlers (full handlers; first member of the data block is the source location)
struct SrcLoc { const char* file; uint32_t line, col; };
#define UB(NAME, ...) \
  API NOSAN void __ubsan_handle_##NAME(SrcLoc* l, ##__VA_ARGS__) { report("ub-" #NAME, "", l->file, l->line, 0); } \
  API NOSAN void __ubsan_handle_##NAME##_abort(SrcLoc* l, ##__VA_ARGS__) { report("ub-" #NAME, "", l->file, l->line, 0); }
UB(add_overflow, void*, void*) UB(sub_overflow, void*, void*) UB(mul_overflow, void*, void*) UB(negate_overflow, void*)
UB(divrem_overflow, void*, void*) UB(shift_out_of_bounds, void*, void*) UB(type_mismatch_v1, void*)
UB(float_cast_overflow, void*) UB(load_invalid_value, void*) UB(pointer_overflow, void*, void*) UB(invalid_builtin)
UB(vla_bound_not_positive, void*) UB(implicit_conversion, void*, void*) UB(nonnull_arg) UB(builtin_unreachable) UB(missing_return)

// ---------------------------------------------------------------- launch
struct Stats { uint64_t switches, colls, bars, groups, shared_bytes; };
static Stats stats;
static thread_local sigjmp_buf jb; static thread_local volatile bool armed = false;
API NOSAN void __ubsan_handle_out_of_bounds(SrcLoc* l, void* ix) { report("ub-out_of_bounds", fmt("index %lld", (long long)(intptr_t)ix), l->file, l->line, 0); if (armed) { armed = false; siglongjmp(jb, 1); } }
static void on_segv(int sig, siginfo_t* si, void*) {
  if (!armed) { signal(sig, SIG_DFL); raise(sig); return; }
  Lane* l = tls.cur;
  report("memory-fault", fmt("%s at %p, thread %d of group %u", sig == SIGSEGV ? "SIGSEGV" : sig == SIGFPE ? "SIGFPE" : "SIGBUS", si->si_addr, l ? (int)l->lin : -1, tls.g.group_lin), l ? l->file : "", l ? l->line : 0, 0);
  armed = false; siglongjmp(jb, 1);
}
// ---------------------------------------------------------------- services for MSL units
API NOSAN uint64_t simt_cur() { return (uint64_t)tls.cur; }
API NOSAN uint64_t simt_group() { return (uint64_t)&tls.g; }
// An error of up to d->ulp units in the last place, the same for the same call: a function stays a function.
static float noisy(float r, int f, float x, float y = 0) {
  uint32_t n = W ? W->d->ulp : 0;
  if (!n || r == 0 || !std::isfinite(r)) return r;
  uint32_t a, b; memcpy(&a, &x, 4); memcpy(&b, &y, 4);
  uint64_t h = (a * 0x9E3779B97F4A7C15ull) ^ (b * 0xC2B2AE3D27D4EB4Full) ^ ((uint64_t)f << 56) ^ W->d->seed;
  h ^= h >> 29; h *= 0xBF58476D1CE4E5B9ull; h ^= h >> 32;
  int step = (int)(h % (2 * n + 1)) - (int)n;
  for (; step > 0; step--) r = nextafterf(r, INFINITY);
  for (; step < 0; step++) r = nextafterf(r, -INFINITY);
  return r;
}
static float math1(int f, float x) {
  switch (f) {
    case 0: return expf(x); case 1: return exp2f(x); case 2: return logf(x); case 3: return log2f(x); case 4: return sinf(x); case 5: return cosf(x); case 6: return tanf(x); case 7: return tanhf(x);
    case 8: return sinhf(x); case 9: return coshf(x); case 10: return asinf(x); case 11: return acosf(x); case 12: return atanf(x); case 13: return exp10f(x); case 14: return log10f(x); case 15: return (float)(1.0 / sqrt((double)x));
    case 16: return asinhf(x); case 17: return acoshf(x); case 18: return atanhf(x); case 19: return (float)cos(M_PI * x); case 20: return (float)sin(M_PI * x);
  } return 0;
}
API float simt_m1(int f, float x) { return noisy(math1(f, x), f, x); }
static float math2(int f, float x, float y) {
  switch (f) { case 0: return powf(x, y); case 1: return atan2f(x, y); case 2: return fmodf(x, y); case 3: return ldexpf(x, (int)y); } return 0;
}
API float simt_m2(int f, float x, float y) { float r = math2(f, x, y); return f < 2 ? noisy(r, 32 + f, x, y) : r; }  // fmod and ldexp are exact
#if defined(__x86_64__)
// compiler-rt's float -> bfloat16 (absent from libgcc < 13); result travels in the low half of xmm0, so a float return has the same ABI
API NOSAN float __truncsfbf2(float f) {
  uint32_t u; memcpy(&u, &f, 4); uint32_t h;
  if ((u & 0x7fffffff) > 0x7f800000) h = (u >> 16) | 0x40; else h = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  h &= 0xffff; float r; memcpy(&r, &h, 4); return r;
}
#endif
API int simt_launch(const LaunchDesc* d, void (*body)(void*), void* ctx) {
  U3 ng;
  if (d->by_groups) ng = d->groups;
  else ng = {(d->grid_threads.x + d->tg.x - 1) / d->tg.x, (d->grid_threads.y + d->tg.y - 1) / d->tg.y, (d->grid_threads.z + d->tg.z - 1) / d->tg.z};
  uint64_t total = (uint64_t)ng.x * ng.y * ng.z;
  std::atomic<uint64_t> next{0};
  uint32_t nw = checking ? 1 : (d->nworkers ? d->nworkers : 1);
  if (nw > total) nw = total ? total : 1;
  std::mutex mu;
  stats = {};
  auto work = [&](uint32_t wi) {
    Worker w; w.d = d; w.body = body; w.ctx = ctx; w.rng = d->seed * 0x9E3779B97F4A7C15ull + 88172645463325252ull + wi;
    W = &w; tls.cur = nullptr;
#if defined(__x86_64__)
    unsigned mx = _mm_getcsr();
    if (d->ftz) _mm_setcsr(mx | 0x8040);
#endif
    uint64_t done = 0, sh = 0;
    stack_t ss = {}, os; std::vector<char> alt(65536); ss.ss_sp = alt.data(); ss.ss_size = alt.size(); sigaltstack(&ss, &os);
    if (!sigsetjmp(jb, 1)) for (armed = true;;) {
      uint64_t i = next.fetch_add(1);
      if (i >= total) break;
      if (d->sched == 1) i = total - 1 - i;
      U3 g = {(uint32_t)(i % ng.x), (uint32_t)(i / ng.x % ng.y), (uint32_t)(i / ng.x / ng.y)};
      run_group(w, g); done++; if (w.shared_bytes > sh) sh = w.shared_bytes;
    }
    armed = false; sigaltstack(&os, nullptr);
#if defined(__x86_64__)
    _mm_setcsr(mx);
#endif
    if (w.stacks) munmap(w.stacks, w.nstacks * STACK);
    if (w.arena) munmap(w.arena, ARENA);
    std::lock_guard<std::mutex> l(mu);
    stats.switches += w.n_switch; stats.colls += w.n_coll; stats.bars += w.n_bar; stats.groups += done; if (sh > stats.shared_bytes) stats.shared_bytes = sh;
    W = nullptr;
  };
  struct sigaction sa = {}, o1, o2, o3; sa.sa_sigaction = on_segv; sa.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER; sigaction(SIGSEGV, &sa, &o1); sigaction(SIGBUS, &sa, &o2); sigaction(SIGFPE, &sa, &o3);
  struct Restore { struct sigaction *a, *b, *c; ~Restore() { sigaction(SIGSEGV, a, nullptr); sigaction(SIGBUS, b, nullptr); sigaction(SIGFPE, c, nullptr); } } restore{&o1, &o2, &o3};
  if (nw <= 1) work(0);
  else { std::vector<std::thread> t; for (uint32_t i = 0; i < nw; i++) t.emplace_back(work, i); for (auto& x : t) x.join(); }
  return 0;
}
API char* simt_arena_base() { return W->arena; }
API void* simt_lane_slot(size_t bytes) { Worker& w = *W; if (w.slots.empty()) w.slots.resize(w.lanes.size()); auto& v = w.slots[tls.cur->lin]; if (v.empty()) v.assign(bytes, 0); return v.data(); }
static LaunchDesc cuda_defaults = {};
API LaunchDesc* simt_cuda_defaults() { return &cuda_defaults; }
API NOSAN void simt_note_range(const void* p, size_t n, int wr) { Lane* m = tls.cur; if (!m || !checking) return; uint8_t f = m->flags; m->flags &= 0x7f; access((const char*)p, n, wr, false, (uint64_t)__builtin_return_address(0)); m->flags = f; }
API void simt_check_begin(int on) { checking = on; for (auto* r : regions) delete r; regions.clear(); }
API void simt_check_region(const void* p, uint64_t n, const char* name, int readonly, uint32_t gran, int init) {
  Region* r = new Region; r->lo = (const char*)p; r->hi = r->lo + n; r->name = name; r->readonly = readonly; r->is_tg = false; r->gran = gran ? gran : 1;
  r->valid.assign(n / r->gran + 1, init ? 2 : 1); if (!readonly) { r->cells.resize(n / r->gran + 1); memset((void*)r->cells.data(), 0, r->cells.size() * sizeof(Cell)); }
  regions.push_back(r);
}
API void simt_get_stats(Stats* s) { *s = stats; }
API int simt_n_reports() { return (int)reports.size(); }
API int simt_get_report(int i, char* kind, char* msg, char* file, uint32_t* line, uint64_t* pc, uint64_t* count) {
  Report& r = reports[i]; snprintf(kind, 64, "%s", r.kind.c_str()); snprintf(msg, 512, "%s", r.msg.c_str()); snprintf(file, 512, "%s", r.file.c_str()); *line = r.line; *pc = r.pc; *count = r.count; return 0;
}
API void simt_clear_reports() { reports.clear(); rep_ix.clear(); }
API void simt_region_traffic(int i, uint64_t* rd, uint64_t* wr) { *rd = regions[i]->rd; *wr = regions[i]->wr; }
}
