// AVX-512: 32 inputs a step, and 64 where the machine multiplies bfloat16.
#pragma once

#include "scalars.h"

#if HAS_X86
namespace {

template <Kind K> T512 inline __m512 values512(const uint8_t* p, float scale, Kind dtype) {
  if constexpr (K == F32) return _mm512_loadu_ps(p);
  if constexpr (K == F16) return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
  if constexpr (K == BF16) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  __m512i codes;
  if constexpr (K == I8) codes = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
  else {  // a byte in every 64 bits; its nibbles to the ends of the two halves, and back with their signs
    __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)p));
    bytes = _mm512_or_si512(bytes, _mm512_slli_epi64(bytes, 28));
    codes = _mm512_srai_epi32(_mm512_slli_epi32(bytes, 28), 28);
  }
  __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(codes), _mm512_set1_ps(scale));
  if (dtype == F16) return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  if (dtype == BF16) {
    __m512i bits = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(int(0xffff0000))));
  }
  return v;
}

template <Kind K, int O, int R> T512 inline void step512(
    const Call& c, __m512 (&sums)[O][R], const uint8_t* const (&values)[O], const uint32_t (&meta)[O],
    const float (&scale)[O], const float* x) {
  const __m512i shifts = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i groups = _mm512_set_epi32(28, 28, 24, 24, 20, 20, 16, 16, 12, 12, 8, 8, 4, 4, 0, 0);
  __m512 value[O];
  __m512i place[O];
  for (int i = 0; i < O; ++i) {
    value[i] = values512<K>(values[i], scale[i], c.code_dtype);
    __m512i two_bits = _mm512_srlv_epi32(_mm512_set1_epi32(int(meta[i])), shifts);
    place[i] = _mm512_ternarylogic_epi32(two_bits, _mm512_set1_epi32(3), groups, 0xea);  // (a & b) | c
  }
  for (int r = 0; r < R; ++r) {
    __m512 low = _mm512_loadu_ps(x + r * c.padded), high = _mm512_loadu_ps(x + r * c.padded + 16);
    for (int i = 0; i < O; ++i)
      sums[i][r] = _mm512_fmadd_ps(value[i], _mm512_permutex2var_ps(low, place[i], high), sums[i][r]);
  }
}

// O rows of the weight by R rows of activations. Rows past the end repeat the last one and are not stored.
template <Kind K, int O, int R> T512 void block512(const Call& c, int64_t first, int64_t last, int64_t row) {
  constexpr int64_t BYTES = K == F32 ? 64 : K == I8 ? 16 : K == I4 ? 8 : 32;  // of the 16 values of a step
  const uint8_t *values[O], *meta[O];
  int64_t o[O];
  __m512 sums[O][R];
  for (int i = 0; i < O; ++i) {
    o[i] = first + i < last ? first + i : last - 1;
    values[i] = c.values + o[i] * c.row_bytes;
    meta[i] = c.meta + o[i] * (c.in / 8);
    for (int r = 0; r < R; ++r) sums[i][r] = _mm512_setzero_ps();
  }
  const float* x = c.x + row * c.padded;
  float scale[O] = {};
  uint32_t four[O];
  int64_t k = 0, next_scale = 0;
  for (; k + 32 <= c.in; k += 32) {
    if (K >= I8 && k == next_scale) {
      for (int i = 0; i < O; ++i) scale[i] = scale_of(c, o[i], k);
      next_scale += c.scale_step;
    }
    for (int i = 0; i < O; ++i) {
      std::memcpy(&four[i], meta[i] + k / 8, 4);
      _mm_prefetch((const char*)values[i] + 16 * BYTES, _MM_HINT_T0);
    }
    step512<K, O, R>(c, sums, values, four, scale, x + k);
    for (int i = 0; i < O; ++i) values[i] += BYTES;
  }
  if (k < c.in) {  // 8, 16 or 24 inputs are left
    alignas(64) uint8_t ends[O][64] = {};
    const uint8_t* padded[O];
    for (int i = 0; i < O; ++i) {
      if (K >= I8 && k == next_scale) scale[i] = scale_of(c, o[i], k);
      std::memcpy(ends[i], values[i], size_t(BYTES * (c.in - k) / 32));
      four[i] = 0;
      std::memcpy(&four[i], meta[i] + k / 8, size_t((c.in - k) / 8));
      padded[i] = ends[i];
    }
    step512<K, O, R>(c, sums, padded, four, scale, x + k);
  }
  for (int i = 0; i < O && first + i < last; ++i)
    for (int r = 0; r < R; ++r) finish(c, row + r, o[i], _mm512_reduce_add_ps(sums[i][r]));
}

