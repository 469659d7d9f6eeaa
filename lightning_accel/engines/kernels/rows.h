// Activations quantized row by row: symmetric int8, one scale a row, rounding half to even. Bit by bit what
// lightning_accel.quantize.ops.row_scales and row_codes compute; a row with an infinity or a NaN gets the scale NaN.

#pragma once

#include <cmath>
#include <limits>

#include "products.h"

namespace {

constexpr float kTiny = 1e-30f;

#ifdef VNNI

inline void quantize_row(const float* x, int64_t K, int64_t stride, int8_t* codes, int32_t* start, float* scale) {
  // the largest magnitude by integer comparison: an infinity or a NaN is larger than any number
  __m512i most = _mm512_setzero_si512();
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  for (int64_t k = 0; k < K; k += 16) {
    __m512i bits = _mm512_castps_si512(_mm512_maskz_loadu_ps(first(K - k), x + k));
    most = _mm512_max_epi32(most, _mm512_and_si512(bits, magnitude));
  }
  int32_t bits = _mm512_reduce_max_epi32(most);
  float top;
  std::memcpy(&top, &bits, 4);
  if (!std::isfinite(top)) {
    std::memset(codes, 0, stride);
    *start = 0;
    *scale = std::numeric_limits<float>::quiet_NaN();
    return;
  }
  *scale = std::max(top, kTiny) / 127.0f;
  const __m512 inverse = _mm512_set1_ps(1.0f / *scale);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t k = 0; k < stride; k += 16) {
    __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(first(K - k), x + k), inverse));
    sum = _mm512_add_epi32(sum, q);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + k), _mm512_cvtsepi32_epi8(q));
  }
  *start = static_cast<int32_t>(-128u * static_cast<uint32_t>(_mm512_reduce_add_epi32(sum)));  // modulo 2^32, as the sums
}

#else

inline void quantize_row(const float* x, int64_t K, int64_t stride, int8_t* codes, int32_t* start, float* scale) {
  float top = 0.0f;
  bool finite = true;
  for (int64_t k = 0; k < K; k++) {
    finite = finite && std::isfinite(x[k]);
    top = std::max(top, std::fabs(x[k]));
  }
  *start = 0;
  std::memset(codes, 0, stride);
  if (!finite) {
    *scale = std::numeric_limits<float>::quiet_NaN();
    return;
  }
  *scale = std::max(top, kTiny) / 127.0f;
  const float inverse = 1.0f / *scale;
  for (int64_t k = 0; k < K; k++) codes[k] = static_cast<int8_t>(std::nearbyint(x[k] * inverse));
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
    quantize_row(x + m * K, K, stride, codes.data() + m * stride, start.data() + m, scale.data() + m);
  }
};

}  // namespace
