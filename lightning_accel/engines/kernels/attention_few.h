// Attention of few rows that share keys (decoding): scores of all keys, softmax, product with the values. It waits for memory:
// keys and values are read once, as they lie, and asked for ahead.

#pragma once

#include "attention.h"

namespace {

constexpr int64_t kFew = 16;    // rows up to which packing the keys does not pay
constexpr int64_t kAhead = 32;  // keys that are asked for before they are read
constexpr int64_t kSome = 32;   // keys whose values all heads meet before the next ones

#ifdef VNNI

struct Steps {  // from one to the next of the keys or the values of a head
  const float* data;
  int64_t step;

  const float* at(int64_t j) const { return data + j * step; }
};

template <int R>  // scores of 16 / R keys from j on, of R rows; past the last key they are those of the last
inline void score_few(const Steps& k, const Steps& v, int64_t j, int64_t keys, const float* q, int64_t D, float* s,
                      int64_t stride) {
  constexpr int N = 16 / R;
  const int64_t padded = wide(D), last = keys - 1;
  const float *rows[N], *next[N];
  for (int n = 0; n < N; n++) {
    const int64_t ahead = j + n + kAhead;  // behind the last key come the values
    rows[n] = k.at(std::min(j + n, last));
    next[n] = ahead <= last ? k.at(ahead) : v.at(std::min(ahead - keys, last));
  }
  __m512 acc[16];
  for (int n = 0; n < 16; n++) acc[n] = _mm512_setzero_ps();
  for (int64_t d = 0; d < D; d += kWide) {
    const __mmask16 in = first(D - d);
    __m512 queries[R];
    for (int r = 0; r < R; r++) queries[r] = _mm512_load_ps(q + r * padded + d);
    for (int n = 0; n < N; n++) {
      const __m512 key = _mm512_maskz_loadu_ps(in, rows[n] + d);
      expect(next[n] + d);
      for (int r = 0; r < R; r++) acc[r * N + n] = _mm512_fmadd_ps(key, queries[r], acc[r * N + n]);
    }
  }
  const __m512 all = reduce<Sum>(acc);
  if constexpr (R == 1) _mm512_store_ps(s + j, all);
  if constexpr (R == 2) {
    _mm256_store_ps(s + j, _mm512_castps512_ps256(all));
    _mm256_store_ps(s + stride + j, _mm512_extractf32x8_ps(all, 1));
  }
  if constexpr (R == 4) {
    _mm_store_ps(s + j, _mm512_castps512_ps128(all));
    _mm_store_ps(s + stride + j, _mm512_extractf32x4_ps(all, 1));
    _mm_store_ps(s + 2 * stride + j, _mm512_extractf32x4_ps(all, 2));
    _mm_store_ps(s + 3 * stride + j, _mm512_extractf32x4_ps(all, 3));
  }
}

template <int R, int N>  // o[R, 16 N] += p[R, kSome] @ v[kSome, 16 N], of the `keys` that are left
inline void weigh_few(const Steps& v, int64_t keys, __mmask16 last, const float* p, int64_t stride, float* o,
                      int64_t width) {
  constexpr int U = std::max(1, 8 / (R * N));  // keys at a time, for enough sums that do not wait for each other
  __m512 acc[U][R][N];
  for (int u = 0; u < U; u++)
    for (int r = 0; r < R; r++)
      for (int n = 0; n < N; n++)
        acc[u][r][n] = u ? _mm512_setzero_ps() : _mm512_load_ps(o + r * width + n * kWide);
  const auto add = [&](int64_t j, int u) __attribute__((always_inline)) {
    const float *row = v.at(j), *next = v.at(std::min(j + kAhead, keys - 1));
    for (int n = 0; n < N; n++) {
      const __m512 values = _mm512_maskz_loadu_ps(n + 1 < N ? 0xffff : last, row + n * kWide);
      expect(next + n * kWide);
      for (int r = 0; r < R; r++) acc[u][r][n] = _mm512_fmadd_ps(_mm512_set1_ps(p[r * stride + j]), values, acc[u][r][n]);
    }
  };
  const int64_t some = std::min(kSome, keys);
  int64_t j = 0;
  for (; j + U <= some; j += U)
    for (int u = 0; u < U; u++) add(j + u, u);
  for (; j < some; j++) add(j, 0);
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) {
      for (int u = 1; u < U; u++) acc[0][r][n] = _mm512_add_ps(acc[0][r][n], acc[u][r][n]);
      _mm512_store_ps(o + r * width + n * kWide, acc[0][r][n]);
    }
}

