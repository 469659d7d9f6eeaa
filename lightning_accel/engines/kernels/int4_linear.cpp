// y[M, N] = x[M, K] @ w[N, K].T + bias with 4-bit weights, one float16 scale a group of inputs: x as it is in float32
// (int4_linear), or quantized row by row to int8 (int4_int8_linear). Mean what the references of the same names in
// lightning_accel.quantize.int4 mean, codes and integer sums bit by bit; float sums are added up in another order.
//
// Packed weights [ceil(N/16), K/8, 16, 4]: the low halves of a register's bytes are a tile of 16 channels by 4 inputs, the
// high halves the tile of the next 4 inputs; codes + 8. Scales [ceil(N/16), G, 16] float16.

#include "rows.h"
#include "shim.h"

namespace {

struct Weights {
  const uint8_t* packed;
  const uint16_t* scales;
  const float* bias;
  int64_t N, K, groups;

  const uint8_t* tile(int64_t t) const { return packed + t * K / 8 * kTile; }
  const uint16_t* scale(int64_t t, int64_t g) const { return scales + (t * groups + g) * kRows; }
};

#ifdef VNNI

inline __m512 scales_of(const Weights& w, int64_t t, int64_t g) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.scale(t, g))));
}

template <int M, int T>  // M rows by T tiles of channels
void int8_block(const Weights& w, const Rows& rows, const int32_t* sums, int64_t m, int64_t t, float* y) {
  const __m512i low = _mm512_set1_epi8(0x0f);
  const int64_t steps = w.K / w.groups / 8;
  __m512 out[M][T];
  for (int i = 0; i < M; i++)
    for (int j = 0; j < T; j++) out[i][j] = _mm512_setzero_ps();
  for (int64_t g = 0; g < w.groups; g++) {
    __m512i acc[M][T];
    for (int i = 0; i < M; i++)
      for (int j = 0; j < T; j++) acc[i][j] = _mm512_set1_epi32(sums[(m + i) * w.groups + g]);
    for (int64_t k = g * steps; k < (g + 1) * steps; k++) {
      __m512i lo[T], hi[T];
      for (int j = 0; j < T; j++) {
        const __m512i both = _mm512_loadu_si512(w.tile(t + j) + k * kTile);
        lo[j] = _mm512_and_si512(both, low);
        hi[j] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
      }
      for (int i = 0; i < M; i++) {
        int32_t four[2];
        std::memcpy(four, rows.codes.data() + (m + i) * rows.stride + k * 8, 8);
        for (int j = 0; j < T; j++) acc[i][j] = _mm512_dpbusd_epi32(acc[i][j], lo[j], _mm512_set1_epi32(four[0]));
        for (int j = 0; j < T; j++) acc[i][j] = _mm512_dpbusd_epi32(acc[i][j], hi[j], _mm512_set1_epi32(four[1]));
      }
    }
    for (int j = 0; j < T; j++) {
      const __m512 scale = scales_of(w, t + j, g);
      for (int i = 0; i < M; i++) out[i][j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[i][j]), scale, out[i][j]);
    }
  }
  for (int i = 0; i < M; i++)
    for (int j = 0; j < T; j++) {
      const int64_t n = (t + j) * kRows;
      const __mmask16 in = first(w.N - n);
      const __m512 scaled = _mm512_mul_ps(out[i][j], _mm512_set1_ps(rows.scale[m + i]));
      _mm512_mask_storeu_ps(y + (m + i) * w.N + n, in, _mm512_add_ps(scaled, _mm512_maskz_loadu_ps(in, w.bias + n)));
    }
}

