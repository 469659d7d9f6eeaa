// Attention in float32: what its forms share. With tensors as views of any strides and `group` heads to a head of keys,
//     out[b, h] = softmax(scale * q[b, h] @ k[b, h / group].T + mask[b, h]) @ v[b, h / group];
// a row that sees no key is zero, as in torch.

#pragma once

#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

#include "products.h"

namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

struct View {  // [batch, heads, rows, columns] and its strides; 0 where it is broadcast
  const void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, column = 0;

  template <class T>
  const T* at(int64_t b, int64_t h, int64_t i) const {
    return static_cast<const T*>(data) + b * batch + h * head + i * row;
  }
};

struct Problem {
  View q, k, v, mask;  // mask: float32 is added, bool says what is seen
  bool boolean = false, causal = false;
  float scale = 1.0f;
  int64_t B = 0, H = 0, groups = 0, queries = 0, keys = 0, D = 0, Dv = 0;  // groups: heads of k and v
  float* out = nullptr;                                                     // [B, queries, H, Dv]

  const void* seen(int64_t b, int64_t group, int64_t r) const {  // the row of the mask
    const int64_t h = head(group, r), i = r % queries;
    if (!mask.data) return nullptr;
    return boolean ? static_cast<const void*>(mask.at<uint8_t>(b, h, i)) : mask.at<float>(b, h, i);
  }
  int64_t rows() const { return H / groups * queries; }  // that share keys: `queries` of each head of a group
  int64_t head(int64_t group, int64_t r) const { return group * (H / groups) + r / queries; }
  int64_t limit(int64_t r) const { return causal ? std::min(keys, r % queries + 1) : keys; }
  const float* query(int64_t b, int64_t group, int64_t r) const {
    return q.at<float>(b, head(group, r), r % queries);
  }
  float* output(int64_t b, int64_t group, int64_t r) const {
    return out + ((b * queries + r % queries) * H + head(group, r)) * Dv;
  }
};

