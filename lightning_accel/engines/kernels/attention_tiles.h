// Attention of many rows with AMX, whose products of bf16 numbers (8 bits) are added up in float32. A float32 number is the
// sum of three such parts, a = a0 + a1 + a2 with |a1| < 2^-7 |a| and |a2| < 2^-15 |a|, and so
//     a b = a2 b0 + a1 b0 + a1 b1 + a0 b1 + a0 b2 + a0 b0
// but for a1 b2 + a2 b1 + a2 b2, which is at most a few times what rounding the product to float32 costs, and less in the mean.
// Six products in bf16 take half the time of one in float32. Parts below 2^-126 are taken for zero.
//
// Tiles of left factors are 16 rows by 16 pairs, of right factors 16 pairs by 16 columns. A pair is two inputs 16 apart in a
// group of 32: of the width for scores, of the keys for outputs.

#pragma once

#include "attention.h"

#if defined(AMX) && defined(__AMX_BF16__)
#define AMX_FLOAT 1
#endif

namespace {

#ifdef AMX_FLOAT

constexpr int64_t kTiled = 32;       // rows from which it pays
constexpr int64_t kTileBlock = 512;  // keys that are packed at a time
constexpr int64_t kStage = 1 << 14;  // scores that go through a step together: vector instructions are slow just after AMX
constexpr int64_t kPart = 256;       // 32-bit words of a tile; the three parts of a tile lie behind each other

inline int64_t pairs(int64_t n) { return (n + 31) / 32; }

// The parts of x[0][i] and x[1][i], of x[2][i] and x[3][i] .., as pairs in 32-bit words, pairs `next` apart. Rounded, what is
// left out has no bias; cut off, it takes less time.
template <bool kRounded, int N>
inline void split(__m512 (&x)[N], float* to, int64_t part, int64_t next = 0) {
  const __m512i top = _mm512_set1_epi32(0xffff0000), half = _mm512_set1_epi32(0x8000);
  for (int k = 0; k < 3; k++) {
    __m512i bits[N];
    for (int n = 0; n < N; n++) bits[n] = _mm512_castps_si512(x[n]);
    if (kRounded && k < 2)
      for (int n = 0; n < N; n++) bits[n] = _mm512_add_epi32(bits[n], half);
    for (int n = 0; n < N; n += 2) {
      const __m512i pair = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(bits[n], 16), bits[n + 1]);
      _mm512_store_ps(to + k * part + n / 2 * next, _mm512_castsi512_ps(pair));
    }
    for (int n = 0; n < N; n++) x[n] = _mm512_sub_ps(x[n], _mm512_castsi512_ps(_mm512_and_si512(bits[n], top)));
  }
}

struct Finite {  // are all numbers so, and far enough from the largest to be rounded?
  __m512i most = _mm512_setzero_si512();

  __m512 operator()(__m512 x) {
    most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)));
    return x;
  }
  bool all() const { return _mm512_reduce_max_epi32(most) < 0x7f7f0000; }
};

// Keys [count, D] as tiles [pairs(count) * 2][pairs(D)].
bool split_keys(const float* k, int64_t step, int64_t count, int64_t D, float* to) {
  Finite finite;
  for (int64_t j = 0; j < pairs(count) * 32; j += 16)
    for (int64_t d = 0; d < D; d += 32, to += 3 * kPart) {
      __m512 a[16], b[16];
      for (int n = 0; n < 16; n++) {
        const float* row = k + std::min(j + n, count - 1) * step + d;
        a[n] = finite(_mm512_maskz_loadu_ps(j + n < count ? first(D - d) : 0, row));
        b[n] = finite(_mm512_maskz_loadu_ps(j + n < count ? first(D - d - 16) : 0, row + 16));
      }
      transpose(a);
      transpose(b);
      for (int n = 0; n < 16; n += 2) {
        __m512 x[] = {a[n], b[n], a[n + 1], b[n + 1]};
        split<true>(x, to + n * 16, kPart, 16);
      }
    }
  return finite.all();
}

