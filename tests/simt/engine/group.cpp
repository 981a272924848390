// One threadgroup: its fibers, simdgroup operations and barriers.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>

#include "engine.h"

namespace simt {
thread_local Tls tls __attribute__((tls_model("initial-exec")));
thread_local Worker* worker = nullptr;

namespace {
enum { ASCENDING, DESCENDING, RANDOM };

uint64_t next_random(Worker& w) {
  w.rng ^= w.rng << 13, w.rng ^= w.rng >> 7, w.rng ^= w.rng << 17;
  return w.rng;
}

// The ready lane that runs next.
Lane* pick(Worker& w, const Simd& s) {
  uint64_t ready = s.ready;
  if (w.d->sched == DESCENDING) return &w.lanes[s.base + 63 - __builtin_clzll(ready)];
  if (w.d->sched == RANDOM)
    for (int skip = (int)(next_random(w) % __builtin_popcountll(ready)); skip > 0; skip--)
      ready &= ready - 1;
  return &w.lanes[s.base + __builtin_ctzll(ready)];
}

// The running lane stops in `state`; the next one of its simdgroup runs, else the scheduler.
void block(State state) {
  Worker& w = *worker;
  Lane* me = tls.cur;
  Simd& s = w.simds[me->simd];
  uint64_t bit = 1ull << me->lane;
  me->st = state;
  s.ready &= ~bit;
  if (state == AT_COLL) s.coll |= bit;
  else if (state == AT_BAR) s.bar |= bit;
  else s.live &= ~bit;
  w.n_switch++;
  tls.cur = s.ready ? pick(w, s) : nullptr;
  simt_switch(&me->sp, tls.cur ? tls.cur->sp : w.main_sp);
}

void fiber_main() {
  worker->body(worker->ctx);
  block(DONE);
  abort();
}

bool same_place(const Lane& a, const Lane& b) {
  return a.line == b.line && (a.file == b.file || !strcmp(a.file, b.file));
}
bool same_operation(const Lane& a, const Lane& b) {
  return a.rf == b.rf && a.need == b.need && same_place(a, b);
}

void check_lanes(const Simd& s, const Lane& first, uint64_t present) {
  Place place = {first.file, first.line, 0};
  uint64_t exist = lane_bits(s.n), exited = exist & ~s.live;
  auto hex = [](uint64_t lanes) { return fmt("%#llx", (unsigned long long)lanes); };
  if (!first.need) {
    if (present == exist || tls.g.cuda) return;  // CUDA's __activemask asks for nobody
    std::string rest;
    if (exited) rest += ", returned: " + hex(exited);
    if (s.bar) rest += ", at a barrier: " + hex(s.bar);
    if (s.coll & ~present) rest += ", at another operation: " + hex(s.coll & ~present);
    report("divergent-simd-op",
           fmt("only lanes %s of %u take part%s", hex(present).c_str(), s.n, rest.c_str()), place);
    return;
  }
  if (uint64_t absent = first.need & exist & ~present)
    report("mask-mismatch", fmt("lanes %s of mask %s are not at this operation (returned: %s)",
                                hex(absent).c_str(), hex(first.need).c_str(), hex(exited).c_str()),
           place);
  if (uint64_t extra = present & ~first.need)
    report("mask-mismatch",
           fmt("lanes %s are here but not in mask %s", hex(extra).c_str(), hex(first.need).c_str()),
           place);
}

// Every lane of the simdgroup waits: lanes at the same operation do it together.
void resolve(Worker& w, Simd& s) {
  for (uint64_t todo = s.coll; todo;) {
    Lane& first = w.lanes[s.base + __builtin_ctzll(todo)];
    Lane *present[64], *by_lane[64] = {};
    int n = 0;
    uint64_t mask = 0;
    for (uint64_t rest = todo; rest; rest &= rest - 1) {
      int i = __builtin_ctzll(rest);
      Lane& lane = w.lanes[s.base + i];
      if (!same_operation(lane, first)) continue;
      present[n++] = by_lane[i] = &lane;
      mask |= 1ull << i;
    }
    todo &= ~mask;
    tls.cur = &first;  // findings name it
    uint8_t flags = first.flags;
    first.flags |= UNCHECKED;  // it touches the operands of all
    check_lanes(s, first, mask);
    first.rf(present, n, by_lane, (int)w.d->width);
    first.flags = flags;
    tls.cur = nullptr;
    w.n_coll++;
    for (int i = 0; i < n; i++) present[i]->st = READY;
    s.ready |= mask;
  }
  s.coll = 0;
}

void resolve_simd_barrier(Lane** lanes, int, Lane**, int) {
  Simd& s = worker->simds[lanes[0]->simd];
  if (lanes[0]->arg & MEM_TG) s.tg_epoch++;
  if (lanes[0]->arg & MEM_DEVICE) s.dev_epoch++;
}

void describe_group(Worker& w, U3 gid) {
  const LaunchDesc& d = *w.d;
  GroupInfo& g = tls.g;
  g = {};
  g.gid = gid, g.gsize_nominal = g.gsize = d.tg;
  g.width = d.width, g.cuda = d.cuda, g.order = (uint8_t)d.order;
  auto edge = [](uint32_t grid, uint32_t i, uint32_t size) { return std::min(size, grid - i * size); };
  if (d.by_groups) {
    g.ngroups = d.groups;
    g.grid = {d.groups.x * d.tg.x, d.groups.y * d.tg.y, d.groups.z * d.tg.z};
  } else {
    g.grid = d.grid_threads;
    g.ngroups = {(g.grid.x + d.tg.x - 1) / d.tg.x, (g.grid.y + d.tg.y - 1) / d.tg.y,
                 (g.grid.z + d.tg.z - 1) / d.tg.z};
    g.gsize = {edge(g.grid.x, gid.x, d.tg.x), edge(g.grid.y, gid.y, d.tg.y),
               edge(g.grid.z, gid.z, d.tg.z)};
  }
  g.group_lin = gid.x + g.ngroups.x * (gid.y + g.ngroups.y * gid.z);
  g.nthreads = g.gsize.x * g.gsize.y * g.gsize.z;
  g.nsimd = (g.nthreads + d.width - 1) / d.width;
}

// Stacks and threadgroup memory of an OS thread, kept from launch to launch.
struct Memory {
  char *stacks = nullptr, *arena = nullptr;
  size_t nstacks = 0;