template <int O, int R> T512BF inline void step_bf16(
    const Call& c, __m512 (&sums)[O][R], const uint8_t* const (&values)[O], const uint64_t (&meta)[O],
    const uint16_t* x) {
  const __m512i words = _mm512_set_epi64(
      0x0706070607060706, 0x0706070607060706, 0x0504050405040504, 0x0504050405040504,
      0x0302030203020302, 0x0302030203020302, 0x0100010001000100, 0x0100010001000100);
  const __m512i shifts = _mm512_broadcast_i32x4(_mm_set_epi16(14, 12, 10, 8, 6, 4, 2, 0));
  const __m512i groups = _mm512_set_epi16(
      60, 60, 56, 56, 52, 52, 48, 48, 44, 44, 40, 40, 36, 36, 32, 32, 28, 28, 24, 24, 20, 20, 16, 16, 12, 12, 8, 8,
      4, 4, 0, 0);
  __m512i value[O], place[O];
  for (int i = 0; i < O; ++i) {
    value[i] = _mm512_loadu_si512(values[i]);
    __m512i word = _mm512_shuffle_epi8(_mm512_set1_epi64((long long)meta[i]), words);
    place[i] = _mm512_ternarylogic_epi32(
        _mm512_srlv_epi16(word, shifts), _mm512_set1_epi16(3), groups, 0xea);
  }
  for (int r = 0; r < R; ++r) {
    __m512i low = _mm512_loadu_si512(x + r * c.padded), high = _mm512_loadu_si512(x + r * c.padded + 32);
    for (int i = 0; i < O; ++i)
      sums[i][r] = _mm512_dpbf16_ps(
          sums[i][r], (__m512bh)value[i], (__m512bh)_mm512_permutex2var_epi16(low, place[i], high));
  }
}

template <int O, int R> T512BF void block_bf16(const Call& c, int64_t first, int64_t last, int64_t row) {
  const uint8_t *values[O], *meta[O];
  int64_t o[O];
  __m512 sums[O][R];
  for (int i = 0; i < O; ++i) {
    o[i] = first + i < last ? first + i : last - 1;
    values[i] = c.values + o[i] * c.row_bytes;
    meta[i] = c.meta + o[i] * (c.in / 8);
    for (int r = 0; r < R; ++r) sums[i][r] = _mm512_setzero_ps();
  }
  const uint16_t* x = c.x16 + row * c.padded;
  uint64_t eight[O];
  int64_t k = 0;
  for (; k + 64 <= c.in; k += 64) {
    for (int i = 0; i < O; ++i) {
      std::memcpy(&eight[i], meta[i] + k / 8, 8);
      _mm_prefetch((const char*)values[i] + 1024, _MM_HINT_T0);
    }
    step_bf16<O, R>(c, sums, values, eight, x + k);
    for (int i = 0; i < O; ++i) values[i] += 64;
  }
  if (k < c.in) {
    alignas(64) uint8_t ends[O][64] = {};
    const uint8_t* padded[O];
    for (int i = 0; i < O; ++i) {
      std::memcpy(ends[i], values[i], size_t(c.in - k));
      eight[i] = 0;
      std::memcpy(&eight[i], meta[i] + k / 8, size_t((c.in - k) / 8));
      padded[i] = ends[i];
    }
    step_bf16<O, R>(c, sums, padded, eight, x + k);
  }
  for (int i = 0; i < O && first + i < last; ++i)
    for (int r = 0; r < R; ++r) finish(c, row + r, o[i], _mm512_reduce_add_ps(sums[i][r]));
}

}  // namespace
#endif
