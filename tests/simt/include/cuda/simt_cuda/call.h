// Kernels called as cuLaunchKernel calls them: with an array of the addresses of their arguments.
#pragma once
#include "types.h"

namespace simt_cuda {
// What Python has to know of a parameter: p pointer, c pointer to const, f float, i integer,
// o anything else; and its size.
struct Parameter {
  char kind;
  uint32_t size;
};
template <class T> constexpr Parameter described() {
  if (std::is_pointer<T>::value)
    return {std::is_const<std::remove_pointer_t<T>>::value ? 'c' : 'p', sizeof(T)};
  if (std::is_floating_point<T>::value) return {'f', sizeof(T)};
  return {std::is_integral<T>::value ? 'i' : 'o', sizeof(T)};
}
// Writes at most `room` parameters; how many there are.
template <class... P> int describe(void (*)(P...), Parameter* out, int room) {
  const Parameter all[] = {described<P>()..., {}};
  for (int i = 0; i < int(sizeof...(P)) && i < room; i++) out[i] = all[i];
  return sizeof...(P);
}
template <class... P, size_t... I>
void call(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_cv_t<P>*>(arguments[I])...);
}
template <class... P> void call(void (*kernel)(P...), void** arguments) {
  call(kernel, arguments, std::index_sequence_for<P...>());
}
}  // namespace simt_cuda
