// The dense weight, for a product with many rows of activations.
#pragma once

#include "scalars.h"

namespace {

struct Expansion {
  const uint8_t *values, *meta;
  uint8_t* weight;
  int64_t octets;  // of a row
  int item;        // bytes
  Level level;
};

// From byte `b` of meta to `end`; rows follow each other without a gap.
void expand_any(const Expansion& e, int64_t b, int64_t end) {
  const uint8_t* values = e.values + b * 4 * e.item;
  uint8_t* weight = e.weight + b * 8 * e.item;
  for (; b < end; ++b) {
    for (int half = 0; half < 2; ++half, values += 2 * e.item, weight += 4 * e.item) {
      const unsigned nibble = e.meta[b] >> 4 * half & 15, first = nibble & 3, second = nibble >> 2;
      if (e.item == 2) {  // the four of a group are one number of 64 bits
        uint32_t both;
        std::memcpy(&both, values, 4);
        const uint64_t four = uint64_t(both & 0xffff) << 16 * first | uint64_t(both >> 16) << 16 * second;
        std::memcpy(weight, &four, 8);
      } else {
        std::memset(weight, 0, 16);
        std::memcpy(weight + 4 * first, values, 4);
        std::memcpy(weight + 4 * second, values + 4, 4);
      }
    }
  }
}

#if HAS_X86
// Of 16-bit values, 8 groups a step: as above, with a group in every 64 bits.
T512 int64_t expand_16(const Expansion& e, int64_t b, int64_t end) {
  const __m512i shifts = _mm512_set_epi64(28, 24, 20, 16, 12, 8, 4, 0), low = _mm512_set1_epi64(0xffff);
  const __m512i three = _mm512_set1_epi64(48);
  for (; b + 4 <= end; b += 4) {
    uint32_t four;
    std::memcpy(&four, e.meta + b, 4);
    __m512i both = _mm512_cvtepu32_epi64(_mm256_loadu_si256((const __m256i*)(e.values + 8 * b)));
    __m512i nibble = _mm512_srlv_epi64(_mm512_set1_epi64(four), shifts);
    __m512i first = _mm512_and_si512(_mm512_slli_epi64(nibble, 4), three);  // 16 times a position
    __m512i second = _mm512_and_si512(_mm512_slli_epi64(nibble, 2), three);
    __m512i a = _mm512_sllv_epi64(_mm512_and_si512(both, low), first);
    __m512i c = _mm512_sllv_epi64(_mm512_srli_epi64(both, 16), second);
    _mm512_storeu_si512(e.weight + 16 * b, _mm512_or_si512(a, c));
  }
  return b;
}

T256 int64_t expand_16_avx2(const Expansion& e, int64_t b, int64_t end) {
  const __m256i shifts = _mm256_set_epi64x(12, 8, 4, 0), low = _mm256_set1_epi64x(0xffff);
  const __m256i three = _mm256_set1_epi64x(48);
  for (; b + 2 <= end; b += 2) {
    const int64_t two = e.meta[b] | int64_t(e.meta[b + 1]) << 8;
    __m256i both = _mm256_cvtepu32_epi64(_mm_loadu_si128((const __m128i*)(e.values + 8 * b)));
    __m256i nibble = _mm256_srlv_epi64(_mm256_set1_epi64x(two), shifts);
    __m256i first = _mm256_and_si256(_mm256_slli_epi64(nibble, 4), three);
    __m256i second = _mm256_and_si256(_mm256_slli_epi64(nibble, 2), three);
    __m256i a = _mm256_sllv_epi64(_mm256_and_si256(both, low), first);
    __m256i c = _mm256_sllv_epi64(_mm256_srli_epi64(both, 16), second);
    _mm256_storeu_si256((__m256i*)(e.weight + 16 * b), _mm256_or_si256(a, c));
  }
  return b;
}

// Of 32-bit values: a bit for every input that is kept, and the values go where the bits are.
T512 int64_t expand_32(const Expansion& e, int64_t b, int64_t end) {
  for (; b + 2 <= end; b += 2) {
    unsigned kept = 0;
    for (int g = 0; g < 4; ++g) {
      const unsigned nibble = e.meta[b + g / 2] >> 4 * (g & 1) & 15;
      kept |= (1u << (nibble & 3) | 1u << (nibble >> 2)) << 4 * g;
    }
    __m256i values = _mm256_loadu_si256((const __m256i*)(e.values + 16 * b));
    _mm512_storeu_si512(e.weight + 32 * b, _mm512_maskz_expand_epi32(__mmask16(kept), _mm512_castsi256_si512(values)));
  }
  return b;
}
#endif

void expand_rows(int64_t begin, int64_t end, void* context) {
  const Expansion& e = *static_cast<const Expansion*>(context);
  int64_t b = begin * e.octets;
#if HAS_X86
  if (e.level >= AVX512) b = e.item == 2 ? expand_16(e, b, end * e.octets) : expand_32(e, b, end * e.octets);
  else if (e.level == AVX2 && e.item == 2) b = expand_16_avx2(e, b, end * e.octets);
#endif
  expand_any(e, b, end * e.octets);
}

}  // namespace
