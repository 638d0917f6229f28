// Any machine: 8 inputs a step, R rows of activations.
#pragma once

#include "scalars.h"

namespace {

template <Kind K> inline float value_of(const Call& c, const uint8_t* row, int64_t j, float scale) {
  if constexpr (K == F32) { float value; std::memcpy(&value, row + 4 * j, 4); return value; }
  if constexpr (K == F16 || K == BF16) {
    uint16_t half;
    std::memcpy(&half, row + 2 * j, 2);
    return K == BF16 ? bf16_to_float(half) : f16_to_float(half);
  }
  const int code = K == I8 ? int8_t(row[j]) : int8_t(row[j / 2] << (j % 2 ? 0 : 4)) >> 4;
  return round_code(float(code) * scale, c.code_dtype);
}

template <Kind K, int R> void block_portable(const Call& c, int64_t o, int64_t, int64_t row) {
  const uint8_t *values = c.values + o * c.row_bytes, *meta = c.meta + o * (c.in / 8);
  const float* x = c.x + row * c.padded;
  float sums[R][4] = {}, scale = 1;
  for (int64_t b = 0; b < c.in / 8; ++b) {
    if (K >= I8 && b % 4 == 0) scale = scale_of(c, o, 8 * b);
    for (int s = 0; s < 4; ++s) {
      const float value = value_of<K>(c, values, 4 * b + s, scale);
      const float* place = x + 8 * b + (s & 2) * 2 + (meta[b] >> 2 * s & 3);
      for (int r = 0; r < R; ++r) sums[r][s] += value * place[r * c.padded];
    }
  }
  for (int r = 0; r < R; ++r) finish(c, row + r, o, (sums[r][0] + sums[r][1]) + (sums[r][2] + sums[r][3]));
}

}  // namespace
