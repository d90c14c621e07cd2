// Calling a kernel with a packed array of pointers to its arguments.
#pragma once
#include <tuple>
#include <utility>

namespace emulator {
template <typename... A, size_t... I> void unpack(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel((*static_cast<std::remove_cv_t<A>*>(arguments[I]))...);
}
template <typename... A> void call(void (*kernel)(A...), void** arguments) {
  unpack(kernel, arguments, std::index_sequence_for<A...>{});
}
}  // namespace emulator