// Values [count, Dv] as tiles [pairs(count)][pairs(Dv) * 2].
bool split_values(const float* v, int64_t step, int64_t count, int64_t Dv, float* to) {
  Finite finite;
  for (int64_t j = 0; j < count; j += 32)
    for (int64_t d = 0; d < pairs(Dv) * 32; d += 16, to += 3 * kPart)
      for (int64_t n = 0; n < 16; n += 2) {
        const auto row = [&](int64_t i) {
          return finite(_mm512_maskz_loadu_ps(i < count ? first(Dv - d) : 0, v + std::min(i, count - 1) * step + d));
        };
        __m512 x[] = {row(j + n), row(j + n + 16), row(j + n + 1), row(j + n + 17)};
        split<true>(x, to + n * 16, kPart, 16);
      }
  return finite.all();
}

struct Tiled {  // what a task computes: rows begin .. begin + count of a group, and a block of keys
  const Problem& p;
  int64_t count;
  float *q, *k, *v, *s, *shares, *o, *top, *sum;  // q, k, v, shares: in tiles
  Row* rows;
  int64_t stride, width, from = 0, keys = 0;  // of s, of o; the block

  int64_t seen(int64_t m) const {  // keys of the block that rows m .. m + 32 see, as far as causality says
    if (!p.causal) return keys;
    int64_t most = 0;
    for (int64_t i = m; i < std::min(m + 32, count); i++) most = std::max(most, rows[i].limit);
    return std::min(keys, most - from);
  }
};

