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
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
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

SRFT_HD float float_of_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

SRFT_HD uint32_t bits_of_float(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

SRFT_HD float to_float(float value) { return value; }

SRFT_HD float to_float(BFloat16 value) { return float_of_bits(static_cast<uint32_t>(value.bits) << 16); }

SRFT_HD float to_float(Float16 value) {
#ifdef __CUDA_ARCH__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  // Exponent and mantissa in float's place, then the difference of the exponents' biases (127 - 15) by a
  // product, which is right for subnormal numbers too; inf and NaN need float's largest exponent. No branch:
  // it vectorises.
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  const uint32_t finite = bits_of_float(float_of_bits(magnitude) * 0x1p112f);
  return float_of_bits(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite));
#endif
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
  const uint32_t bits = bits_of_float(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
#endif
}

template <>
SRFT_HD Float16 from_float<Float16>(float value) {
#ifdef __CUDA_ARCH__
  Float16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  const uint32_t bits = bits_of_float(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Adding 0.5, whose last bit is worth half's smallest subnormal number, lets the processor round those.
  const uint32_t subnormal = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t rounded = magnitude < 0x38800000u ? subnormal : normal;
  rounded = magnitude >= 0x47800000u ? 0x7c00u : rounded;  // 65520 and more, below this, round to it
  rounded = magnitude > 0x7f800000u ? 0x7e00u : rounded;
  return {static_cast<uint16_t>(((bits >> 16) & 0x8000u) | rounded)};
#endif
}

// exp(x) to 2e-7 relative; exactly 0 below -88 (results under float's normal numbers may be 0), inf above
// 88.3, NaN for NaN. On a CPU a polynomial without branches that the compiler vectorises; on a GPU its exp2
// unit.
SRFT_HD float exponential(float x) {
  constexpr float kLog2E = 1.44269504f;
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * kLog2E));
  return result;
#else
  // x = n ln 2 + r with |r| <= ln 2 / 2. Adding kShift leaves n + 127, the exponent's bits, as the last bits
  // of the sum; moved into place they are 2^n, or 0 for n = -127, where the lower limit takes all that is too
  // small.
  constexpr float kShift = 0x1.8p23f + 127.0f;
  constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  x = x < -88.02f ? -88.02f : x;  // in this order NaN passes
  x = x > 89.0f ? 89.0f : x;
  const float shifted = x * kLog2E + kShift;
  const float n = shifted - kShift;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  float p = 0x1.10627ap-7f;  // of least largest error over the range, with 1 + r fixed: 1.05e-7
  p = p * r + 0x1.572a08p-5f;
  p = p * r + 0x1.5557aep-3f;
  p = p * r + 0x1.fffdfcp-2f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * float_of_bits(bits_of_float(shifted) << 23);
#endif
}

}  // namespace srft