template <int R>
void weigh_few(const Steps& v, int64_t keys, int64_t Dv, const float* p, int64_t stride, float* o) {
  const int64_t width = wide(Dv);
  for (int64_t d = 0; d < Dv; d += 64) {
    const __mmask16 last = first(Dv % kWide && d + 64 >= Dv ? Dv % kWide : 16);
    const Steps part{v.data + d, v.step};
    switch (std::min<int64_t>(4, (width - d) / kWide)) {
      case 4: weigh_few<R, 4>(part, keys, last, p, stride, o + d, width); break;
      case 3: weigh_few<R, 3>(part, keys, last, p, stride, o + d, width); break;
      case 2: weigh_few<R, 2>(part, keys, last, p, stride, o + d, width); break;
      default: weigh_few<R, 1>(part, keys, last, p, stride, o + d, width);
    }
  }
}

// What heads of keys need: their rows' queries, outputs, scores and sums of exponentials.
struct Few {
  float *q, *o, *s, *total;
};

// All rows of the heads of keys from `from` to before `to`. The heads of a key mostly lie side by side: a key is read for all
// heads before the next one, so that memory is read from front to back.
void attend_few(const Problem& p, int64_t b, int64_t from, int64_t to) {
  const int64_t R = p.rows(), Dp = wide(p.D), Vp = wide(p.Dv), stride = wide(p.keys) + kWide;
  const int64_t each = R * (Dp + Vp + stride) + kWide;
  float* memory = scratch().take((to - from) * each);
  const auto of = [&](int64_t g) {
    float *total = memory + (g - from) * each, *q = total + kWide, *o = q + R * Dp;
    return Few{q, o, o + R * Vp, total};
  };
  int64_t keys = 0;
  for (int64_t r = 0; r < R; r++) keys = std::max(keys, p.limit(r));
  for (int64_t g = from; g < to; g++)
    for (int64_t r = 0; r < R; r++) copy(p.query(b, g, r), p.q.column, p.D, Dp, p.scale, of(g).q + r * Dp);
  for (int64_t j = 0; j < keys; j += kWide)
    for (int64_t g = from; g < to; g++) {
      const Few f = of(g);
      const Steps k{p.k.at<float>(b, g, 0), p.k.row}, v{p.v.at<float>(b, g, 0), p.v.row};
      int64_t r = 0;
      for (; r + 4 <= R; r += 4)
        for (int64_t n = 0; n < kWide; n += 4)
          score_few<4>(k, v, j + n, keys, f.q + r * Dp, p.D, f.s + r * stride, stride);
      for (; r + 2 <= R; r += 2)
        for (int64_t n = 0; n < kWide; n += 8)
          score_few<2>(k, v, j + n, keys, f.q + r * Dp, p.D, f.s + r * stride, stride);
      if (r < R) score_few<1>(k, v, j, keys, f.q + r * Dp, p.D, f.s + r * stride, stride);
    }
  for (int64_t g = from; g < to; g++) {
    const Few f = of(g);
    for (int64_t r = 0; r < R; r++) {
      __m512 top = _mm512_set1_ps(kNone);
      float* row = f.s + r * stride;
      const Row seen{p.seen(b, g, r), p.limit(r)};
      for (int64_t j = 0; j < keys; j += kWide) {
        const __m512 scores = masked(p, seen, j, _mm512_load_ps(row + j));
        top = _mm512_max_ps(top, scores);
        _mm512_store_ps(row + j, scores);
      }
      f.total[r] = exponentials(row, keys, _mm512_reduce_max_ps(top));
    }
    std::fill(f.o, f.o + R * Vp, 0.0f);
  }
  for (int64_t j = 0; j < keys; j += kSome)
    for (int64_t g = from; g < to; g++) {
      const Few f = of(g);
      const Steps v{p.v.at<float>(b, g, j), p.v.row};
      const float* s = f.s + j;
      int64_t r = 0;
      for (; r + 4 <= R; r += 4) weigh_few<4>(v, keys - j, p.Dv, s + r * stride, stride, f.o + r * Vp);
      for (; r + 2 <= R; r += 2) weigh_few<2>(v, keys - j, p.Dv, s + r * stride, stride, f.o + r * Vp);
      if (r < R) weigh_few<1>(v, keys - j, p.Dv, s + r * stride, stride, f.o + r * Vp);
    }
  for (int64_t g = from; g < to; g++)
    for (int64_t r = 0; r < R; r++) put(of(g).o + r * Vp, of(g).total[r], p.Dv, p.output(b, g, r));
}

#endif

}  // namespace
