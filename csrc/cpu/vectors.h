// Vectors of floats by gcc's and clang's vector types, so that code is vectorised where the compiler would
// not do it by itself (sums, conversions). Where the processor's vectors are shorter the compiler takes
// several of them.
#pragma once

#include "core/portable.h"

// Vectors as arguments warn of an ABI that depends on the target; all of these functions are inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace srft::cpu {

constexpr int kLength = 8;

typedef float Floats __attribute__((vector_size(kLength * sizeof(float))));
typedef uint32_t Words __attribute__((vector_size(kLength * sizeof(uint32_t))));

SRFT_HD Floats all(float value) { return Floats{} + value; }

// The same without the compiler knowing the value: gcc makes one instruction of larger and smaller only then.
SRFT_HD Floats hidden(float value) {
  asm("" : "+m"(value));
  return all(value);
}

SRFT_HD Floats larger(const Floats& left, const Floats& right) {
  return right < left ? left : right;
}  // right, if one is NaN

SRFT_HD Floats smaller(const Floats& left, const Floats& right) {
  return left < right ? left : right;
}  // right, if one is NaN

// See exponential_in_range of portable.h.
SRFT_HD Floats exponential_in_range(const Floats& x) {
  Floats result;
  exponential_polynomial<Words>(x, result);
  return result;
}

SRFT_HD float total(const Floats& v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// Two vectors' worth of numbers: floats in their order; of 16-bit types those at even and those at odd
// places, which takes no shuffling as they are the low and high halves of words. store_pair of such a type
// puts them back in place.

constexpr int kPair = 2 * kLength;

SRFT_HD void load_pair(const float* from, Floats* pair) {
  for (int k = 0; k < 2; ++k) std::memcpy(&pair[k], from + k * kLength, sizeof(Floats));
}

template <typename T>
SRFT_HD void load_pair(const T* from, Floats* pair) {
  Words words;
  std::memcpy(&words, from, sizeof words);
  widen(T{}, words & 0xffffu, pair[0]);
  widen(T{}, words >> 16, pair[1]);
}

SRFT_HD void store_pair(float* to, const Floats* pair) {
  for (int k = 0; k < 2; ++k) std::memcpy(to + k * kLength, &pair[k], sizeof(Floats));
}

template <typename T>
SRFT_HD void store_pair(T* to, const Floats* pair) {
  Words low, high;
  narrow(T{}, pair[0], low);
  narrow(T{}, pair[1], high);
  low |= high << 16;
  std::memcpy(to, &low, sizeof low);
}

// Calls function on each element of `from`, as vectors, and writes what it returns to `to`, which may be the
// same memory if the types are the same.
template <typename From, typename To, typename Function>
SRFT_HD void transform_pair(const From* from, To* to, const Function& function) {
  Floats pair[2], result[2];
  load_pair(from, pair);
  for (int k = 0; k < 2; ++k) result[k] = function(pair[k]);
  if constexpr (sizeof(From) > sizeof(To)) {
    pair[0] = __builtin_shufflevector(result[0], result[1], 0, 2, 4, 6, 8, 10, 12, 14);
    pair[1] = __builtin_shufflevector(result[0], result[1], 1, 3, 5, 7, 9, 11, 13, 15);
    store_pair(to, pair);
  } else if constexpr (sizeof(From) < sizeof(To)) {
    pair[0] = __builtin_shufflevector(result[0], result[1], 0, 8, 1, 9, 2, 10, 3, 11);
    pair[1] = __builtin_shufflevector(result[0], result[1], 4, 12, 5, 13, 6, 14, 7, 15);
    store_pair(to, pair);
  } else {
    store_pair(to, result);
  }
}

template <typename From, typename To, typename Function>
SRFT_HD void transform(const From* from, To* to, int64_t count, const Function& function) {
  int64_t j = 0;
  for (; j + kPair <= count; j += kPair) transform_pair(from + j, to + j, function);
  if (j == count) return;
  From rest[kPair] = {};
  To results[kPair];
  std::memcpy(rest, from + j, (count - j) * sizeof(From));
  transform_pair(rest, results, function);
  std::memcpy(to + j, results, (count - j) * sizeof(To));
}

}  // namespace srft::cpu