template <int M, int T>
void float_block(const Weights& w, const float* x, int64_t m, int64_t t, float* y) {
  const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  const int64_t steps = w.K / w.groups / 8;
  __m512 out[M][T];
  for (int i = 0; i < M; i++)
    for (int j = 0; j < T; j++) out[i][j] = _mm512_setzero_ps();
  for (int64_t g = 0; g < w.groups; g++) {
    __m512 acc[M][T];
    for (int i = 0; i < M; i++)
      for (int j = 0; j < T; j++) acc[i][j] = _mm512_setzero_ps();
    for (int64_t k = g * steps; k < (g + 1) * steps; k++) {
      __m512i codes[T];
      for (int j = 0; j < T; j++) codes[j] = _mm512_loadu_si512(w.tile(t + j) + k * kTile);
#pragma GCC unroll 8
      for (int q = 0; q < 8; q++) {  // halves of the bytes of a lane; a lookup reads the lowest four bits of each lane
        const int64_t input = k * 8 + q % 2 * 4 + q / 2;
        __m512 weights[T];
        for (int j = 0; j < T; j++)
          weights[j] = _mm512_permutexvar_ps(_mm512_srli_epi32(codes[j], 4 * q), values);
        for (int i = 0; i < M; i++)
          for (int j = 0; j < T; j++)
            acc[i][j] = _mm512_fmadd_ps(weights[j], _mm512_set1_ps(x[(m + i) * w.K + input]), acc[i][j]);
      }
    }
    for (int j = 0; j < T; j++) {
      const __m512 scale = scales_of(w, t + j, g);
      for (int i = 0; i < M; i++) out[i][j] = _mm512_fmadd_ps(acc[i][j], scale, out[i][j]);
    }
  }
  for (int i = 0; i < M; i++)
    for (int j = 0; j < T; j++) {
      const int64_t n = (t + j) * kRows;
      const __mmask16 in = first(w.N - n);
      _mm512_mask_storeu_ps(y + (m + i) * w.N + n, in, _mm512_add_ps(out[i][j], _mm512_maskz_loadu_ps(in, w.bias + n)));
    }
}

// Calls block(rows, tiles) so that all rows and the tiles t .. t + count are covered: one row by up to four tiles at a
// time, or four rows by two.
template <class Block>
void cover(int64_t M, int64_t t, int64_t count, const Block& block) {
  int64_t m = 0;
  for (; m + 4 <= M; m += 4)
    for (int64_t j = 0; j < count; j += 2)
      j + 2 <= count ? block.template operator()<4, 2>(m, t + j) : block.template operator()<4, 1>(m, t + j);
  for (; m < M; m++) switch (count) {
      case 4: block.template operator()<1, 4>(m, t); break;
      case 3: block.template operator()<1, 3>(m, t); break;
      case 2: block.template operator()<1, 2>(m, t); break;
      default: block.template operator()<1, 1>(m, t);
    }
}

struct Int8Block {
  const Weights& w;
  const Rows& rows;
  const int32_t* sums;
  float* y;
  template <int M, int T>
  void operator()(int64_t m, int64_t t) const {
    int8_block<M, T>(w, rows, sums, m, t, y);
  }
};

struct FloatBlock {
  const Weights& w;
  const float* x;
  float* y;
  template <int M, int T>
  void operator()(int64_t m, int64_t t) const {
    float_block<M, T>(w, x, m, t, y);
  }
};

#else  // any other CPU: as fast as the compiler makes it

