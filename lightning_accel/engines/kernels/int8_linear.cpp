// y[M, N] = dequantize(quantize(x[M, K]) @ w[N, K].T) + bias: dynamic symmetric int8 activations, one scale a row,
// times int8 weights, one scale an output channel. Means what lightning_accel.quantize.ops.int8_linear_reference means,
// bit by bit: same scales, same rounding (half to even), int32 sums, and the same order of float operations.
//
// Weights come in tiles of 16 channels by 4 inputs, [ceil(N/16), ceil(K/4), 16, 4], one 512-bit register each. The
// VNNI instruction multiplies unsigned by signed bytes, so a weight's sign bit is flipped (w + 128) and 128 * sum(x)
// is taken off the start of each sum. Linked into the compiled program and called through its C interface.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define VNNI 1
#endif

namespace {

constexpr int64_t kRows = 16, kCols = 4, kTile = kRows * kCols;  // of a tile, and its bytes
constexpr int64_t kPanel = 4;                                    // tiles of channels that one task computes
constexpr int64_t kParallel = 1 << 21;                           // products below which threads cost more than they give
constexpr float kTiny = 1e-30f;

struct Rows {  // quantized activations
  const int8_t* codes;    // [M, stride], padded with zeros
  const int32_t* start;   // [M], what each sum starts from
  const float* scale;     // [M]
  int64_t stride;
};

#ifdef VNNI

inline __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

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

template <int M, int N>  // M rows of x by N tiles of channels, sums held in registers over all of K
void block(const Rows& x, int64_t m, const int8_t* w, int64_t K4, const float* ws, const float* bias, float* y,
           int64_t ldy, int64_t channels) {
  __m512i sums[M][N];
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) sums[i][j] = _mm512_set1_epi32(x.start[m + i]);
  for (int64_t k = 0; k < K4; k++) {
    __m512i tiles[N];
    for (int j = 0; j < N; j++) tiles[j] = _mm512_xor_si512(_mm512_loadu_si512(w + (j * K4 + k) * kTile), flip);
    for (int i = 0; i < M; i++) {
      int32_t four;
      std::memcpy(&four, x.codes + (m + i) * x.stride + k * kCols, 4);
      const __m512i codes = _mm512_set1_epi32(four);
      for (int j = 0; j < N; j++) sums[i][j] = _mm512_dpbusd_epi32(sums[i][j], tiles[j], codes);
    }
  }
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) {
      const __mmask16 in = first(channels - j * kRows);
      __m512 out = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[i][j]), _mm512_set1_ps(x.scale[m + i]));
      out = _mm512_mul_ps(out, _mm512_maskz_loadu_ps(in, ws + j * kRows));
      if (bias) out = _mm512_add_ps(out, _mm512_maskz_loadu_ps(in, bias + j * kRows));
      _mm512_mask_storeu_ps(y + (m + i) * ldy + j * kRows, in, out);
    }
}

template <int N>
void panel(const Rows& x, int64_t M, const int8_t* w, int64_t K4, const float* ws, const float* bias, float* y,
           int64_t ldy, int64_t channels) {
  int64_t m = 0;
  for (; m + 6 <= M; m += 6) block<6, N>(x, m, w, K4, ws, bias, y, ldy, channels);
  for (; m + 2 <= M; m += 2) block<2, N>(x, m, w, K4, ws, bias, y, ldy, channels);
  for (; m < M; m++) block<1, N>(x, m, w, K4, ws, bias, y, ldy, channels);
}

#else  // any other CPU: the same numbers, as fast as the compiler makes it

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

template <int N>
void panel(const Rows& x, int64_t M, const int8_t* w, int64_t K4, const float* ws, const float* bias, float* y,
           int64_t ldy, int64_t channels) {
  for (int64_t m = 0; m < M; m++) {
    int32_t sums[N * kRows] = {};
    for (int j = 0; j < N; j++)
      for (int64_t k = 0; k < K4; k++) {
        const int8_t* tile = w + (j * K4 + k) * kTile;
        const int8_t* codes = x.codes + m * x.stride + k * kCols;
        for (int r = 0; r < kRows; r++)
          for (int c = 0; c < kCols; c++) sums[j * kRows + r] += int32_t(tile[r * kCols + c]) * codes[c];
      }
    for (int64_t n = 0; n < std::min<int64_t>(channels, N * kRows); n++) {
      float out = static_cast<float>(sums[n]) * x.scale[m];
      out = out * ws[n];
      y[m * ldy + n] = bias ? out + bias[n] : out;
    }
  }
}

#endif

void linear(const float* x, const int8_t* w, const float* ws, const float* bias, float* y, int64_t M, int64_t N,
            int64_t K) {
  const int64_t K4 = (K + kCols - 1) / kCols, stride = (K + 15) / 16 * 16;
  const int64_t tiles = (N + kRows - 1) / kRows, panels = (tiles + kPanel - 1) / kPanel;
  static thread_local std::vector<int8_t> codes;
  static thread_local std::vector<int32_t> start;
  static thread_local std::vector<float> scale;
  codes.resize(std::max<size_t>(codes.size(), M * stride));
  start.resize(std::max<size_t>(start.size(), M));
  scale.resize(std::max<size_t>(scale.size(), M));
  int8_t* const codes_ = codes.data();
  int32_t* const start_ = start.data();
  float* const scale_ = scale.data();
  const Rows rows{codes_, start_, scale_, stride};

  auto quantize = [&](int64_t m) {
    quantize_row(x + m * K, K, stride, codes_ + m * stride, start_ + m, scale_ + m);
  };
  auto multiply = [&](int64_t p) {
    const int64_t n = p * kPanel * kRows;
    const int8_t* tile = w + p * kPanel * K4 * kTile;
    const float* b = bias ? bias + n : nullptr;
    switch (std::min(kPanel, tiles - p * kPanel)) {
      case 4: panel<4>(rows, M, tile, K4, ws + n, b, y + n, N, N - n); break;
      case 3: panel<3>(rows, M, tile, K4, ws + n, b, y + n, N, N - n); break;
      case 2: panel<2>(rows, M, tile, K4, ws + n, b, y + n, N, N - n); break;
      default: panel<1>(rows, M, tile, K4, ws + n, b, y + n, N, N - n);
    }
  };
#ifdef _OPENMP
  if (omp_get_max_threads() > 1 && M * N * K >= kParallel) {
#pragma omp parallel
    {
#pragma omp for
      for (int64_t m = 0; m < M; m++) quantize(m);
#pragma omp for
      for (int64_t p = 0; p < panels; p++) multiply(p);
    }
    return;
  }
#endif
  for (int64_t m = 0; m < M; m++) quantize(m);
  for (int64_t p = 0; p < panels; p++) multiply(p);
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
