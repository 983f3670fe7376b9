// What C++ kernels, CUDA kernels and the CUDA kernels compiled by g++ share: number types, their conversions
// to float, and exp.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SRFT_HD __host__ __device__ __forceinline__
#else
#define SRFT_HD inline __attribute__((always_inline))
#endif

// A CPU kernel compiled for several vector lengths, chosen when the library is loaded. Goes on plain
// functions (not templates) of C++ files; what they call must be inlined into them (SRFT_HD) to be compiled
// for that length too.
#if defined(__x86_64__) && defined(__gnu_linux__) && __GNUC__ >= 12 && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)  // which is not ready when the choice is made
#define SRFT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SRFT_CLONES
#endif

namespace srft {

enum class ElementType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// Numbers, or vectors of them, as what has the same bits.
template <typename From, typename To>
SRFT_HD void copy_bits(const From& from, To& to) {
  static_assert(sizeof to == sizeof from);
  std::memcpy(&to, &from, sizeof to);
}

SRFT_HD float float_of_bits(uint32_t bits) {
  float value;
  copy_bits(bits, value);
  return value;
}

// 16-bit numbers, in the low half of Bits, to floats and back by integer operations, rounding to nearest
// even. Without branches, so that they vectorise: Bits is uint32_t and Number float, or vectors of them.

template <typename Number, typename Bits>
SRFT_HD void widen(BFloat16, const Bits& narrow, Number& wide) {
  const Bits bits = narrow << 16;
  copy_bits(bits, wide);
}

template <typename Number, typename Bits>
SRFT_HD void narrow(BFloat16, const Number& wide, Bits& result) {
  Bits bits;
  copy_bits(wide, bits);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  result = wide == wide ? rounded : (bits >> 16) | 0x40u;  // NaN must not round to infinity
}

template <typename Number, typename Bits>
SRFT_HD void widen(Float16, const Bits& narrow, Number& wide) {
  // Exponent and mantissa in float's place, then the difference of the exponents' biases (127 - 15) by a
  // product, which is right for subnormal numbers too. Half's largest exponent stands for inf and NaN, as
  // float's does.
  const Bits magnitude = (narrow & 0x7fffu) << 13;
  copy_bits(magnitude, wide);
  wide = wide * 0x1p112f;
  Bits bits;
  copy_bits(wide, bits);
  bits = (wide < 65536.0f ? bits : bits | 0x7f800000u) | ((narrow & 0x8000u) << 16);
  copy_bits(bits, wide);
}

template <typename Number, typename Bits>
SRFT_HD void narrow(Float16, const Number& wide, Bits& result) {
  Bits bits;
  copy_bits(wide, bits);
  const Bits sign = (bits >> 16) & 0x8000u;
  bits = bits & 0x7fffffffu;
  Number magnitude;
  copy_bits(bits, magnitude);
  const Number shifted =
      magnitude + 0.5f;  // 0.5's last bit is worth half's smallest number: this rounds to those
  Bits subnormal;
  copy_bits(shifted, subnormal);
  const Bits normal = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  result = magnitude < 0x1p-14f ? subnormal - 0x3f000000u : normal;
  result = magnitude < 65536.0f ? result : (bits & 0u) + 0x7c00u;  // 65520 to 65536 have been rounded to this
  result = (wide == wide ? result : (bits & 0u) + 0x7e00u) | sign;
}

SRFT_HD float to_float(float value) { return value; }

SRFT_HD float to_float(BFloat16 value) { return float_of_bits(static_cast<uint32_t>(value.bits) << 16); }

SRFT_HD float to_float(Float16 value) {
  float result;
#ifdef __CUDA_ARCH__
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
#else
  widen(value, static_cast<uint32_t>(value.bits), result);
#endif
  return result;
}

template <typename T>
SRFT_HD T from_float(float value);  // rounds to nearest even

template <>
SRFT_HD float from_float<float>(float value) {
  return value;
}

template <>
SRFT_HD BFloat16 from_float<BFloat16>(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  BFloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  uint32_t bits;
  narrow(BFloat16{}, value, bits);
  return {static_cast<uint16_t>(bits)};
#endif
}

template <>
SRFT_HD Float16 from_float<Float16>(float value) {
#ifdef __CUDA_ARCH__
  Float16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  uint32_t bits;
  narrow(Float16{}, value, bits);
  return {static_cast<uint16_t>(bits)};
#endif
}

// Where exponential_in_range takes its argument from; exp of the lower limit is 0, of the upper one inf.
constexpr float kExponentLow = -88.02f, kExponentHigh = 89.0f;

// exp(x) by a polynomial, without branches; Number is float or a vector of floats, Bits uint32_t or a vector
// of those. x = n ln 2 + r with |r| <= ln 2 / 2. Adding kShift leaves n + 127, the exponent's bits, as the
// last bits of the sum; moved into place they are 2^n, or 0 for n = -127 and inf for n = 128.
template <typename Bits, typename Number>
SRFT_HD void exponential_polynomial(const Number& x, Number& result) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  constexpr float kShift = 0x1.8p23f + 127.0f;
  const Number shifted = x * kLog2E + kShift;
  const Number n = shifted - kShift;
  const Number r = (x - n * kLn2High) - n * kLn2Low;
  Number p =
      0x1.10627ap-7f * r + 0x1.572a08p-5f;  // least largest error over the range, with 1 + r fixed: 1.05e-7
  p = p * r + 0x1.5557aep-3f;
  p = p * r + 0x1.fffdfcp-2f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  Bits power;
  copy_bits(shifted, power);
  power <<= 23;
  Number scale;
  copy_bits(power, scale);
  result = p * scale;
}

// exp(x) to 2e-7 relative for x within these limits; NaN for NaN. Results under float's normal numbers may be
// 0. On a GPU by its exp2 unit, where any x will do.
SRFT_HD float exponential_in_range(float x) {
  float result;
#ifdef __CUDA_ARCH__
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.44269504f));
#else
  exponential_polynomial<uint32_t>(x, result);
#endif
  return result;
}

// The same for any x: exactly 0 below -88.02, inf above 88.4.
SRFT_HD float exponential(float x) {
#ifndef __CUDA_ARCH__
  x = x < kExponentLow ? kExponentLow : x;  // written so that NaN passes
  x = x > kExponentHigh ? kExponentHigh : x;
#endif
  return exponential_in_range(x);
}

}  // namespace srft
