// Attention of many rows: blocks of keys, transposed to the registers' width, and a softmax that is corrected from block to
// block (Milakov and Gimelshein 2018, arXiv:1805.02867).

#pragma once

#include "attention.h"

namespace {

#ifdef VNNI

constexpr int64_t kBlock = 512;   // keys that are packed at a time
constexpr int64_t kQueries = 48;  // rows whose scores of a block are kept, a multiple of 6
constexpr int64_t kNear = 8192;   // floats of values that stay in the nearest cache

// Keys [count, D] as [ceil(count / 16), wide(D), 16], filled up with zeros.
void pack_keys(const float* k, const View& view, int64_t count, int64_t D, float* to) {
  for (int64_t j = 0; j < count; j += kWide)
    for (int64_t d = 0; d < D; d += kWide, to += 256) {
      __m512 a[16];
      if (view.column == 1) {
        for (int n = 0; n < 16; n++)
          a[n] = _mm512_maskz_loadu_ps(j + n < count ? first(D - d) : 0, k + std::min(j + n, count - 1) * view.row + d);
      } else {
        alignas(64) float row[16];
        for (int n = 0; n < 16; n++) {
          for (int m = 0; m < 16; m++)
            row[m] = j + n < count && d + m < D ? k[(j + n) * view.row + (d + m) * view.column] : 0.0f;
          a[n] = _mm512_load_ps(row);
        }
      }
      transpose(a);
      for (int n = 0; n < 16; n++) _mm512_store_ps(to + n * kWide, a[n]);
    }
}

struct Rows {  // what a task computes: rows begin .. begin + count of a group, and a block of keys
  const Problem& p;
  int64_t b, group, begin, count;
  float *q, *o, *top, *sum, *lanes, *s, *k, *v;  // lanes: the largest scores of a block, for each lane of a register
  Row* rows;
  int64_t stride;                                // of s
  int64_t from = 0, keys = 0;                    // the block

