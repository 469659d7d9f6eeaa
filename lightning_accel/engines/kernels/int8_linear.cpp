// y[M, N] = dequantize(quantize(x[M, K]) @ w[N, K].T) + bias: dynamic symmetric int8 activations, one scale a row,
// times int8 weights, one scale an output channel. Means what lightning_accel.quantize.ops.int8_linear_reference means,
// bit by bit: same scales, same rounding (half to even), int32 sums, and the same order of float operations.
// Linked into the compiled program and called through its C interface.

#include "rows.h"
#include "shim.h"

namespace {

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
  const int64_t K4 = (K + kCols - 1) / kCols, tiles = (N + kRows - 1) / kRows;
  static thread_local Rows scratch;
  Rows& rows = scratch;  // of this thread: in the others of a team the name means their own
  rows.resize(M, K);
  const Dequantized out{rows.start.data(), rows.scale.data(), ws, bias, y, N};
  run(
      M, (tiles + kPanel - 1) / kPanel, M * N * K, [&](int64_t m) { rows.quantize(x, K, m); },
      [&](int64_t from, int64_t to) {
        const int64_t t = from * kPanel;
        product<false>({rows.codes.data(), rows.stride}, M, w + t * K4 * kTile, K4, std::min(to * kPanel, tiles) - t,
                       t * kRows, N - t * kRows, out);
      });
}

}  // namespace

extern "C" __attribute__((visibility("hidden"))) AOTITorchError aoti_torch_cpu_int8_linear_tiled(
    AtenTensorHandle x, AtenTensorHandle tiles, AtenTensorHandle scale, AtenTensorHandle* bias, AtenTensorHandle* out) {
  Call<float> call;
  const int8_t* w;
  const float *s, *b = nullptr;
  if (data(tiles, &w) || data(scale, &s) || (bias && data(*bias, &b))) return AOTI_TORCH_FAILURE;
  if (AOTITorchError error = open(x, scale, out, &call)) return error;
  linear(call.x, w, s, b, call.y, call.M, call.N, call.K);
  return AOTI_TORCH_SUCCESS;
}