class Scratch {  // of a thread, on cache lines, kept from call to call
 public:
  float* take(int64_t floats) {
    if (floats > size_) {
      memory_.reset();
      memory_.reset(static_cast<float*>(::operator new(floats * sizeof(float), std::align_val_t(64))));
      size_ = floats;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t size_ = 0;
};

inline Scratch& scratch() {
  static thread_local Scratch mine;
  return mine;
}

#ifdef VNNI

constexpr int64_t kWide = 16;  // floats of a register

inline int64_t wide(int64_t n) { return (n + kWide - 1) / kWide * kWide; }

// e^x for x <= 0, within 1.1 units in the last place; 0 below the least normal number. NaN stays NaN. Several at a time, step
// by step beside each other: one alone is a chain of operations that wait.
template <int N>
inline void exponential(__m512 (&x)[N]) {
  const __m512 magic = _mm512_set1_ps(12582912.0f);  // 1.5 * 2^23: added, it rounds to whole numbers
  const float steps[] = {8.3687250e-3f, 4.1668389e-2f, 1.6666521e-1f, 4.9999994e-1f, 1.0f, 1.0f};
  __m512 n[N], r[N], y[N];
  for (int i = 0; i < N; i++) n[i] = _mm512_fmadd_ps(x[i], _mm512_set1_ps(1.44269504f), magic);
  for (int i = 0; i < N; i++) n[i] = _mm512_sub_ps(n[i], magic);
  for (int i = 0; i < N; i++) r[i] = _mm512_fnmadd_ps(n[i], _mm512_set1_ps(0.693145752f), x[i]);  // ln 2 in two parts
  for (int i = 0; i < N; i++) r[i] = _mm512_fnmadd_ps(n[i], _mm512_set1_ps(1.42860677e-6f), r[i]);
  for (int i = 0; i < N; i++) y[i] = _mm512_set1_ps(1.3814581e-3f);  // minimax on [-ln 2 / 2, ln 2 / 2], to 3e-9
#pragma GCC unroll 6
  for (int k = 0; k < 6; k++)
    for (int i = 0; i < N; i++) y[i] = _mm512_fmadd_ps(y[i], r[i], _mm512_set1_ps(steps[k]));
  for (int i = 0; i < N; i++) {
    const __mmask16 normal = _mm512_cmp_ps_mask(x[i], _mm512_set1_ps(-87.3365f), _CMP_NLT_UQ);
    x[i] = _mm512_maskz_scalef_ps(normal, y[i], n[i]);
  }
}

inline __m512 exponential(__m512 x) {
  __m512 one[] = {x};
  exponential(one);
  return one[0];
}

struct Row {
  const void* mask;
  int64_t limit;  // keys before it are seen, as far as causality says
};

// What is added to the scores of keys j .. j + 16.
inline __m512 bias(const Problem& p, const Row& row, int64_t j) {
  const __mmask16 in = first(p.keys - j);
  const int64_t step = p.mask.column;
  if (p.boolean) {
    const uint8_t* seen = static_cast<const uint8_t*>(row.mask) + j * step;
    alignas(16) uint8_t bytes[16] = {};
    __m128i all;
    if (step == 1) all = _mm_maskz_loadu_epi8(in, seen);
    else {
      for (int64_t n = 0; n < std::min(kWide, p.keys - j); n++) bytes[n] = seen[n * step];
      all = _mm_load_si128(reinterpret_cast<const __m128i*>(bytes));
    }
    return _mm512_mask_blend_ps(_mm_test_epi8_mask(all, all), _mm512_set1_ps(kNone), _mm512_setzero_ps());
  }
  const float* added = static_cast<const float*>(row.mask) + j * step;
  if (step == 1) return _mm512_maskz_loadu_ps(in, added);
  alignas(64) float values[16] = {};
  for (int64_t n = 0; n < std::min(kWide, p.keys - j); n++) values[n] = added[n * step];
  return _mm512_load_ps(values);
}

// Scores of keys j .. j + 16 as the softmax takes them.
inline __m512 masked(const Problem& p, const Row& row, int64_t j, __m512 scores) {
  if (row.mask) scores = _mm512_add_ps(scores, bias(p, row, j));
  return _mm512_mask_mov_ps(_mm512_set1_ps(kNone), first(row.limit - j), scores);
}

// Copies `count` floats `step` apart and fills up with zeros to `padded`, times `factor`.
inline void copy(const float* from, int64_t step, int64_t count, int64_t padded, float factor, float* to) {
  if (step == 1) {
    for (int64_t d = 0; d < padded; d += kWide)
      _mm512_store_ps(to + d, _mm512_mul_ps(_mm512_maskz_loadu_ps(first(count - d), from + d), _mm512_set1_ps(factor)));
    return;
  }
  for (int64_t d = 0; d < padded; d++) to[d] = d < count ? from[d * step] * factor : 0.0f;
}

// p = exp(s - top) over `count` scores, in place; returns their sum. `top` is -inf where no key is seen.
inline float exponentials(float* s, int64_t count, float top) {
  const __m512 base = _mm512_set1_ps(top == kNone ? 0.0f : top);
  __m512 sum = _mm512_setzero_ps();
  int64_t j = 0;
  for (; j + 48 < count; j += 64) {
    __m512 e[4];
    for (int n = 0; n < 4; n++) e[n] = _mm512_sub_ps(_mm512_load_ps(s + j + n * kWide), base);
    exponential(e);
    for (int n = 0; n < 4; n++) _mm512_store_ps(s + j + n * kWide, e[n]);
    for (int n = 0; n < 4; n++) sum = _mm512_add_ps(sum, e[n]);
  }
  for (; j < count; j += kWide) {
    const __m512 e = exponential(_mm512_sub_ps(_mm512_load_ps(s + j), base));
    _mm512_store_ps(s + j, e);
    sum = _mm512_add_ps(sum, e);
  }
  return _mm512_reduce_add_ps(sum);
}

inline void put(const float* o, float sum, int64_t Dv, float* out) {
  const __m512 inverse = _mm512_set1_ps(sum == 0.0f ? 1.0f : 1.0f / sum);
  for (int64_t d = 0; d < Dv; d += kWide)
    _mm512_mask_storeu_ps(out + d, first(Dv - d), _mm512_mul_ps(_mm512_load_ps(o + d), inverse));
}

struct Sum {
  static __m512 of(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
};
struct Most {
  static __m512 of(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
};

template <class Of>  // element n: the sum of a[n], or its largest element
inline __m512 reduce(const __m512* a) {
  const auto singles = [](__m512 x, __m512 y) { return Of::of(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y)); };
  const auto doubles = [](__m512 x, __m512 y) {
    const __m512d c = _mm512_castps_pd(x), d = _mm512_castps_pd(y);
    return Of::of(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
  };
  const auto quarters = [](__m512 x, __m512 y) {
    return Of::of(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
  };
  __m512 u[4];
  for (int n = 0; n < 4; n++)
    u[n] = doubles(singles(a[4 * n], a[4 * n + 1]), singles(a[4 * n + 2], a[4 * n + 3]));
  return quarters(quarters(u[0], u[1]), quarters(u[2], u[3]));
}

inline void transpose(__m512* a) {  // 16 rows of 16, in place
  __m512 t[16];
  for (int n = 0; n < 16; n += 2) {
    t[n] = _mm512_unpacklo_ps(a[n], a[n + 1]);
    t[n + 1] = _mm512_unpackhi_ps(a[n], a[n + 1]);
  }
  const auto low = [](__m512 x, __m512 y) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
  };
  const auto high = [](__m512 x, __m512 y) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
  };
  for (int n = 0; n < 16; n += 4) {
    a[n] = low(t[n], t[n + 2]);
    a[n + 1] = high(t[n], t[n + 2]);
    a[n + 2] = low(t[n + 1], t[n + 3]);
    a[n + 3] = high(t[n + 1], t[n + 3]);
  }
  for (int n = 0; n < 4; n++) {
    t[n] = _mm512_shuffle_f32x4(a[n], a[n + 4], 0x88);
    t[n + 4] = _mm512_shuffle_f32x4(a[n], a[n + 4], 0xdd);
    t[n + 8] = _mm512_shuffle_f32x4(a[n + 8], a[n + 12], 0x88);
    t[n + 12] = _mm512_shuffle_f32x4(a[n + 8], a[n + 12], 0xdd);
  }
  for (int n = 0; n < 4; n++) {
    a[n] = _mm512_shuffle_f32x4(t[n], t[n + 8], 0x88);
    a[n + 8] = _mm512_shuffle_f32x4(t[n], t[n + 8], 0xdd);
    a[n + 4] = _mm512_shuffle_f32x4(t[n + 4], t[n + 12], 0x88);
    a[n + 12] = _mm512_shuffle_f32x4(t[n + 4], t[n + 12], 0xdd);
  }
}

#endif

}  // namespace
