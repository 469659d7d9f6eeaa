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

enum Activation : int64_t { kRelu, kGelu, kGeluTanh, kSilu, kRelu6 };  // in the order of lightning_accel.quantize.fused.ACTIVATIONS

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

#ifdef LANES

template <int64_t kind>
class Activate {
 public:
  Activate() {
    if (kind == kRelu || kind == kRelu6) return;
    const Share& share = share_of<kind>();
#ifdef VNNI
    for (int k = 0; k <= kDegree; k++)
      for (int half = 0; half < 2; half++) table_[k][half] = _mm512_load_ps(share.coefficients[k] + 16 * half);
#endif
    limit_ = all(share.limit), per_width_ = all(share.per_width);
  }
  Floats operator()(Floats x) const {
    if (kind == kRelu) return max(all(0.0f), x);  // of a NaN, the second
    if (kind == kRelu6) return min(all(6.0f), max(all(0.0f), x));
    const Floats round = all(12582912.0f);        // 1.5 * 2^23
    const Floats size = min(abs(x), limit_);
    const Floats rounded = fma(size, per_width_, round);  // the piece, in the lowest bits
    const Floats d = fma(size, per_width_, round - rounded);
    const Ints piece = bits(rounded);
    Floats h = pick(kDegree, piece);
    for (int k = kDegree - 1; k >= 0; k--) h = fma(h, d, pick(k, piece));
    return x * (all(0.5f) + or_sign(h, x));  // h is never negative
  }

 private:
#ifdef VNNI
  Floats pick(int k, Ints piece) const { return _mm512_permutex2var_ps(table_[k][0], piece, table_[k][1]); }

  Floats table_[kDegree + 1][2];
#else
  Floats pick(int k, Ints piece) const {  // a lookup reads three bits, and the sign chooses between two
    const Floats bit_3 = _mm256_castsi256_ps(_mm256_slli_epi32(piece, 28));
    const Floats bit_4 = _mm256_castsi256_ps(_mm256_slli_epi32(piece, 27));
    const float* of = share_of<kind>().coefficients[k];
    Floats eighth[4];
    for (int i = 0; i < 4; i++) eighth[i] = _mm256_permutevar8x32_ps(_mm256_load_ps(of + 8 * i), piece);
    return _mm256_blendv_ps(_mm256_blendv_ps(eighth[0], eighth[1], bit_3),
                            _mm256_blendv_ps(eighth[2], eighth[3], bit_3), bit_4);
  }

#endif
  Floats limit_, per_width_;
};

#else

template <int64_t kind>
struct Activate {
  float operator()(float x) const {
    if (kind == kRelu) return x < 0.0f ? 0.0f : x;
    if (kind == kRelu6) return x < 0.0f ? 0.0f : x > 6.0f ? 6.0f : x;
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
    case kRelu6: f(std::integral_constant<int64_t, kRelu6>()); return true;
    default: return false;
  }
}

}  // namespace
