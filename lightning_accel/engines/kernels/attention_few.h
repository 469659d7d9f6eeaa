// Attention of few rows that share keys (decoding): scores of all keys, softmax, product with the values. Keys and values are
// read once, as they lie.

#pragma once

#include "attention.h"

namespace {

constexpr int64_t kFew = 16;  // rows up to which packing the keys does not pay

#ifdef VNNI

template <int R>  // scores of 16 / R keys from j on, of R rows
inline void score_few(const View& k, const float* base, int64_t j, int64_t last, const float* q, int64_t D, float* s,
                      int64_t stride) {
  constexpr int N = 16 / R;
  const int64_t padded = wide(D);
  const float* rows[N];
  for (int n = 0; n < N; n++) rows[n] = base + std::min(j + n, last) * k.row;
  __m512 acc[16];
  for (int n = 0; n < 16; n++) acc[n] = _mm512_setzero_ps();
  for (int64_t d = 0; d < D; d += kWide) {
    const __mmask16 in = first(D - d);
    __m512 queries[R];
    for (int r = 0; r < R; r++) queries[r] = _mm512_load_ps(q + r * padded + d);
    for (int n = 0; n < N; n++) {
      const __m512 key = _mm512_maskz_loadu_ps(in, rows[n] + d);
      _mm_prefetch(reinterpret_cast<const char*>(rows[n] + 16 * k.row + d), _MM_HINT_T0);
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

template <int R, int N>  // o[R, 16 N] = p[R, keys] @ v[keys, 16 N]
inline void weigh_few(const float* v, int64_t step, __mmask16 last, const float* p, int64_t stride, int64_t keys,
                      float* o, int64_t width) {
  constexpr int U = std::max(1, 8 / (R * N));  // keys at a time, for enough sums that do not wait for each other
  __m512 acc[U][R][N];
  for (int u = 0; u < U; u++)
    for (int r = 0; r < R; r++)
      for (int n = 0; n < N; n++) acc[u][r][n] = _mm512_setzero_ps();
  const auto add = [&](int64_t j, int u) __attribute__((always_inline)) {
    for (int n = 0; n < N; n++) {
      const float* from = v + j * step + n * kWide;
      const __m512 values = _mm512_maskz_loadu_ps(n + 1 < N ? 0xffff : last, from);
      _mm_prefetch(reinterpret_cast<const char*>(from + 16 * step), _MM_HINT_T0);
      for (int r = 0; r < R; r++) acc[u][r][n] = _mm512_fmadd_ps(_mm512_set1_ps(p[r * stride + j]), values, acc[u][r][n]);
    }
  };
  int64_t j = 0;
  for (; j + U <= keys; j += U)
    for (int u = 0; u < U; u++) add(j + u, u);
  for (; j < keys; j++) add(j, 0);
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) {
      for (int u = 1; u < U; u++) acc[0][r][n] = _mm512_add_ps(acc[0][r][n], acc[u][r][n]);
      _mm512_store_ps(o + r * width + n * kWide, acc[0][r][n]);
    }
}

template <int R>
void weigh_few(const View& v, const float* base, int64_t Dv, const float* p, int64_t stride, int64_t keys, float* o) {
  const int64_t width = wide(Dv);
  for (int64_t d = 0; d < Dv; d += 64) {
    const __mmask16 last = first(Dv % kWide && d + 64 >= Dv ? Dv % kWide : 16);
    switch (std::min<int64_t>(4, (width - d) / kWide)) {
      case 4: weigh_few<R, 4>(base + d, v.row, last, p, stride, keys, o + d, width); break;
      case 3: weigh_few<R, 3>(base + d, v.row, last, p, stride, keys, o + d, width); break;
      case 2: weigh_few<R, 2>(base + d, v.row, last, p, stride, keys, o + d, width); break;
      default: weigh_few<R, 1>(base + d, v.row, last, p, stride, keys, o + d, width);
    }
  }
}

void attend_few(const Problem& p, int64_t b, int64_t group) {
  const int64_t R = p.rows(), Dp = wide(p.D), Vp = wide(p.Dv), stride = wide(p.keys) + kWide;
  float* q = scratch().take(R * (Dp + Vp + stride));
  float *o = q + R * Dp, *s = o + R * Vp;
  int64_t keys = 0;
  for (int64_t r = 0; r < R; r++) {
    copy(p.query(b, group, r), p.q.column, p.D, Dp, p.scale, q + r * Dp);
    keys = std::max(keys, p.limit(r));
  }
  const float *k = p.k.at<float>(b, group, 0), *v = p.v.at<float>(b, group, 0);
  for (int64_t j = 0; j < keys; j += kWide) {
    int64_t r = 0;
    for (; r + 4 <= R; r += 4)
      for (int64_t n = 0; n < kWide; n += 4)
        score_few<4>(p.k, k, j + n, p.keys - 1, q + r * Dp, p.D, s + r * stride, stride);
    for (; r + 2 <= R; r += 2)
      for (int64_t n = 0; n < kWide; n += 8)
        score_few<2>(p.k, k, j + n, p.keys - 1, q + r * Dp, p.D, s + r * stride, stride);
    if (r < R) score_few<1>(p.k, k, j, p.keys - 1, q + r * Dp, p.D, s + r * stride, stride);
  }
  float total[kFew];
  for (int64_t r = 0; r < R; r++) {
    __m512 top = _mm512_set1_ps(kNone);
    float* row = s + r * stride;
    const Row seen{p.seen(b, group, r), p.limit(r)};
    for (int64_t j = 0; j < keys; j += kWide) {
      const __m512 scores = masked(p, seen, j, _mm512_load_ps(row + j));
      top = _mm512_max_ps(top, scores);
      _mm512_store_ps(row + j, scores);
    }
    total[r] = exponentials(row, keys, _mm512_reduce_max_ps(top));
  }
  int64_t r = 0;
  for (; r + 4 <= R; r += 4) weigh_few<4>(p.v, v, p.Dv, s + r * stride, stride, keys, o + r * Vp);
  for (; r + 2 <= R; r += 2) weigh_few<2>(p.v, v, p.Dv, s + r * stride, stride, keys, o + r * Vp);
  if (r < R) weigh_few<1>(p.v, v, p.Dv, s + r * stride, stride, keys, o + r * Vp);
  for (r = 0; r < R; r++) put(o + r * Vp, total[r], p.Dv, p.output(b, group, r));
}

#endif

}  // namespace