inline float half_to_float(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * std::ldexp(static_cast<float>(fraction), -24);
  const uint32_t bits = sign | (exponent + 112) << 23 | fraction << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline int code(const Weights& w, int64_t t, int64_t r, int64_t k) {
  const uint8_t byte = w.tile(t)[k / 8 * kTile + r * kCols + k % 4];
  return (k % 8 < 4 ? byte & 15 : byte >> 4) - 8;
}

template <class T, class Sum>  // sums of the groups of one channel and row, times their scales
float channel(const Weights& w, const T* x, int64_t n) {
  const int64_t t = n / kRows, r = n % kRows, size = w.K / w.groups;
  float out = 0.0f;
  for (int64_t g = 0; g < w.groups; g++) {
    Sum sum = 0;
    for (int64_t k = g * size; k < (g + 1) * size; k++) sum += static_cast<Sum>(code(w, t, r, k)) * x[k];
    out += static_cast<float>(sum) * half_to_float(w.scale(t, g)[r]);
  }
  return out;
}

#endif

void int4_linear(const float* x, const Weights& w, float* y, int64_t M) {
  const int64_t tiles = (w.N + kRows - 1) / kRows;
  const auto multiply = [&](int64_t p) {
    const int64_t t = p * kPanel, count = std::min(kPanel, tiles - t);
#ifdef VNNI
    cover(M, t, count, FloatBlock{w, x, y});
#else
    for (int64_t m = 0; m < M; m++)
      for (int64_t n = t * kRows; n < std::min(w.N, (t + count) * kRows); n++)
        y[m * w.N + n] = channel<float, float>(w, x + m * w.K, n) + w.bias[n];
#endif
  };
  run(0, (tiles + kPanel - 1) / kPanel, M * w.N * w.K, [](int64_t) {}, each(multiply));
}

void int4_int8_linear(const float* x, const Weights& w, float* y, int64_t M) {
  const int64_t tiles = (w.N + kRows - 1) / kRows, size = w.K / w.groups;
  static thread_local Rows scratch;
  static thread_local std::vector<int32_t> scratch_sums;  // [M, groups], -8 * sum of codes: weights' codes have 8 added
  Rows& rows = scratch;
  std::vector<int32_t>& sums = scratch_sums;
  rows.resize(M, w.K);
  sums.resize(std::max<size_t>(sums.size(), M * w.groups));
  const auto quantize = [&](int64_t m) {
    rows.quantize(x, w.K, m);
    const int8_t* codes = rows.codes.data() + m * rows.stride;
    for (int64_t g = 0; g < w.groups; g++) {
      int32_t sum = 0;
      for (int64_t k = g * size; k < (g + 1) * size; k++) sum += codes[k];
      sums[m * w.groups + g] = -8 * sum;
    }
  };
  const auto multiply = [&](int64_t p) {
    const int64_t t = p * kPanel, count = std::min(kPanel, tiles - t);
#ifdef VNNI
    cover(M, t, count, Int8Block{w, rows, sums.data(), y});
#else
    for (int64_t m = 0; m < M; m++)
      for (int64_t n = t * kRows; n < std::min(w.N, (t + count) * kRows); n++)
        y[m * w.N + n] =
            channel<int8_t, int32_t>(w, rows.codes.data() + m * rows.stride, n) * rows.scale[m] + w.bias[n];
#endif
  };
  run(M, (tiles + kPanel - 1) / kPanel, M * w.N * w.K, quantize, each(multiply));
}

AOTITorchError call_with(void (*linear)(const float*, const Weights&, float*, int64_t), AtenTensorHandle x,
                         AtenTensorHandle packed, AtenTensorHandle scale, AtenTensorHandle bias, AtenTensorHandle* out) {
  Call<float> call;
  Weights w;
  int64_t* sizes;
  if (data(packed, &w.packed) || data(scale, &w.scales) || data(bias, &w.bias)) return AOTI_TORCH_FAILURE;
  if (aoti_torch_get_sizes(scale, &sizes)) return AOTI_TORCH_FAILURE;
  if (AOTITorchError error = open(x, bias, out, &call)) return error;
  w.N = call.N, w.K = call.K, w.groups = sizes[1];
  linear(call.x, w, call.y, call.M);
  return AOTI_TORCH_SUCCESS;
}

}  // namespace

#define LIGHTNING_ACCEL_OPERATOR(name)                                                                               \
  extern "C" __attribute__((visibility("hidden"))) AOTITorchError aoti_torch_cpu_##name(                             \
      AtenTensorHandle x, AtenTensorHandle packed, AtenTensorHandle scale, AtenTensorHandle bias,                    \
      AtenTensorHandle* out) {                                                                                       \
    return call_with(name, x, packed, scale, bias, out);                                                             \
  }

LIGHTNING_ACCEL_OPERATOR(int4_linear)
LIGHTNING_ACCEL_OPERATOR(int4_int8_linear)