// Registers 0 .. 3 += tiles a (and 16 rows below, `two`) by tiles b (and 16 columns beside).
template <bool kTwo>
inline void multiply(const float* a, int64_t below, const float* b, int64_t beside) {
  const auto left = [&](int part) {
    _tile_loadd(4, a + part * kPart, 64);
    if (kTwo) _tile_loadd(5, a + below + part * kPart, 64);
  };
  const auto right = [&](int part) {
    _tile_loadd(6, b + part * kPart, 64);
    _tile_loadd(7, b + beside + part * kPart, 64);
  };
  const auto add = [] {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (kTwo) {
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  };
  left(2), right(0), add();
  left(1), add();
  right(1), add();
  left(0), add();
  right(2), add();
  right(0), add();
}

template <bool kTwo>
inline void load_tiles(const float* from, int64_t stride) {
  _tile_loadd(0, from, stride * 4);
  _tile_loadd(1, from + 16, stride * 4);
  if (kTwo) {
    _tile_loadd(2, from + 16 * stride, stride * 4);
    _tile_loadd(3, from + 16 * stride + 16, stride * 4);
  }
}

template <bool kTwo>
inline void store_tiles(float* to, int64_t stride) {
  _tile_stored(0, to, stride * 4);
  _tile_stored(1, to + 16, stride * 4);
  if (kTwo) {
    _tile_stored(2, to + 16 * stride, stride * 4);
    _tile_stored(3, to + 16 * stride + 16, stride * 4);
  }
}

inline void clear_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

template <bool kTwo>
void score_tiles(const Tiled& w, int64_t m0, int64_t m, int64_t keys) {
  const int64_t depth = pairs(w.p.D), below = depth * 3 * kPart;
  in_memory(w.q);
  for (int64_t j = 0; j < keys; j += 32) {
    clear_tiles();
    for (int64_t d = 0; d < depth; d++)
      multiply<kTwo>(w.q + (m / 16 * depth + d) * 3 * kPart, below, w.k + (j / 16 * depth + d) * 3 * kPart, below);
    store_tiles<kTwo>(w.s + (m - m0) * w.stride + j, w.stride);
  }
  in_memory(w.s);
}

template <bool kTwo>
void weigh_tiles(const Tiled& w, int64_t m0, int64_t m, int64_t keys) {
  const int64_t below = kTileBlock / 32 * 3 * kPart, across = pairs(w.p.Dv) * 2;
  in_memory(w.shares);
  for (int64_t d = 0; d < across; d += 2) {
    float* o = w.o + m * w.width + d * 16;
    w.from ? load_tiles<kTwo>(o, w.width) : clear_tiles();
    for (int64_t j = 0; j < pairs(keys); j++)
      multiply<kTwo>(w.shares + (m - m0) / 16 * below + j * 3 * kPart, below, w.v + (j * across + d) * 3 * kPart,
                     3 * kPart);
    store_tiles<kTwo>(o, w.width);
  }
  in_memory(w.o);
}

// Scores of up to 16 rows from m on become exp(score - top), in tiles; sums and outputs so far follow the new top.
void share(const Tiled& w, int64_t m0, int64_t m, int64_t keys) {
  const int64_t i = m - m0, count = std::min<int64_t>(16, w.count - m), padded = pairs(keys) * 32;
  const bool plain = !w.p.mask.data && !w.p.causal && keys == padded;
  const __m512 none = _mm512_set1_ps(kNone);
  __m512 lanes[16];
  for (int64_t n = 0; n < 16; n++) lanes[n] = none;
  for (int64_t n = 0; n < count; n++) {
    float* s = w.s + (i + n) * w.stride;
    __m512 a = none, b = none;
    for (int64_t j = 0; j < padded; j += 32) {
      __m512 x = _mm512_load_ps(s + j), y = _mm512_load_ps(s + j + 16);
      if (!plain) {
        x = masked(w.p, w.rows[m + n], w.from + j, x), y = masked(w.p, w.rows[m + n], w.from + j + 16, y);
        _mm512_store_ps(s + j, x), _mm512_store_ps(s + j + 16, y);
      }
      a = _mm512_max_ps(a, x), b = _mm512_max_ps(b, y);
    }
    lanes[n] = _mm512_max_ps(a, b);
  }
  const __m512 before = _mm512_load_ps(w.top + m), top = _mm512_max_ps(before, reduce<Most>(lanes));
  alignas(64) float base[16], factor[16];
  _mm512_store_ps(base, _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(top, none, _CMP_NEQ_UQ), top));
  _mm512_store_ps(w.top + m, top);
  for (int64_t n = 0; n < 16; n++) lanes[n] = _mm512_setzero_ps();
  for (int64_t n = 0; n < count; n++) {
    const float* s = w.s + (i + n) * w.stride;
    float* to = w.shares + i / 16 * (kTileBlock / 32) * 3 * kPart + n * 16;
    const __m512 zero = _mm512_set1_ps(base[n]);
    __m512 sum = _mm512_setzero_ps();
    const auto step = [&](auto& x, int64_t j) __attribute__((always_inline)) {
      constexpr int N = sizeof x / sizeof x[0];
      for (int k = 0; k < N; k++) x[k] = _mm512_sub_ps(_mm512_load_ps(s + j + k * 16), zero);
      exponential(x);
      for (int k = 0; k < N; k++) sum = _mm512_add_ps(sum, x[k]);
      split<false>(x, to + j / 32 * 3 * kPart, kPart, 3 * kPart);
    };
    int64_t j = 0;
    __m512 four[4], two[2];
    for (; j + 64 <= padded; j += 64) step(four, j);
    if (j < padded) step(two, j);
    lanes[n] = sum;
  }
  const __m512 sums = reduce<Sum>(lanes);
  const __mmask16 risen = _mm512_cmp_ps_mask(top, before, _CMP_NEQ_UQ) & _mm512_cmp_ps_mask(before, none, _CMP_NEQ_UQ);
  const __m512 factors = _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), risen, exponential(_mm512_sub_ps(before, top)));
  _mm512_store_ps(factor, factors);
  _mm512_store_ps(w.sum + m, _mm512_fmadd_ps(_mm512_load_ps(w.sum + m), factors, sums));
  for (int64_t n = 0; n < count && risen; n++)
    for (int64_t d = 0; d < w.width && risen >> n & 1; d += kWide) {
      float* o = w.o + (m + n) * w.width + d;
      _mm512_store_ps(o, _mm512_mul_ps(_mm512_load_ps(o), _mm512_set1_ps(factor[n])));
    }
}

