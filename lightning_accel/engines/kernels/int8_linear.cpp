// y[M, N] = dequantize(quantize(x[M, K]) @ w[N, K].T) + bias: dynamic symmetric int8 activations, one scale a row,
// times int8 weights, one scale an output channel. Means what lightning_accel.quantize.ops.int8_linear_reference means,
// bit by bit: same scales, same rounding (half to even), int32 sums, and the same order of float operations.
// Linked into the compiled program and called through its C interface.

#include "rows.h"
#include "shim.h"

namespace {

struct Layer {
  const int8_t* w;
  const float *scale, *bias;
  int64_t N;
};

AOTITorchError layer(AtenTensorHandle tiles, AtenTensorHandle scale, AtenTensorHandle* bias, Layer* to) {
  int64_t* n;
  to->bias = nullptr;
  if (data(tiles, &to->w) || data(scale, &to->scale) || (bias && data(*bias, &to->bias))) return AOTI_TORCH_FAILURE;
  if (aoti_torch_get_sizes(scale, &n)) return AOTI_TORCH_FAILURE;
  to->N = n[0];
  return AOTI_TORCH_SUCCESS;
}

// Outputs of the layers side by side, y[M, N].
void linears(const float* x, const Layer* layers, int64_t count, float* y, int64_t M, int64_t N, int64_t K) {
  const int64_t K4 = (K + kCols - 1) / kCols;
  static thread_local Rows scratch;
  Rows& rows = scratch;  // of this thread: in the others of a team the name means their own
  rows.resize(M, K);
  const auto panels = [](const Layer& one) { return (one.N + kPanel * kRows - 1) / (kPanel * kRows); };
  int64_t all = 0;
  for (int64_t i = 0; i < count; i++) all += panels(layers[i]);
  run(
      M, all, work(M, N * K), [&](int64_t m) { rows.quantize(x, K, m); },
      [&](int64_t from, int64_t to) {
        int64_t n = 0;  // of the layer's first channel
        for (const Layer* one = layers; one < layers + count; one++) {
          const int64_t own = panels(*one), t = std::max<int64_t>(from, 0) * kPanel;
          const int64_t end = std::min(std::min(to, own) * kPanel, (one->N + kRows - 1) / kRows);
          const Dequantized out{{rows.start.data(), rows.scale.data(), one->scale, one->bias}, y + n, N};
          if (t < end)
            product<false>({rows.codes.data(), rows.stride}, M, one->w + t * K4 * kTile, K4, end - t, t * kRows,
                           one->N - t * kRows, out);
          from -= own, to -= own, n += one->N;
        }
      });
}

AOTITorchError call_with(AtenTensorHandle x, const Layer* layers, int64_t count, AtenTensorHandle* out) {
  Call<float> call;
  int64_t N = 0;
  for (int64_t i = 0; i < count; i++) N += layers[i].N;
  if (AOTITorchError error = open(x, N, out, &call)) return error;
  linears(call.x, layers, count, call.y, call.M, N, call.K);
  return AOTI_TORCH_SUCCESS;
}

}  // namespace

extern "C" __attribute__((visibility("hidden"))) AOTITorchError aoti_torch_cpu_int8_linear_tiled(
    AtenTensorHandle x, AtenTensorHandle tiles, AtenTensorHandle scale, AtenTensorHandle* bias, AtenTensorHandle* out) {
  Layer only;
  return layer(tiles, scale, bias, &only) ? AOTI_TORCH_FAILURE : call_with(x, &only, 1, out);
}

extern "C" __attribute__((visibility("hidden"))) AOTITorchError aoti_torch_cpu_int8_linears(
    AtenTensorHandle x, AtenTensorHandle tiles, AtenTensorHandle scale, AtenTensorHandle* bias, AtenTensorHandle tiles_2,
    AtenTensorHandle scale_2, AtenTensorHandle* bias_2, AtenTensorHandle* tiles_3, AtenTensorHandle* scale_3,
    AtenTensorHandle* bias_3, AtenTensorHandle* out) {
  Layer layers[3];
  if (layer(tiles, scale, bias, layers) || layer(tiles_2, scale_2, bias_2, layers + 1)) return AOTI_TORCH_FAILURE;
  if (tiles_3 && layer(*tiles_3, *scale_3, bias_3, layers + 2)) return AOTI_TORCH_FAILURE;
  return call_with(x, layers, tiles_3 ? 3 : 2, out);
}
