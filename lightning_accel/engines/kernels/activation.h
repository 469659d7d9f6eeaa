// Activations between two integer products, in float32.
//
// GELU, its tanh form and SiLU are x * share(x), share being the normal distribution's (or a logistic) cumulative function,
// 1/2 + h(|x|) with the sign of x. h is a polynomial of degree 4 on each of 31 pieces of equal width, through its values at
// Chebyshev nodes, and 1/2 beyond them: the coefficients are looked up in registers, and one code serves all of these.
//
//     |Activate(x) - exact| <= 2^-21 |x|        NaN and infinities come out as they do of the formulas

#pragma once

#include <cmath>

#include "products.h"

namespace {

enum Activation : int64_t { kRelu, kGelu, kGeluTanh, kSilu };  // in the order of lightning_accel.quantize.fused.ACTIVATIONS

constexpr int kPieces = 31, kDegree = 4;

struct Share {
  alignas(64) float coefficients[kDegree + 1][32];  // of the distance from a piece's middle, in widths; the last is 1/2
  float limit, per_width;

  Share(double (*h)(double), double end) {
    const double width = end / (kPieces - 0.5);
    limit = static_cast<float>(width * kPieces), per_width = static_cast<float>(1.0 / width);
    for (int i = 0; i <= kPieces; i++) {
      double nodes[kDegree + 1], newton[kDegree + 1], out[kDegree + 1] = {};
      for (int j = 0; j <= kDegree; j++) {
        nodes[j] = 0.5 * std::cos(3.141592653589793 * (j + 0.5) / (kDegree + 1));
        newton[j] = i == kPieces ? 0.5 : h((i + nodes[j]) * width);
      }
      for (int level = 1; level <= kDegree; level++)  // divided differences
        for (int j = kDegree; j >= level; j--)
          newton[j] = (newton[j] - newton[j - 1]) / (nodes[j] - nodes[j - level]);
      for (int j = kDegree; j >= 0; j--) {  // out = out * (d - nodes[j]) + newton[j]
        for (int k = kDegree; k > 0; k--) out[k] = out[k - 1] - nodes[j] * out[k];
        out[0] = newton[j] - nodes[j] * out[0];
      }
      for (int k = 0; k <= kDegree; k++) coefficients[k][i] = static_cast<float>(out[k]);
    }
  }
};

const Share kNormal([](double x) { return 0.5 * std::erf(x * 0.7071067811865476); }, 5.6);
const Share kTanh([](double x) { return 0.5 * std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)); }, 5.2);
const Share kLogistic([](double x) { return 0.5 * std::tanh(0.5 * x); }, 17.0);

template <int64_t kind>
inline const Share& share_of() {
  return kind == kGelu ? kNormal : kind == kGeluTanh ? kTanh : kLogistic;
}

#ifdef VNNI

template <int64_t kind>
class Activate {
 public:
  Activate() {
    if (kind == kRelu) return;
    const Share& share = share_of<kind>();
    for (int k = 0; k <= kDegree; k++)
      for (int half = 0; half < 2; half++) table_[k][half] = _mm512_load_ps(share.coefficients[k] + 16 * half);
    limit_ = _mm512_set1_ps(share.limit), per_width_ = _mm512_set1_ps(share.per_width);
  }
  __m512 operator()(__m512 x) const {
    if (kind == kRelu) return _mm512_max_ps(_mm512_setzero_ps(), x);  // of a NaN, the second
    const __m512 round = _mm512_set1_ps(12582912.0f);                 // 1.5 * 2^23
    const __m512 size = _mm512_min_ps(_mm512_abs_ps(x), limit_);
    const __m512 rounded = _mm512_fmadd_ps(size, per_width_, round);  // the piece, in the lowest bits
    const __m512 d = _mm512_fmsub_ps(size, per_width_, _mm512_sub_ps(rounded, round));
    const __m512i piece = _mm512_castps_si512(rounded);
    __m512 h = pick(kDegree, piece);
    for (int k = kDegree - 1; k >= 0; k--) h = _mm512_fmadd_ps(h, d, pick(k, piece));
    // h is never negative: the sign of x can be put in with one instruction
    const __m512 sign = _mm512_set1_ps(-0.0f);
    const __m512i signed_h = _mm512_ternarylogic_epi32(_mm512_castps_si512(h), _mm512_castps_si512(x),
                                                       _mm512_castps_si512(sign), 0xf8);  // h | (x & sign)
    return _mm512_mul_ps(x, _mm512_add_ps(_mm512_set1_ps(0.5f), _mm512_castsi512_ps(signed_h)));
  }

 private:
  __m512 pick(int k, __m512i piece) const { return _mm512_permutex2var_ps(table_[k][0], piece, table_[k][1]); }

  __m512 table_[kDegree + 1][2], limit_, per_width_;
};

#else

template <int64_t kind>
struct Activate {
  float operator()(float x) const {
    if (kind == kRelu) return x < 0.0f ? 0.0f : x;
    const Share& share = share_of<kind>();
    const float widths = std::min(share.limit, std::fabs(x)) * share.per_width;  // of a NaN, the limit
    const int piece = static_cast<int>(widths + 0.5f);
    const float d = widths - static_cast<float>(piece);
    float h = share.coefficients[kDegree][piece];
    for (int k = kDegree - 1; k >= 0; k--) h = h * d + share.coefficients[k][piece];
    return x * (0.5f + std::copysign(h, x));
  }
};

#endif

// Calls f with the activation as a compile-time constant; false where there is none of that number.
template <class F>
bool with_activation(int64_t kind, const F& f) {
  switch (kind) {
    case kRelu: f(std::integral_constant<int64_t, kRelu>()); return true;
    case kGelu: f(std::integral_constant<int64_t, kGelu>()); return true;
    case kGeluTanh: f(std::integral_constant<int64_t, kGeluTanh>()); return true;
    case kSilu: f(std::integral_constant<int64_t, kSilu>()); return true;
    default: return false;
  }
}

}  // namespace
