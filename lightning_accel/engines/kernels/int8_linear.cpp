// y[M, N] = dequantize(quantize(x[M, K]) @ w[N, K].T) + bias: dynamic symmetric int8 activations, one scale a row,
// times int8 weights, one scale an output channel. Means what lightning_accel.quantize.ops.int8_linear_reference means,
// bit by bit: same scales, same rounding (half to even), int32 sums, and the same order of float operations.
// Linked into the compiled program and called through its C interface.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cmath>
#include <limits>
#include <vector>

#include "products.h"

namespace {

constexpr float kTiny = 1e-30f;

#ifdef VNNI

void quantize_row(const float* x, int64_t K, int64_t stride, int8_t* codes, int32_t* start, float* scale) {
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
  *start = -128 * _mm512_reduce_add_epi32(sum);
}

#else

void quantize_row(const float* x, int64_t K, int64_t stride, int8_t* codes, int32_t* start, float* scale) {
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

struct Dequantized {  // the epilogue: float(sum) * row's scale * channel's scale + bias
  const int32_t* starts;  // [M], what the sums of a row start from where VNNI adds 128 to each weight
  const float *row_scales, *scales, *bias;
  float* y;
  int64_t ldy;

  int32_t start(int64_t m) const { return starts[m]; }

#ifdef VNNI
  void store(int64_t m, int64_t n, int64_t count, __m512i sums) const {
    const __mmask16 in = first(count);
    __m512 out = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_set1_ps(row_scales[m]));
    out = _mm512_mul_ps(out, _mm512_maskz_loadu_ps(in, scales + n));
    if (bias) out = _mm512_add_ps(out, _mm512_maskz_loadu_ps(in, bias + n));
    _mm512_mask_storeu_ps(y + m * ldy + n, in, out);
  }
#else
  void store(int64_t m, int64_t n, int64_t count, const int32_t* sums) const {
    for (int64_t i = 0; i < std::min(count, kRows); i++) {
      float out = static_cast<float>(sums[i]) * row_scales[m];
      out = out * scales[n + i];
      y[m * ldy + n + i] = bias ? out + bias[n + i] : out;
    }
  }
#endif
};

void linear(const float* x, const int8_t* w, const float* ws, const float* bias, float* y, int64_t M, int64_t N,
            int64_t K) {
  const int64_t K4 = (K + kCols - 1) / kCols, stride = (K + 63) / 64 * 64;
  const int64_t tiles = (N + kRows - 1) / kRows, panels = (tiles + kPanel - 1) / kPanel;
  static thread_local std::vector<int8_t> codes;
  static thread_local std::vector<int32_t> start;
  static thread_local std::vector<float> scale;
  codes.resize(std::max<size_t>(codes.size(), (M + 15) / 16 * 16 * stride));
  start.resize(std::max<size_t>(start.size(), M));
  scale.resize(std::max<size_t>(scale.size(), M));
  // not the thread_local names: other threads would find their own empty vectors
  int8_t* const codes_ = codes.data();
  int32_t* const start_ = start.data();
  float* const scale_ = scale.data();
  const Dequantized out{start_, scale_, ws, bias, y, N};

  run(M, panels, M * N * K,
      [&](int64_t m) { quantize_row(x + m * K, K, stride, codes_ + m * stride, start_ + m, scale_ + m); },
      [&](int64_t p) {
        const int64_t t = p * kPanel;
        panel<false>({codes_, stride}, M, w + t * K4 * kTile, K4, std::min(kPanel, tiles - t), t * kRows, N - t * kRows,
                     out);
      });
}

}  // namespace

extern "C" __attribute__((visibility("hidden"))) AOTITorchError aoti_torch_cpu_int8_linear_tiled(
    AtenTensorHandle x, AtenTensorHandle tiles, AtenTensorHandle scale, AtenTensorHandle* bias, AtenTensorHandle* out) {
  constexpr int64_t kMaxDims = 8;
  void *x_, *w_, *s_, *b_ = nullptr, *y_;
  int32_t dtype;
  bool contiguous;
  int64_t dims, *sizes, *channels;
  if (aoti_torch_get_dtype(x, &dtype) || dtype != aoti_torch_dtype_float32()) return AOTI_TORCH_FAILURE;
  if (aoti_torch_is_contiguous(x, &contiguous) || !contiguous) return AOTI_TORCH_FAILURE;
  if (aoti_torch_get_dim(x, &dims) || dims < 1 || dims > kMaxDims) return AOTI_TORCH_FAILURE;
  if (aoti_torch_get_sizes(x, &sizes) || aoti_torch_get_sizes(scale, &channels)) return AOTI_TORCH_FAILURE;
  int64_t shape[kMaxDims], strides[kMaxDims], M = 1, step = 1;
  for (int64_t d = 0; d + 1 < dims; d++) M *= shape[d] = sizes[d];
  const int64_t K = sizes[dims - 1], N = shape[dims - 1] = channels[0];
  for (int64_t d = dims - 1; d >= 0; d--) {
    strides[d] = step;
    step *= shape[d];
  }
  if (aoti_torch_get_data_ptr(x, &x_) || aoti_torch_get_data_ptr(tiles, &w_) || aoti_torch_get_data_ptr(scale, &s_))
    return AOTI_TORCH_FAILURE;
  if (bias && aoti_torch_get_data_ptr(*bias, &b_)) return AOTI_TORCH_FAILURE;
  if (AOTITorchError error = aoti_torch_empty_strided(dims, shape, strides, aoti_torch_dtype_float32(),
                                                      aoti_torch_device_type_cpu(), 0, out))
    return error;
  if (aoti_torch_get_data_ptr(*out, &y_)) return AOTI_TORCH_FAILURE;
  linear(static_cast<float*>(x_), static_cast<int8_t*>(w_), static_cast<float*>(s_), static_cast<float*>(b_),
         static_cast<float*>(y_), M, N, K);
  return AOTI_TORCH_SUCCESS;
}