  // Keys of the block that the rows m .. m + M see, as far as causality says.
  int64_t seen(int64_t m, int64_t M) const {
    if (!p.causal) return keys;
    int64_t most = 0;
    for (int64_t i = m; i < std::min(m + M, count); i++) most = std::max(most, rows[i].limit);
    return std::min(keys, most - from);
  }
};

template <int M, int N>  // scores of M rows (in the block of rows: s starts with row m0) by 16 N keys
inline void score(const Rows& w, int64_t m0, int64_t m, int64_t j) {
  const int64_t Dp = wide(w.p.D);
  const float *q = w.q + m * Dp, *k = w.k + j * Dp;
  __m512 acc[M][N];
  for (int i = 0; i < M; i++)
    for (int n = 0; n < N; n++) acc[i][n] = _mm512_setzero_ps();
  for (int64_t d = 0; d < Dp; d++) {
    __m512 keys[N];
    for (int n = 0; n < N; n++) keys[n] = _mm512_load_ps(k + (n * Dp + d) * kWide);
    for (int i = 0; i < M; i++) {
      const __m512 query = _mm512_set1_ps(q[i * Dp + d]);
      for (int n = 0; n < N; n++) acc[i][n] = _mm512_fmadd_ps(query, keys[n], acc[i][n]);
    }
  }
  const bool all = !w.p.mask.data && !w.p.causal && j + N * kWide <= w.keys;
  for (int i = 0; i < M; i++) {
    float *s = w.s + (m - m0 + i) * w.stride + j, *lanes = w.lanes + (m - m0 + i) * kWide;
    __m512 top = _mm512_load_ps(lanes);
    for (int n = 0; n < N; n++) {
      const __m512 scores = all ? acc[i][n] : masked(w.p, w.rows[m + i], w.from + j + n * kWide, acc[i][n]);
      _mm512_store_ps(s + n * kWide, scores);
      top = _mm512_max_ps(top, scores);
    }
    _mm512_store_ps(lanes, top);
  }
}

template <int M>
inline void score(const Rows& w, int64_t m0, int64_t m, int64_t j, int64_t registers) {
  if (w.seen(m, M) <= j) return;
  switch (registers) {
    case 4: return score<M, 4>(w, m0, m, j);
    case 2: return score<M, 2>(w, m0, m, j);
    default: return score<M, 1>(w, m0, m, j);
  }
}

template <int M, int N>  // o[M, 16 N] += p[M, keys] @ v[keys, 16 N]
inline void weigh(const float* p, int64_t stride, const float* v, int64_t width, int64_t keys, float* o) {
  __m512 acc[M][N];
  for (int i = 0; i < M; i++)
    for (int n = 0; n < N; n++) acc[i][n] = _mm512_load_ps(o + i * width + n * kWide);
  for (int64_t j = 0; j < keys; j++) {
    __m512 values[N];
    for (int n = 0; n < N; n++) values[n] = _mm512_load_ps(v + j * width + n * kWide);
    for (int i = 0; i < M; i++) {
      const __m512 share = _mm512_set1_ps(p[i * stride + j]);
      for (int n = 0; n < N; n++) acc[i][n] = _mm512_fmadd_ps(share, values[n], acc[i][n]);
    }
  }
  for (int i = 0; i < M; i++)
    for (int n = 0; n < N; n++) _mm512_store_ps(o + i * width + n * kWide, acc[i][n]);
}

template <int M>
inline void weigh(const Rows& w, int64_t m0, int64_t m, int64_t j, int64_t end) {
  const int64_t width = wide(w.p.Dv), keys = std::min(end, w.seen(m, M)) - j;
  if (keys <= 0) return;
  const float* p = w.s + (m - m0) * w.stride + j;
  for (int64_t d = 0; d < width; d += 64) {
    const float* v = w.v + j * width + d;
    float* o = w.o + m * width + d;
    switch (std::min<int64_t>(4, (width - d) / kWide)) {
      case 4: weigh<M, 4>(p, w.stride, v, width, keys, o); break;
      case 3: weigh<M, 3>(p, w.stride, v, width, keys, o); break;
      case 2: weigh<M, 2>(p, w.stride, v, width, keys, o); break;
      default: weigh<M, 1>(p, w.stride, v, width, keys, o);
    }
  }
}

// Scores of a row become exp(score - top); sums and outputs so far are corrected to the new top.
void renew(const Rows& w, int64_t m0, int64_t m, int64_t keys) {
  const float before = w.top[m], top = std::max(before, _mm512_reduce_max_ps(_mm512_load_ps(w.lanes + (m - m0) * kWide)));
  w.top[m] = top;
  const float sum = exponentials(w.s + (m - m0) * w.stride, keys, top);
  if (before == top || before == kNone) {
    w.sum[m] += sum;
    return;
  }
  const __m512 factor = exponential(_mm512_set1_ps(before - top));
  w.sum[m] = w.sum[m] * _mm512_cvtss_f32(factor) + sum;
  float* o = w.o + m * wide(w.p.Dv);
  for (int64_t d = 0; d < w.p.Dv; d += kWide) _mm512_store_ps(o + d, _mm512_mul_ps(_mm512_load_ps(o + d), factor));
}

// Calls step(M) and its first row for rows m .. end, an even number: six at a time, then two.
template <class Step>
inline void cover(int64_t m, int64_t end, const Step& step) {
  for (; m + 6 <= end; m += 6) step(std::integral_constant<int, 6>(), m);
  for (; m < end; m += 2) step(std::integral_constant<int, 2>(), m);
}

void attend_block(const Rows& w, int64_t m0, int64_t m1) {
  for (int64_t i = 0; i < (m1 - m0) * kWide; i += kWide) _mm512_store_ps(w.lanes + i, _mm512_set1_ps(kNone));
  const int64_t keys = wide(w.seen(m0, m1 - m0));
  for (int64_t j = 0; j < keys;) {
    const int64_t registers = keys - j >= 64 ? 4 : keys - j >= 32 ? 2 : 1;
    cover(m0, m1, [&](auto M, int64_t m) { score<M()>(w, m0, m, j, registers); });
    j += registers * kWide;
  }
  cover(m0, m1, [&](auto M, int64_t m) {
    for (int64_t i = m; i < m + M(); i++) renew(w, m0, i, std::max<int64_t>(0, w.seen(m, M())));
  });
  const int64_t near = std::max(kWide, kNear / wide(w.p.Dv));
  for (int64_t j = 0; j < keys; j += near)
    cover(m0, m1, [&](auto M, int64_t m) { weigh<M()>(w, m0, m, j, j + near); });
}

void attend_many(const Problem& p, int64_t b, int64_t group, int64_t begin, int64_t count) {
  const int64_t Dp = wide(p.D), Vp = wide(p.Dv), even = (count + 1) / 2 * 2, block = wide(std::min(kBlock, p.keys));
  const int64_t stride = block + kWide, per_row = wide(even);
  Rows w{p, b, group, begin, count};
  w.stride = stride;
  w.q = scratch().take(even * (Dp + Vp) + 2 * per_row + kQueries * (kWide + stride) + block * (Dp + Vp) +
                       even * sizeof(Row) / sizeof(float));
  w.o = w.q + even * Dp, w.top = w.o + even * Vp, w.sum = w.top + per_row, w.lanes = w.sum + per_row;
  w.s = w.lanes + kQueries * kWide, w.k = w.s + kQueries * stride, w.v = w.k + block * Dp;
  w.rows = reinterpret_cast<Row*>(w.v + block * Vp);
  int64_t most = 0;
  for (int64_t i = 0; i < even; i++) {  // an odd last row twice
    const int64_t r = begin + std::min(i, count - 1);
    copy(p.query(b, group, r), p.q.column, p.D, Dp, p.scale, w.q + i * Dp);
    w.rows[i] = {p.seen(b, group, r), p.limit(r)};
    most = std::max(most, w.rows[i].limit);
  }
  std::fill(w.o, w.o + even * Vp, 0.0f);
  std::fill(w.top, w.top + even, kNone);
  std::fill(w.sum, w.sum + even, 0.0f);
  for (w.from = 0; w.from < most; w.from += kBlock) {
    w.keys = std::min(kBlock, most - w.from);
    pack_keys(p.k.at<float>(b, group, w.from), p.k, w.keys, p.D, w.k);
    for (int64_t j = 0; j < w.keys; j++)
      copy(p.v.at<float>(b, group, w.from + j), p.v.column, p.Dv, Vp, 1.0f, w.v + j * Vp);
    for (int64_t m = 0; m < even; m += kQueries) attend_block(w, m, std::min(even, m + kQueries));
  }
  for (int64_t i = 0; i < count; i++) put(w.o + i * Vp, w.sum[i], p.Dv, p.output(b, group, begin + i));
}

#endif

}  // namespace
