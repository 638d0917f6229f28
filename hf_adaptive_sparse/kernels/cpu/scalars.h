// What a call asks for, and single numbers of every dtype.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#define HAS_X86 1
#define T256 __attribute__((target("avx2,fma,f16c")))
#define T512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")))
#define T512BF __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c")))
#else
#define HAS_X86 0
#endif

namespace {

enum Kind { F32 = 0, F16 = 1, BF16 = 2, I8 = 3, I4 = 4 };  // as in compiled.py
enum Level { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AVX512_BF16 = 3 };

// torch's own: torch_parallel_for of its stable interface.
using ParallelBody = void (*)(int64_t, int64_t, void*);
using ParallelFor = int32_t (*)(int64_t, int64_t, int64_t, ParallelBody, void*);

constexpr int64_t PAD = 64;      // inputs; the longest step of a kernel
constexpr int64_t GRAIN = 1 << 15;  // products that are worth a thread

struct Call {
  const uint8_t* values;
  const uint8_t* meta;
  const void* scale;  // of codes
  const void* bias;   // may be null
  void* y;            // [rows, out], of io_kind
  const float* x;     // [rows, padded]
  const uint16_t* x16;  // the same as bfloat16, for AVX512_BF16
  int64_t rows, out, in, padded, row_bytes;
  int64_t scale_groups, scale_step;  // scale_step: inputs of one scale, in or a multiple of 32
  Kind kind, scale_kind, bias_kind, io_kind, code_dtype;
};

inline float from_bits(uint32_t bits) { float f; std::memcpy(&f, &bits, 4); return f; }
inline uint32_t to_bits(float f) { uint32_t bits; std::memcpy(&bits, &f, 4); return bits; }

inline float bf16_to_float(uint16_t h) { return from_bits(uint32_t(h) << 16); }

inline uint16_t float_to_bf16(float f) {
  uint32_t bits = to_bits(f);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float f16_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest >= 0x400) return from_bits(sign | ((rest << 13) + (112u << 23)));
  float magnitude = float(rest) * 5.9604644775390625e-8f;  // 2^-24: subnormal
  return from_bits(sign | to_bits(magnitude));
}

inline uint16_t float_to_f16(float f) {
  uint32_t bits = to_bits(f), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and above
  if (rest < 0x38800000) {  // subnormal: adding 0.5 lines the last bit up with that of the result
    return uint16_t(sign | (to_bits(from_bits(rest) + 0.5f) - to_bits(0.5f)));
  }
  return uint16_t(sign | ((rest + 0xfff + (rest >> 13 & 1)) - (112u << 23)) >> 13);
}

inline float load_scalar(const void* data, int64_t i, Kind kind) {
  if (kind == F32) return static_cast<const float*>(data)[i];
  uint16_t h = static_cast<const uint16_t*>(data)[i];
  return kind == BF16 ? bf16_to_float(h) : f16_to_float(h);
}

inline void store_scalar(void* data, int64_t i, Kind kind, float value) {
  if (kind == F32) static_cast<float*>(data)[i] = value;
  else static_cast<uint16_t*>(data)[i] = kind == BF16 ? float_to_bf16(value) : float_to_f16(value);
}

inline float round_code(float value, Kind dtype) {
  if (dtype == BF16) return bf16_to_float(float_to_bf16(value));
  if (dtype == F16) return f16_to_float(float_to_f16(value));
  return value;
}

inline void finish(const Call& c, int64_t row, int64_t o, float sum) {
  if (c.bias) sum += load_scalar(c.bias, o, c.bias_kind);
  store_scalar(c.y, row * c.out + o, c.io_kind, sum);
}

inline float scale_of(const Call& c, int64_t o, int64_t input) {
  return load_scalar(c.scale, o * c.scale_groups + input / c.scale_step, c.scale_kind);
}

}  // namespace
