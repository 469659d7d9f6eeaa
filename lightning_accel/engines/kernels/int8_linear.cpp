// y[M, N] = dequantize(quantize(x[M, K]) @ w[N, K].T) + bias: dynamic symmetric int8 activations, one scale a row,
// times int8 weights, one scale an output channel. Means what lightning_accel.quantize.ops.int8_linear_reference means,
// bit by bit: same scales, same rounding (half to even), int32 sums, and the same order of float operations.
// Linked into the compiled program and called through its C interface.

#include "rows.h"
#include "shim.h"

namespace {

void linear(const float* x, const int8_t* w, const float* ws, const float* bias, float* y, int64_t M, int64_t N,
            int64_t K) {
  const int64_t K4 = (K + kCols - 1) / kCols, tiles = (N + kRows - 1) / kRows;
  static thread_local Rows scratch;
  Rows& rows = scratch;  // of this thread: in the others of a team the name means their own
  rows.resize(M, K);
  const Dequantized out{{rows.start.data(), rows.scale.data(), ws, bias}, y, N};
  run(
      M, (tiles + kPanel - 1) / kPanel, work(M, N * K), [&](int64_t m) { rows.quantize(x, K, m); },
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
