// Findings: one per kind and place, with the first thread that caused it and a count.
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <map>
#include <mutex>
#include <tuple>

#include "engine.h"

namespace simt {
namespace {
constexpr size_t MOST = 200;

// core.py has the same struct.
struct Report {
  char kind[64], message[512], file[512], buffer[64];
  uint64_t pc, count;
  int64_t offset;
  U3 group, thread;
  uint32_t line, simdgroup, lane, in_kernel;
};
std::mutex mutex;
std::vector<Report> reports;
std::map<std::tuple<std::string, std::string, uint32_t, uint64_t>, size_t> known;
}  // namespace

std::string fmt(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return text;
}

void report(const char* kind, const std::string& message, Place place, const char* buffer,
            int64_t offset) {
  std::lock_guard<std::mutex> lock(mutex);
  std::string file = place.file ? place.file : "";
  auto key = std::make_tuple(std::string(kind), file, place.line, place.pc);
  auto found = known.find(key);
  if (found != known.end()) {
    reports[found->second].count++;
    return;
  }
  if (reports.size() >= MOST) return;
  known[key] = reports.size();
  Report r = {};
  snprintf(r.kind, sizeof r.kind, "%s", kind);
  snprintf(r.message, sizeof r.message, "%s", message.c_str());
  snprintf(r.file, sizeof r.file, "%s", file.c_str());
  snprintf(r.buffer, sizeof r.buffer, "%s", buffer);
  r.line = place.line, r.pc = place.pc, r.count = 1, r.offset = offset;
  if (const Lane* lane = tls.cur) {
    r.in_kernel = 1;
    r.group = tls.g.gid, r.thread = lane->tid;
    r.simdgroup = lane->simd, r.lane = lane->lane;
  } else if (worker) {
    r.group = tls.g.gid;
  }
  reports.push_back(r);
}

void clear_reports() {
  reports.clear();
  known.clear();
}

extern "C" void simt_fail(const char* kind, const char* msg, const char* file, uint32_t line) {
  report(kind, msg, {file, line, 0});
}
API int simt_n_reports() { return (int)reports.size(); }
API void simt_get_report(int i, Report* out) { *out = reports[i]; }
API void simt_clear_reports() { clear_reports(); }
}  // namespace simt
