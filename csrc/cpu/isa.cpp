#include "isa.h"

#include <atomic>
#include <stdexcept>

#include "amx.h"
#include "kernels.h"

namespace hm {
namespace {

std::vector<const Kernels*> usable() {
  std::vector<const Kernels*> found{&kernels_generic};
#if defined(__x86_64__)
  __builtin_cpu_init();
  auto has = [](bool feature) { return feature; };
  bool avx2 = has(__builtin_cpu_supports("avx2")) && has(__builtin_cpu_supports("fma"));
  if (avx2) found.push_back(&kernels_avx2);
  // Ice Lake and Zen 4 on: byte permutes across the register and 8-bit dot products.
  if (avx2 && has(__builtin_cpu_supports("avx512f")) && has(__builtin_cpu_supports("avx512bw")) &&
      has(__builtin_cpu_supports("avx512vl")) && has(__builtin_cpu_supports("avx512dq")) &&
      has(__builtin_cpu_supports("avx512vbmi")) && has(__builtin_cpu_supports("avx512vnni"))) {
    found.push_back(&kernels_avx512);
    if (amx_usable()) found.push_back(&kernels_amx());
  }
#elif defined(__aarch64__)
  found.push_back(&kernels_neon);
#endif
  return found;
}

const std::vector<const Kernels*>& table() {
  static const std::vector<const Kernels*> found = usable();
  return found;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* k = chosen.load(std::memory_order_relaxed);
  return k ? *k : *table().back();
}

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const Kernels* k : table()) names.push_back(k->name);
  return names;
}

std::string isa_name() { return kernels().name; }

void set_isa(const std::string& name) {
  std::string usable_names;
  for (const Kernels* k : table()) {
    if (name == k->name) return chosen.store(k);
    usable_names += std::string(" ") + k->name;
  }
  throw std::invalid_argument("set_isa: name is " + name + ", needs one of" + usable_names);
}

}  // namespace hm
