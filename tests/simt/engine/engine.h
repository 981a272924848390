// The engine's own types. One OS thread (Worker) runs one threadgroup at a time, one fiber per GPU
// thread; fibers switch only at simdgroup operations and barriers.
#pragma once
#include <atomic>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "../include/simt/abi.h"

#define API extern "C" __attribute__((visibility("default")))

namespace simt {

constexpr size_t STACK = 192 * 1024;  // of a fiber; only touched pages exist
constexpr size_t ARENA = 1 << 20;     // threadgroup memory, far more than the limit that is reported
constexpr size_t RED_ZONE = 128;      // between threadgroup variables
constexpr size_t LINE = 128;          // bytes of a memory transaction

// ---- reports (reports.cpp)

std::string fmt(const char* format, ...) __attribute__((format(printf, 1, 2)));

// What went wrong, and where: a source line, or the address of an instruction.
struct Place {
  const char* file;
  uint32_t line;
  uint64_t pc;
};
// Kept once per kind and place; the running thread is noted.
void report(const char* kind, const std::string& message, Place place, const char* buffer = "",
            int64_t offset = -1);
void clear_reports();

// ---- memory the checker knows (checker.cpp)

// Who touched a granule last. A thread is (group + 1) * 1024 + index; an epoch counts barriers.
struct Touch {
  uint32_t thread, epoch;
  uint16_t simd_epoch;
  bool atomic;
};
struct Cell {
  Touch writer, reader, other_reader;
};
enum Valid : uint8_t { NO_OBJECT = 0, ALLOCATED = 1, WRITTEN = 2 };

struct Region {
  const char *lo, *hi;
  std::string name;
  bool readonly, is_threadgroup;
  uint32_t granule;  // bytes per cell; becomes smaller when the kernel accesses less
  std::vector<Cell> cells;
  std::vector<uint8_t> valid;
  uint64_t bytes[2];                    // read, written
  uint64_t lines[2];                    // transactions
  std::vector<uint64_t> touched[2];     // a bit per byte
};
extern std::vector<Region*> regions;
extern bool checking;
void prepare_arena(struct Worker& w);
void note_variable(struct Worker& w, size_t offset, size_t size, bool written);
void access(const char* p, size_t n, bool write, bool atomic, uint64_t pc);
const Region* region_near(const char* p);

// ---- a worker and its group (group.cpp)

struct Simd {
  uint64_t ready, coll, bar, live;  // lanes as bits
  uint32_t tg_epoch, dev_epoch;
  uint32_t base, n;
};

struct Worker {
  const LaunchDesc* d = nullptr;
  void (*body)(void*) = nullptr;
  void* ctx = nullptr;
  void* main_sp = nullptr;
  std::vector<Lane> lanes;
  std::vector<Simd> simds;
  char* stacks = nullptr;  // of all fibers, STACK bytes each
  size_t nstacks = 0;
  char* arena = nullptr;  // threadgroup memory
  size_t arena_used = 0, shared_bytes = 0;
  std::unordered_map<const void*, size_t> variables;  // key -> offset in the arena
  uint32_t tg_epoch = 1, dev_epoch = 1;
  uint64_t rng = 1;
  uint64_t n_switch = 0, n_coll = 0, n_bar = 0;
  Region threadgroup{};
  Region* last_region = nullptr;
  uint64_t last_pc = 0;  // of the last load or store (checker only)
  std::vector<std::string> variable_names;
  std::vector<size_t> variable_starts;   // of the same variables, in the arena
  std::vector<std::vector<char>> slots;  // of simt_lane_slot
  std::vector<std::unordered_map<uint64_t, uint32_t>> visits;  // per lane: instruction -> times
  std::unordered_set<uint64_t> seen_lines;
};
extern thread_local Worker* worker;

void run_group(Worker& w, U3 gid);
inline uint64_t lane_bits(uint32_t n) { return n == 64 ? ~0ull : (1ull << n) - 1; }

// ---- context switch (switch.cpp)

extern "C" void simt_switch(void** save, void* load);
void* make_stack(char* top, void (*entry)());

// Leaves the kernel after a fault; returns where none can be caught (launch.cpp).
void give_up();
}  // namespace simt