  static char* map(size_t size) {
    void* p = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) abort();
    return (char*)p;
  }
  void grow(uint32_t threads) {
    if (!arena) {
      // Not across a multiple of 4 GiB: CUDA code cuts shared addresses to 32 bits.
      arena = map(2 * ARENA);
      bool across = (uintptr_t)arena >> 32 != (uintptr_t)(arena + ARENA - 1) >> 32;
      munmap(across ? arena : arena + ARENA, ARENA);
      arena += across ? ARENA : 0;
    }
    if (nstacks >= threads) return;
    if (stacks) munmap(stacks, nstacks * STACK);
    stacks = map(threads * STACK);
    nstacks = threads;
  }
  ~Memory() {
    if (stacks) munmap(stacks, nstacks * STACK);
    if (arena) munmap(arena, ARENA);
  }
};
thread_local Memory memory;

void prepare_memory(Worker& w, uint32_t threads) {
  memory.grow(threads);
  w.stacks = memory.stacks, w.nstacks = memory.nstacks, w.arena = memory.arena;
  if (checking) prepare_arena(w);
  w.arena_used = 64, w.shared_bytes = 0;
  w.variables.clear(), w.variable_names.clear(), w.variable_starts.clear();
}

void make_lanes(Worker& w) {
  const GroupInfo& g = tls.g;
  uint32_t width = g.width;
  w.lanes.assign(g.nthreads, Lane{});
  w.simds.resize(g.nsimd);
  for (uint32_t s = 0; s < g.nsimd; s++) {
    uint32_t n = std::min(width, g.nthreads - s * width);
    w.simds[s] = {lane_bits(n), 0, 0, lane_bits(n), 1, 1, s * width, n};
  }
  for (uint32_t i = 0; i < g.nthreads; i++) {
    Lane& l = w.lanes[i];
    l.lin = i, l.simd = i / width, l.lane = (uint16_t)(i % width), l.file = "";
    l.tid = {i % g.gsize.x, i / g.gsize.x % g.gsize.y, i / g.gsize.x / g.gsize.y};
    // Tops at different offsets, or all stacks would share the same lines of the cache.
    l.sp = make_stack(w.stacks + (i + 1) * STACK - 64 - (i * 192) % 4096, fiber_main);
  }
  w.slots.clear(), w.visits.clear(), w.seen_lines.clear();
  if (w.d->transactions) w.visits.resize(g.nthreads);
}

// Runs every lane until it waits at a threadgroup barrier or is done.
void run_simds(Worker& w) {
  uint32_t n = (uint32_t)w.simds.size();
  uint32_t first = w.d->sched == RANDOM ? (uint32_t)(next_random(w) % n) : 0;
  for (uint32_t k = 0; k < n; k++) {
    Simd& s = w.simds[w.d->sched == DESCENDING ? n - 1 - k : (k + first) % n];
    while (s.ready || s.coll) {
      if (s.ready) {
        tls.cur = pick(w, s);
        simt_switch(&w.main_sp, tls.cur->sp);
        tls.cur = nullptr;
      } else {
        resolve(w, s);
      }
    }
  }
}

// Lets the lanes at a barrier pass; false when every lane is done.
bool pass_barrier(Worker& w) {
  uint32_t live = 0;
  const Lane *first = nullptr, *other = nullptr;
  for (const Simd& s : w.simds) live += (uint32_t)__builtin_popcountll(s.live);
  if (!live) return false;
  for (const Lane& l : w.lanes) {
    if (l.st != AT_BAR) continue;
    if (!first) first = &l;
    else if (!other && !same_place(l, *first)) other = &l;
  }
  Place place = {first->file, first->line, 0};
  uint32_t n = (uint32_t)w.lanes.size();
  if (live != n && !w.d->cuda)
    report("divergent-barrier",
           fmt("%u of %u threads returned before this threadgroup barrier", n - live, n), place);
  if (other)
    report("divergent-barrier",
           fmt("thread %u waits here, thread %u at line %u", first->lin, other->lin, other->line),
           place);
  if (first->flags & MEM_TG) w.tg_epoch++;
  if (first->flags & MEM_DEVICE) w.dev_epoch++;
  w.n_bar++;
  for (Simd& s : w.simds) {
    for (uint64_t rest = s.bar; rest; rest &= rest - 1)
      w.lanes[s.base + __builtin_ctzll(rest)].st = READY;
    s.ready = s.bar, s.bar = 0;
  }
  return true;
}
}  // namespace

