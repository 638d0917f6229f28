// y = x W^T + bias on a CPU, with W in the packed 2:4 format (formats/two_four.py), which is read once.
//
// Of every group of four inputs of a row, two are multiplied: the activations are selected by the positions in the
// meta nibbles, and the weight is never expanded. Sums are float32. One binary holds every instruction set and picks
// at run time, so that a cache folder may be shared by different machines. No header of torch or Python is needed.

#include "avx2.h"
#include "avx512.h"
#include "expand.h"
#include "portable.h"
#include "scalars.h"

#define EXPORT __attribute__((visibility("default")))

namespace {

// Some rows of the weight, from one on and before another, by 1 to 4 rows of activations from one on.
using Block = void (*)(const Call&, int64_t, int64_t, int64_t);

template <Kind K> const Block* blocks_of(Level level) {
  static const Block portable[4] = {
      block_portable<K, 1>, block_portable<K, 2>, block_portable<K, 3>, block_portable<K, 4>};
#if HAS_X86
  static const Block avx2[4] = {block256<K, 2, 1>, block256<K, 2, 2>, block256<K, 2, 3>, block256<K, 2, 4>};
  static const Block avx512[4] = {block512<K, 4, 1>, block512<K, 4, 2>, block512<K, 4, 3>, block512<K, 4, 4>};
  if (level >= AVX512) return avx512;
  if (level == AVX2) return avx2;
#endif
  return portable;
}

const Block* blocks_of(Level level, Kind kind, bool bf16) {
#if HAS_X86
  static const Block products[4] = {block_bf16<4, 1>, block_bf16<4, 2>, block_bf16<4, 3>, block_bf16<4, 4>};
  if (bf16) return products;
#endif
  switch (kind) {
    case F32: return blocks_of<F32>(level);
    case F16: return blocks_of<F16>(level);
    case BF16: return blocks_of<BF16>(level);
    case I8: return blocks_of<I8>(level);
    default: return blocks_of<I4>(level);
  }
}

Level best_level() {
#if HAS_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512) return __builtin_cpu_supports("avx512bf16") ? AVX512_BF16 : AVX512;
  if (avx2) return AVX2;
#endif
  return PORTABLE;
}

struct Work {
  const Call* call;
  const Block* blocks;  // for 1 to 4 rows of activations
  int64_t outputs;      // of a block
};

void run(int64_t begin, int64_t end, void* context) {
  const Work& work = *static_cast<const Work*>(context);
  const Call& c = *work.call;
  const int64_t last = end * work.outputs < c.out ? end * work.outputs : c.out;
  // The rows of a block come from the cache after the first time; the weight is read from memory once.
  for (int64_t o = begin * work.outputs; o < last; o += work.outputs)
    for (int64_t row = 0; row < c.rows; row += 4) {
      const int64_t left = c.rows - row;
      work.blocks[left < 4 ? left - 1 : 3](c, o, last, row);
    }
}

}  // namespace

extern "C" {

// weight [rows, 8 octets] of values [rows, 4 octets] of 2 or 4 bytes and meta [rows, octets].
EXPORT int hf_adaptive_sparse_expand(
    ParallelFor parallel_for, const void* values, const uint8_t* meta, void* weight, int64_t rows, int64_t octets,
    int item, int level) {
  Expansion e{static_cast<const uint8_t*>(values), meta, static_cast<uint8_t*>(weight), octets, item, Level(level)};
  const int64_t grain = octets * 8 >= GRAIN ? 1 : GRAIN / (octets ? octets * 8 : 1);
  return parallel_for(0, rows, grain, expand_rows, &e);
}

EXPORT int hf_adaptive_sparse_level() { return best_level(); }

// y [rows, out] of x [rows, in]. Returns 0, or 1 if there is no memory for a copy of the activations.
EXPORT int hf_adaptive_sparse_linear(
    ParallelFor parallel_for, const void* x, const void* values, const uint8_t* meta, const void* scale,
    const void* bias, void* y, int64_t rows, int64_t out, int64_t in, int64_t scale_groups, int kind, int scale_kind,
    int bias_kind, int io_kind, int code_dtype, int level) {
  static const int64_t BITS[5] = {32, 16, 16, 8, 4};
  Call c{};
  c.values = static_cast<const uint8_t*>(values);
  c.meta = meta, c.scale = scale, c.bias = bias, c.y = y, c.rows = rows, c.out = out, c.in = in;
  c.padded = (in + PAD - 1) / PAD * PAD;
  c.row_bytes = in * BITS[kind] / 16;
  c.scale_groups = scale_groups;
  c.scale_step = scale_groups == 1 ? (int64_t(1) << 62) : in / (scale_groups ? scale_groups : 1);
  c.kind = Kind(kind), c.scale_kind = Kind(scale_kind), c.bias_kind = Kind(bias_kind), c.io_kind = Kind(io_kind);
  c.code_dtype = Kind(code_dtype);
  const bool bf16 = level == AVX512_BF16 && kind == BF16 && io_kind == BF16;
  const size_t item = bf16 ? 2 : 4;
  void* copy = std::aligned_alloc(64, size_t(rows * c.padded) * item);
  if (!copy) return 1;
  for (int64_t r = 0; r < rows; ++r) {
    char* to = static_cast<char*>(copy) + size_t(r * c.padded) * item;
    const char* from = static_cast<const char*>(x) + r * in * (io_kind == F32 ? 4 : 2);
    if (bf16 || io_kind == F32) std::memcpy(to, from, size_t(in) * item);
    else for (int64_t k = 0; k < in; ++k) reinterpret_cast<float*>(to)[k] = load_scalar(from, k, c.io_kind);
    std::memset(to + size_t(in) * item, 0, size_t(c.padded - in) * item);
  }
  c.x = static_cast<const float*>(copy), c.x16 = static_cast<const uint16_t*>(copy);
  const int64_t outputs = level >= AVX512 ? 4 : level == AVX2 ? 2 : 1;
  const Work work{&c, blocks_of(Level(level), c.kind, bf16), outputs};
  const int64_t blocks = (out + outputs - 1) / outputs;
  const int64_t products = outputs * rows * (in ? in : 1) / 2;
  const int64_t grain = products >= GRAIN ? 1 : GRAIN / products;
  const int failed = parallel_for(0, blocks, grain, run, const_cast<Work*>(&work));
  std::free(copy);
  return failed;
}

}  // extern "C"
