// Every load and store of a checked kernel comes here: bounds, alignment, initialisation, races.
#include <string.h>

#include <algorithm>

#include "engine.h"

namespace simt {
std::vector<Region*> regions;
bool checking = false;

namespace {
constexpr long NEAR = 4096;  // an access this close to a buffer is meant for it
constexpr uint32_t THREADS = 1024;

// One access as the rules below see it.
struct Access {
  Worker& w;
  Region& r;
  const Lane& lane;
  size_t offset, size;
  bool write, atomic;
  uint64_t pc;
  Touch self;

  const char* verb() const { return write ? "write" : "read"; }
  void fault(const char* kind, const std::string& message) const {
    std::string name = r.name;
    int64_t at = offset;
    if (r.is_threadgroup) {  // name the variable, not the arena
      for (size_t i = w.variable_starts.size(); i-- > 0;)
        if (w.variable_starts[i] <= offset) {
          name = w.variable_names[i], at = offset - w.variable_starts[i];
          break;
        }
    }
    report(kind, message, {nullptr, 0, pc}, name.c_str(), at);
  }
};

Region* find_region(Worker& w, const char* p) {
  Region* last = w.last_region;
  if (last && p >= last->lo && p < last->hi) return last;
  if (p >= w.threadgroup.lo && p < w.threadgroup.hi) return w.last_region = &w.threadgroup;
  for (Region* r : regions)
    if (p >= r->lo && p < r->hi) return w.last_region = r;
  return const_cast<Region*>(region_near(p));
}

// A kernel may use memory in smaller pieces than its elements: then a cell is a byte.
void refine(Region& r) {
  uint32_t factor = r.granule;
  std::vector<uint8_t> valid(r.valid.size() * factor);
  for (size_t i = 0; i < valid.size(); i++) valid[i] = r.valid[i / factor];
  std::vector<Cell> cells(r.cells.size() * factor);
  for (size_t i = 0; i < cells.size(); i++) cells[i] = r.cells[i / factor];
  r.valid.swap(valid), r.cells.swap(cells), r.granule = 1;
}

bool in_bounds(const Access& a) {
  const Region& r = a.r;
  size_t size = r.hi - r.lo;
  if (a.offset <= size && a.offset + a.size <= size) return true;
  const char* side = a.offset > size + NEAR ? "before its start" : "past its end";
  a.fault("out-of-bounds", fmt("%zu-byte %s %s (%zu bytes)", a.size, a.verb(), side, size));
  return false;
}

void check_alignment(const Access& a) {
  size_t align = std::min<size_t>(a.size, 16);
  size_t off = (uintptr_t)(a.r.lo + a.offset) % align;
  if (off && (a.size & (a.size - 1)) == 0)
    a.fault("misaligned", fmt("%zu-byte %s at an address that is %zu past a multiple of %zu", a.size,
                              a.verb(), off, align));
}

bool conflicts(const Access& a, const Touch& other) {
  const Touch& self = a.self;
  if (!other.thread || other.thread == self.thread) return false;
  if (a.atomic && other.atomic) return false;
  if (other.thread / THREADS != self.thread / THREADS) return true;  // groups are never ordered
  if (other.epoch != self.epoch) return false;                       // a threadgroup barrier
  bool same_simd = (other.thread % THREADS) / tls.g.width == a.lane.simd;
  return !same_simd || other.simd_epoch == self.simd_epoch;
}

std::string other_thread(const Touch& other) {
  uint32_t group = other.thread / THREADS - 1, index = other.thread % THREADS;
  if (group != tls.g.group_lin) return fmt("thread %u of threadgroup %u", index, group);
  return fmt("thread %u (simdgroup %u lane %u)", index, index / tls.g.width, index % tls.g.width);
}

const char* remedy(const Touch& self, const Touch& other) {
  return self.thread / THREADS != other.thread / THREADS ? "threadgroups run in any order"
                                                         : "no barrier in between";
}

void check_races(const Access& a, const Cell& cell) {
  if (conflicts(a, cell.writer))
    a.fault(a.write ? "race-write-write" : "race-read-write",
            fmt("%s what %s wrote, %s", a.write ? "overwrites" : "reads",
                other_thread(cell.writer).c_str(), remedy(a.self, cell.writer)));
  if (!a.write) return;
  for (const Touch* reader : {&cell.reader, &cell.other_reader})
    if (conflicts(a, *reader))
      a.fault("race-write-read", fmt("overwrites what %s read, %s", other_thread(*reader).c_str(),
                                     remedy(a.self, *reader)));
}

void remember(const Access& a, Cell& cell) {
  if (a.write) {
    cell.writer = a.self;
    cell.reader = cell.other_reader = {};
    return;
  }
  // Two readers are kept, of different simdgroups if there are such: a write by either is a race.
  Touch& last = cell.reader;
  if (last.thread && last.epoch != a.self.epoch) last = cell.other_reader = {};
  if (last.thread && last.thread != a.self.thread) {
    uint32_t other = cell.other_reader.thread % THREADS / tls.g.width;
    if (!cell.other_reader.thread || other == a.lane.simd) cell.other_reader = last;
  }
  last = a.self;
}

// Counts a transaction for each line that the lanes of a simdgroup touch with one instruction: the
// n-th time a lane comes to an instruction belongs to the n-th time of the other lanes.
void count_lines(const Access& a) {
  uint32_t visit = a.w.visits[a.lane.lin][a.pc]++;
  uint64_t address = (uint64_t)(a.r.lo + a.offset);
  for (uint64_t line = address / LINE; line <= (address + a.size - 1) / LINE; line++) {
    uint64_t key = line * 0x9E3779B97F4A7C15ull ^ a.pc * 0xC2B2AE3D27D4EB4Full;
    key ^= (key >> 31) + visit * 0xD6E8FEB86659FD93ull + ((uint64_t)a.lane.simd << 40);
    if (a.w.seen_lines.insert(key * 0xFF51AFD7ED558CCDull).second) a.r.lines[a.write]++;
  }
}

void mark(std::vector<uint64_t>& bits, size_t first, size_t n) {
  for (size_t end = first + n; first < end;) {
    size_t shift = first % 64, take = std::min(end - first, 64 - shift);
    bits[first / 64] |= lane_bits((uint32_t)take) << shift;
    first += take;
  }
}

void count(const Access& a) {
  a.r.bytes[a.write] += a.size;
  mark(a.r.touched[a.write], a.offset, a.size);
  if (a.w.d->transactions) count_lines(a);
}

void check_cells(const Access& a) {
  Region& r = a.r;
  if (r.readonly) return;
  if (a.size % r.granule || a.offset % r.granule) refine(r);
  for (size_t c = a.offset / r.granule; c * r.granule < a.offset + a.size; c++) {
    if (c >= r.valid.size() || r.valid[c] == NO_OBJECT) {
      a.fault("out-of-bounds",
              fmt("%zu-byte %s between threadgroup variables", a.size, a.verb()));
      return;
    }
    uint8_t& valid = r.valid[c];
    if (!a.write && valid == ALLOCATED)
      a.fault("uninitialised-read", fmt("%zu-byte read of memory nobody wrote", a.size));
    check_races(a, r.cells[c]);
    remember(a, r.cells[c]);
    if (a.write) valid = WRITTEN;
  }
}

// Outside every buffer: a private array, a constant table, or a wild pointer.
void no_region(Worker& w, const char* p, size_t n, bool write, uint64_t pc) {
  if (p >= w.stacks && p < w.stacks + w.nstacks * STACK)
    report("private-escape",
           fmt("touches the private memory of thread %zu", (size_t)(p - w.stacks) / STACK),
           {nullptr, 0, pc});
  else if (write)
    report("wild-write", fmt("%zu-byte write outside every buffer", n), {nullptr, 0, pc});
}
}  // namespace

const Region* region_near(const char* p) {
  for (const Region* r : regions)
    if (p >= r->lo - NEAR && p < r->hi + NEAR) return r;
  return nullptr;
}

void access(const char* p, size_t n, bool write, bool atomic, uint64_t pc) {
  const Lane* lane = tls.cur;
  if (!lane || !checking || (lane->flags & UNCHECKED) || !n) return;
  Worker& w = *worker;
  w.last_pc = pc;
  const char* own_stack = w.stacks + lane->lin * STACK;
  if (p >= own_stack && p < own_stack + STACK) return;
  Region* r = find_region(w, p);
  if (!r) return no_region(w, p, n, write, pc);
  const Simd& simd = w.simds[lane->simd];
  Touch self = {(tls.g.group_lin + 1) * THREADS + lane->lin,
                r->is_threadgroup ? w.tg_epoch : w.dev_epoch,
                (uint16_t)(r->is_threadgroup ? simd.tg_epoch : simd.dev_epoch), atomic};
  Access a = {w, *r, *lane, (size_t)(p - r->lo), n, write, atomic, pc, self};
  if (!in_bounds(a)) return;
  if (write && r->readonly) a.fault("write-to-const", "writes to a buffer the kernel declares const");
  check_alignment(a);
  if (!r->is_threadgroup) count(a);
  check_cells(a);
}

void prepare_arena(Worker& w) {
  Region& r = w.threadgroup;
  r.lo = w.arena, r.hi = w.arena + ARENA, r.name = "threadgroup", r.is_threadgroup = true;
  r.granule = 4;
  r.valid.clear(), r.cells.clear();
}

void note_variable(Worker& w, size_t offset, size_t size, bool written) {
  Region& r = w.threadgroup;
  if (size % r.granule) refine(r);
  size_t cells = (offset + size + RED_ZONE) / r.granule;
  r.valid.resize(cells, NO_OBJECT), r.cells.resize(cells);
  std::fill_n(r.valid.begin() + offset / r.granule, size / r.granule, written ? WRITTEN : ALLOCATED);
}

API void simt_check_begin(int on) {
  checking = on;
  for (Region* r : regions) delete r;
  regions.clear();
}

API void simt_check_region(const void* p, uint64_t n, const char* name, int readonly,
                           uint32_t granule, int written) {
  Region* r = new Region{};
  r->lo = (const char*)p, r->hi = r->lo + n, r->name = name;
  r->readonly = readonly, r->granule = granule ? granule : 1;
  if (checking) {
    size_t cells = n / r->granule + 1;
    r->valid.assign(cells, written ? WRITTEN : ALLOCATED);
    if (!readonly) r->cells.assign(cells, Cell{});
    for (auto& bits : r->touched) bits.assign(n / 64 + 1, 0);
  }
  regions.push_back(r);
}

// core.py has the same struct; [0] reads, [1] writes.
struct TrafficCounts {
  uint64_t bytes[2], unique[2], lines[2];
};
API void simt_region_traffic(int i, TrafficCounts* out) {
  const Region& r = *regions[i];
  for (int k = 0; k < 2; k++) {
    out->bytes[k] = r.bytes[k], out->lines[k] = r.lines[k], out->unique[k] = 0;
    for (uint64_t bits : r.touched[k]) out->unique[k] += __builtin_popcountll(bits);
  }
}
}  // namespace simt