void run_group(Worker& w, U3 gid) {
  describe_group(w, gid);
  prepare_memory(w, tls.g.nthreads);
  make_lanes(w);
  w.tg_epoch = w.dev_epoch = 1;
  do run_simds(w);
  while (pass_barrier(w));
}

// ---- what kernels call

extern "C" void simt_exit_thread() {
  block(DONE);
  abort();
}
extern "C" void simt_block_coll(void* val, uint64_t arg, uint64_t need, ResolveFn rf,
                                const char* file, uint32_t line) {
  Lane* me = tls.cur;
  me->val = val, me->arg = arg, me->need = need, me->rf = rf, me->file = file, me->line = line;
  block(AT_COLL);
}
extern "C" void simt_simd_barrier(uint32_t flags, uint64_t need, const char* file, uint32_t line) {
  simt_block_coll(nullptr, flags, need, resolve_simd_barrier, file, line);
}
extern "C" void simt_barrier(uint32_t flags, const char* file, uint32_t line) {
  Lane* me = tls.cur;
  me->flags = (uint8_t)(flags | (me->flags & UNCHECKED)), me->file = file, me->line = line;
  block(AT_BAR);
}

extern "C" void* simt_shared(const void* key, size_t size, size_t align, const char* name) {
  Worker& w = *worker;
  bool zero = align >> 32;
  align &= 0xffffffff;
  auto known = w.variables.find(key);
  if (known != w.variables.end()) return w.arena + known->second;
  size_t offset = (w.arena_used + align - 1) / align * align;
  w.shared_bytes = (w.shared_bytes + align - 1) / align * align + size;
  bool fits = offset + size + RED_ZONE <= ARENA;
  if (w.shared_bytes > w.d->shared_limit || !fits)
    report("threadgroup-memory-limit",
           fmt("'%s' brings threadgroup memory to %zu bytes, the limit is %llu", name,
               w.shared_bytes, (unsigned long long)w.d->shared_limit),
           {"", 0, (uint64_t)__builtin_return_address(0)}, name);
  if (!fits) {
    give_up();
    abort();
  }
  w.variables[key] = offset, w.arena_used = offset + size + RED_ZONE;
  w.variable_names.push_back(name), w.variable_starts.push_back(offset);
  memset(w.arena + offset, zero ? 0 : 0xFF, size);
  if (checking) note_variable(w, offset, size, zero);
  return w.arena + offset;
}
extern "C" void* simt_dyn_shared(uint32_t index) {
  static const char keys[8] = {};
  uint64_t size = worker->d->dyn_bytes[index];
  return simt_shared(&keys[index], size ? size : 1, 128, "dynamic");
}

// Bytes that stay with the running lane (registers of another machine's fragments).
static void* lane_slot(size_t kind, size_t bytes) {
  Worker& w = *worker;
  if (w.slots.empty()) w.slots.resize(2 * w.lanes.size());
  std::vector<char>& slot = w.slots[2 * tls.cur->lin + kind];
  if (slot.empty()) slot.assign(bytes, 0);
  return slot.data();
}
API void* simt_lane_slot(size_t bytes) { return lane_slot(0, bytes); }
API void* simt_warpgroup_slot(size_t bytes) { return lane_slot(1, bytes); }
API char* simt_arena_base() { return worker->arena; }
API uint64_t simt_cur() { return (uint64_t)tls.cur; }
API uint64_t simt_group() { return (uint64_t)&tls.g; }
}  // namespace simt
