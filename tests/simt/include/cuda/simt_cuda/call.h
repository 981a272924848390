// Kernels called as cuLaunchKernel calls them: with an array of the addresses of their arguments.
#pragma once
#include "types.h"

namespace simt_cuda {
// What Python has to know of a parameter: p pointer, c pointer to const, f float, i integer,
// o anything else; and its size. Of what a pointer points to: f, i, o or v for void; and its size.
struct Parameter {
  char kind;
  uint32_t size;
  char item;
  uint32_t item_size;
};
template <class T> constexpr char number_kind() {
  return std::is_floating_point<T>::value ? 'f' : std::is_integral<T>::value ? 'i' : 'o';
}
template <class T> constexpr Parameter described() {
  if constexpr (std::is_pointer<T>::value) {
    using Item = std::remove_pointer_t<T>;
    const char kind = std::is_const<Item>::value ? 'c' : 'p';
    if constexpr (std::is_void<Item>::value) return {kind, sizeof(T), 'v', 0};
    else return {kind, sizeof(T), number_kind<std::remove_cv_t<Item>>(), sizeof(Item)};
  } else {
    return {number_kind<T>(), sizeof(T), 'v', 0};
  }
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