// Returns false where a number is not finite, for the other form to compute: infinity is no sum of parts.
bool attend_tiles(const Problem& p, int64_t b, int64_t group, int64_t begin, int64_t count) {
  const int64_t whole = pairs(count) * 32, depth = pairs(p.D), width = pairs(p.Dv) * 32;
  const int64_t block = pairs(std::min(kTileBlock, p.keys)) * 32;
  const int64_t stage = std::min(whole, std::max<int64_t>(32, kStage / block / 32 * 32));
  Tiled w{p, count};
  w.stride = block + 16, w.width = width;
  const int64_t sizes[] = {whole * depth * 48, block * depth * 48, block * width * 3 / 2, stage * w.stride,
                           stage / 2 * kTileBlock * 3, whole * width, whole, whole};
  float** const parts[] = {&w.q, &w.k, &w.v, &w.s, &w.shares, &w.o, &w.top, &w.sum};
  int64_t all = 0;
  for (int64_t size : sizes) all += size;
  float* memory = scratch().take(all + whole * sizeof(Row) / sizeof(float));
  for (int n = 0; n < 8; memory += sizes[n++]) *parts[n] = memory;
  w.rows = reinterpret_cast<Row*>(memory);
  Finite finite;
  int64_t most = 0;
  const __m512 scale = _mm512_set1_ps(p.scale);
  for (int64_t i = 0; i < count; i++) {
    const float* q = p.query(b, group, begin + i);
    for (int64_t d = 0; d < depth; d++) {
      __m512 x[] = {_mm512_maskz_loadu_ps(first(p.D - d * 32), q + d * 32),
                    _mm512_maskz_loadu_ps(first(p.D - d * 32 - 16), q + d * 32 + 16)};
      for (__m512& y : x) y = finite(_mm512_mul_ps(y, scale));
      split<true>(x, w.q + (i / 16 * depth + d) * 3 * kPart + i % 16 * 16, kPart);
    }
    w.rows[i] = {p.seen(b, group, begin + i), p.limit(begin + i)};
    most = std::max(most, w.rows[i].limit);
  }
  if (!finite.all()) return false;
  std::fill(w.top, w.top + whole, kNone);
  std::fill(w.sum, w.sum + whole, 0.0f);
  const Tiles configured;
  for (w.from = 0; w.from < most; w.from += kTileBlock) {
    w.keys = std::min(kTileBlock, most - w.from);
    if (!split_keys(p.k.at<float>(b, group, w.from), p.k.row, w.keys, p.D, w.k) ||
        !split_values(p.v.at<float>(b, group, w.from), p.v.row, w.keys, p.Dv, w.v))
      return false;
    for (int64_t m0 = 0; m0 < count; m0 += stage) {
      const auto each = [&](const auto& step) {  // 32 rows, or the last 16, and what they see
        for (int64_t m = m0; m < std::min(count, m0 + stage); m += 32)
          if (const int64_t keys = w.seen(m); keys > 0)
            count - m > 16 ? step(std::true_type(), m, keys) : step(std::false_type(), m, keys);
      };
      each([&](auto two, int64_t m, int64_t keys) { score_tiles<two()>(w, m0, m, keys); });
      each([&](auto two, int64_t m, int64_t keys) {
        share(w, m0, m, keys);
        if (two) share(w, m0, m + 16, keys);
      });
      each([&](auto two, int64_t m, int64_t keys) { weigh_tiles<two()>(w, m0, m, keys); });
    }
  }
  for (int64_t i = 0; i < count; i++) put(w.o + i * width, w.sum[i], p.Dv, p.output(b, group, begin + i));
  return true;
}

#endif

}  // namespace
