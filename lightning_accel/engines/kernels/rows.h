// Activations quantized row by row: symmetric int8, one scale a row, rounding half to even. Bit by bit what
// lightning_accel.quantize.ops.row_scales and row_codes compute; a row with an infinity or a NaN gets the scale NaN.

#pragma once

#include <cmath>
#include <limits>

#include "products.h"

namespace {

constexpr float kTiny = 1e-30f;

inline float as_float(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

#ifdef LANES
// The larger magnitudes by integer comparison, as bits: an infinity or a NaN is larger than any number.
inline Ints larger(Ints most, Floats x) { return max(most, bits(abs(x))); }
#endif

#ifdef VNNI

inline float largest(const float* x, int64_t K) {
  __m512i most[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  int64_t k = 0;
  for (; k + 32 <= K; k += 32)
    for (int i = 0; i < 2; i++) most[i] = larger(most[i], _mm512_loadu_ps(x + k + 16 * i));
  for (; k < K; k += 16) most[0] = larger(most[0], _mm512_maskz_loadu_ps(first(K - k), x + k));
  return as_float(_mm512_reduce_max_epi32(_mm512_max_epi32(most[0], most[1])));
}

// 64 codes of as many floats, from `load(i)` for the i-th 16 of them.
template <class Load>
inline __m512i convert(const Load& load, __m512 inverse) {
  __m512i q[4];
  for (int i = 0; i < 4; i++) q[i] = _mm512_cvtps_epi32(_mm512_mul_ps(load(i), inverse));
  // packed four by four within quarters of a register
  const __m512i packed = _mm512_packs_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, packed);
}

// Codes of a row whose largest magnitude is `top`.
inline void convert_row(const float* x, int64_t K, int64_t stride, float top, int8_t* codes, int32_t* start,
                        float* scale) {
  if (!std::isfinite(top)) {
    std::memset(codes, 0, stride);
    *start = 0;
    *scale = std::numeric_limits<float>::quiet_NaN();
    return;
  }
  *scale = std::max(top, kTiny) / 127.0f;
  const __m512 inverse = _mm512_set1_ps(1.0f / *scale);
  __m512i sum = _mm512_setzero_si512();
  int64_t k = 0;
  const auto put = [&](__m512i q) {
    sum = dot(sum, _mm512_set1_epi8(1), q);
    _mm512_storeu_si512(codes + k, q);
  };
  for (; k + 64 <= K; k += 64) put(convert([&](int i) { return _mm512_loadu_ps(x + k + 16 * i); }, inverse));
  for (; k < stride; k += 64)
    put(convert([&](int i) { return _mm512_maskz_loadu_ps(first(K - k - 16 * i), x + k + 16 * i); }, inverse));
  *start = static_cast<int32_t>(-128u * static_cast<uint32_t>(_mm512_reduce_add_epi32(sum)));  // modulo 2^32, as the sums
}

#else

inline int32_t larger(int32_t most, float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return std::max(most, bits & 0x7fffffff);
}

inline float largest(const float* x, int64_t K) {
  int32_t most = 0;
  for (int64_t k = 0; k < K; k++) most = larger(most, x[k]);
  return as_float(most);
}

inline void convert_row(const float* x, int64_t K, int64_t stride, float top, int8_t* codes, int32_t* start,
                        float* scale) {
  *start = 0;
  std::memset(codes, 0, stride);
  if (!std::isfinite(top)) {
    *scale = std::numeric_limits<float>::quiet_NaN();
    return;
  }
  *scale = std::max(top, kTiny) / 127.0f;
  const float inverse = 1.0f / *scale;
  int32_t sum = 0;
  for (int64_t k = 0; k < K; k++) {
    codes[k] = static_cast<int8_t>(std::nearbyint(x[k] * inverse));
    sum += codes[k];
  }
  *start = static_cast<int32_t>(-128u * static_cast<uint32_t>(sum));  // modulo 2^32, as the sums
}

#endif

// Scratch of a thread that calls an operator.
struct Rows {
  Buffer<int8_t> codes;   // [M rounded up to 16, stride]
  Buffer<int32_t> start;  // [M], -128 * sum of codes: what sums start from where 128 is added to each weight
  Buffer<float> scale;    // [M]
  int64_t stride = 0;

  void resize(int64_t M, int64_t K) {
    stride = ((K + 63) / 64 | 1) * 64;  // an odd number of cache lines: rows spread over all sets of the cache
    codes.grow((M + 15) / 16 * 16 * stride);
    start.grow(M);
    scale.grow(M);
  }
  void quantize(const float* x, int64_t K, int64_t m) {
    convert(x + m * K, K, m, largest(x + m * K, K));
  }
  void convert(const float* row, int64_t K, int64_t m, float top) {
    convert_row(row, K, stride, top, codes.data() + m * stride, start.data() + m, scale.data() + m);
  }
};

// float(sum) * row's scale * channel's scale + bias
struct Dequantize {
  const int32_t* starts;  // [M], what the sums of a row start from where VNNI adds 128 to each weight
  const float *row_scales, *scales, *bias;

#ifdef LANES
  struct Column {
    const float* row_scales;
    bool biased;
    Floats scale, bias;

    Floats operator()(int64_t m, Ints sums) const {
      const Floats out = floats(sums) * all(row_scales[m]);
      return biased ? out * scale + bias : out * scale;
    }
  };
  Column at(int64_t n, Lanes in) const {
    return {row_scales, bias != nullptr, load(in, scales + n), bias ? load(in, bias + n) : all(0.0f)};
  }
#else
  float operator()(int64_t m, int64_t n, int32_t sum) const {
    float out = static_cast<float>(sum) * row_scales[m];
    out = out * scales[n];
    return bias ? out + bias[n] : out;
  }
#endif
};

struct Dequantized {  // an epilogue: dequantized sums are the output
  Dequantize value;
  float* y;
  int64_t ldy;

  int32_t start(int64_t m) const { return value.starts[m]; }

#ifdef LANES
  struct Column {
    Dequantize::Column value;
    float* y;
    int64_t ldy;
    Lanes in;

    void store(int64_t m, Ints sums) const { ::store(in, y + m * ldy, value(m, sums)); }
  };
  Column at(int64_t n, int64_t count) const {
    const Lanes in = first(count);
    return {value.at(n, in), y + n, ldy, in};
  }
#else
  void store(int64_t m, int64_t n, int64_t count, const int32_t* sums) const {
    for (int64_t i = 0; i < std::min(count, kRows); i++) y[m * ldy + n + i] = value(m, n + i, sums[i]);
  }
#endif
};

}  // namespace
