#include "amx.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace hm {
namespace {

// AMX-TILE and AMX-INT8, state that the system saves, and tiles of the shape the kernel configures.
bool processor_has_tiles() {
  unsigned a, b, c, d;
  if (__get_cpuid_max(0, nullptr) < 0x1d) return false;
  __cpuid(1, a, b, c, d);
  if (!(c >> 27 & 1)) return false;  // xgetbv
  __cpuid_count(7, 0, a, b, c, d);
  if (!(d >> 24 & 1) || !(d >> 25 & 1)) return false;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return false;
  __cpuid_count(0x1d, 0, a, b, c, d);
  if (a < 1) return false;
  __cpuid_count(0x1d, 1, a, b, c, d);  // palette 1: bytes of a row, tiles, rows
  return (b & 0xffff) == 64 && b >> 16 == 8 && (c & 0xffff) == 16;
}

// Linux gives tile state to processes that ask; all threads, running or to come, then have it.
bool system_allows_tiles() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

}  // namespace

bool amx_usable() { return processor_has_tiles() && system_allows_tiles(); }

}  // namespace hm
#else
namespace hm {
bool amx_usable() { return false; }
}  // namespace hm
#endif
