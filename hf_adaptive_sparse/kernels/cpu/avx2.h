// AVX2: 16 inputs a step.
#pragma once

#include "scalars.h"

#if HAS_X86
namespace {

template <Kind K> T256 inline __m256 values256(const uint8_t* p, float scale, Kind dtype) {
  if constexpr (K == F32) return _mm256_loadu_ps((const float*)p);
  if constexpr (K == F16) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  if constexpr (K == BF16) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  __m256i codes;
  if constexpr (K == I8) codes = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
  else {
    int four;
    std::memcpy(&four, p, 4);
    __m256i bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
    bytes = _mm256_or_si256(bytes, _mm256_slli_epi64(bytes, 28));
    codes = _mm256_srai_epi32(_mm256_slli_epi32(bytes, 28), 28);
  }
  __m256 v = _mm256_mul_ps(_mm256_cvtepi32_ps(codes), _mm256_set1_ps(scale));
  if (dtype == F16) return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  if (dtype == BF16) {
    __m256i bits = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    return _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(int(0xffff0000))));
  }
  return v;
}

T256 inline float sum256(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

template <Kind K, int O, int R> T256 inline void step256(
    const Call& c, __m256 (&sums)[O][R], const uint8_t* const (&values)[O], const uint32_t (&meta)[O],
    const float (&scale)[O], const float* x) {
  // Groups 0, 2 | 1, 3: a lane of 128 bits selects from itself only, and a step has two vectors of activations.
  const __m256i shifts = _mm256_set_epi32(14, 12, 6, 4, 10, 8, 2, 0);
  __m256 value[O];
  __m256i place[O];
  for (int i = 0; i < O; ++i) {
    __m256d pairs = _mm256_castps_pd(values256<K>(values[i], scale[i], c.code_dtype));
    value[i] = _mm256_castpd_ps(_mm256_permute4x64_pd(pairs, 0xd8));
    place[i] = _mm256_srlv_epi32(_mm256_set1_epi32(int(meta[i])), shifts);
  }
  for (int r = 0; r < R; ++r) {
    __m256 low = _mm256_loadu_ps(x + r * c.padded), high = _mm256_loadu_ps(x + r * c.padded + 8);
    for (int i = 0; i < O; ++i) {
      __m256 a = _mm256_permutevar_ps(low, place[i]), b = _mm256_permutevar_ps(high, place[i]);
      sums[i][r] = _mm256_fmadd_ps(value[i], _mm256_blend_ps(a, b, 0xcc), sums[i][r]);
    }
  }
}

template <Kind K, int O, int R> T256 void block256(const Call& c, int64_t first, int64_t last, int64_t row) {
  constexpr int64_t BYTES = K == F32 ? 32 : K == I8 ? 8 : K == I4 ? 4 : 16;  // of the 8 values of a step
  const uint8_t *values[O], *meta[O];
  int64_t o[O];
  __m256 sums[O][R];
  for (int i = 0; i < O; ++i) {
    o[i] = first + i < last ? first + i : last - 1;
    values[i] = c.values + o[i] * c.row_bytes;
    meta[i] = c.meta + o[i] * (c.in / 8);
    for (int r = 0; r < R; ++r) sums[i][r] = _mm256_setzero_ps();
  }
  const float* x = c.x + row * c.padded;
  float scale[O] = {};
  uint32_t two[O];
  int64_t k = 0, next_scale = 0;
  for (; k + 16 <= c.in; k += 16) {
    if (K >= I8 && k == next_scale) {
      for (int i = 0; i < O; ++i) scale[i] = scale_of(c, o[i], k);
      next_scale += c.scale_step;
    }
    for (int i = 0; i < O; ++i) {
      two[i] = meta[i][k / 8] | uint32_t(meta[i][k / 8 + 1]) << 8;
      _mm_prefetch((const char*)values[i] + 1024, _MM_HINT_T0);
    }
    step256<K, O, R>(c, sums, values, two, scale, x + k);
    for (int i = 0; i < O; ++i) values[i] += BYTES;
  }
  if (k < c.in) {  // 8 inputs are left
    alignas(32) uint8_t ends[O][32] = {};
    const uint8_t* padded[O];
    for (int i = 0; i < O; ++i) {
      if (K >= I8 && k == next_scale) scale[i] = scale_of(c, o[i], k);
      std::memcpy(ends[i], values[i], size_t(BYTES / 2));
      two[i] = meta[i][k / 8];
      padded[i] = ends[i];
    }
    step256<K, O, R>(c, sums, padded, two, scale, x + k);
  }
  for (int i = 0; i < O && first + i < last; ++i)
    for (int r = 0; r < R; ++r) finish(c, row + r, o[i], sum256(sums[i][r]));
}

}  // namespace
#endif
