// Depthwise convolutions in float32 of images [B, H, W, C]: a channel's sum over the window of that channel alone, and an
// activation of it. Weights are [kernel_height * kernel_width, C].
//
// What of a window lies beyond the borders is left out. Outputs beside each other whose windows lie inside share what is
// read of the weights.

#include "activation.h"
#include "shim.h"

#ifdef LANES

namespace {

constexpr int64_t kNone = -1;  // in the place of an Activation

struct Image {
  const float *x, *weight, *bias;
  int64_t H, W, C, out_height, out_width;
  int64_t kernel_height, kernel_width, stride_height, stride_width, top, left, down, across;
};

// The inputs of a window that lie inside, from the first to before the last, of `size` inputs that begin at `at`.
struct Inside {
  int64_t from, to;

  Inside(int64_t at, int64_t step, int64_t size, int64_t end) {
    from = at >= 0 ? 0 : std::min(size, (-at + step - 1) / step);
    to = at >= end ? 0 : std::min(size, (end - at + step - 1) / step);
    if (to < from) to = from;
  }
};

// Outputs beside each other, all with the same inputs of their windows. `image` is where the first window begins. Eight
// sums or four run at a time, so that none waits for the one before it.
template <int64_t kind, int64_t outputs>
void pixels(const Image& w, const float* image, Inside rows, Inside columns, float* y) {
  constexpr int64_t registers = std::max<int64_t>(1, 4 / outputs);
  const Activate<kind == kNone ? int64_t{kRelu} : kind> function;
  const int64_t step = w.stride_width * w.C;
  for (int64_t n = 0; n < w.C; n += registers * kLanes) {
    Lanes in[registers];
    Floats sums[outputs][registers];
#pragma GCC unroll 4
    for (int r = 0; r < registers; r++) {
      in[r] = first(w.C - n - r * kLanes);
#pragma GCC unroll 8
      for (int o = 0; o < outputs; o++) sums[o][r] = w.bias ? load(in[r], w.bias + n + r * kLanes) : all(0.0f);
    }
    for (int64_t i = rows.from; i < rows.to; i++)
      for (int64_t j = columns.from; j < columns.to; j++) {
        const float* weight = w.weight + (i * w.kernel_width + j) * w.C + n;
        const float* x = image + (i * w.down * w.W + j * w.across) * w.C + n;
#pragma GCC unroll 4
        for (int r = 0; r < registers; r++) {
          const Floats factor = load(in[r], weight + r * kLanes);
          const float* at = x + r * kLanes;
#pragma GCC unroll 8
          for (int o = 0; o < outputs; o++, at += step) sums[o][r] = fma(load(in[r], at), factor, sums[o][r]);
        }
      }
#pragma GCC unroll 8
    for (int o = 0; o < outputs; o++)
#pragma GCC unroll 4
      for (int r = 0; r < registers; r++)
        store(in[r], y + o * w.C + n + r * kLanes, kind == kNone ? sums[o][r] : function(sums[o][r]));
  }
}

template <int64_t kind>
void depthwise(const Image& w, int64_t batch, float* y) {
  const int64_t lines = batch * w.out_height;
  // outputs whose windows lie inside from the left to the right: from the first to before the last
  const int64_t reach = (w.kernel_width - 1) * w.across + 1;
  const int64_t from = std::min((w.left + w.stride_width - 1) / w.stride_width, w.out_width);
  const int64_t until = w.W + w.left < reach ? 0 : std::min((w.W + w.left - reach) / w.stride_width + 1, w.out_width);
  const auto line = [&](int64_t r) {
    const int64_t top = r % w.out_height * w.stride_height - w.top;
    const Inside rows(top, w.down, w.kernel_height, w.H);
    const float* image = w.x + (r / w.out_height * w.H + top) * w.W * w.C;
    for (int64_t o = 0; o < w.out_width;) {
      const int64_t left = o * w.stride_width - w.left, beside = o < from ? 1 : until - o;
      const Inside columns(left, w.across, w.kernel_width, w.W);
      const auto next = [&](auto count) {
        pixels<kind, count()>(w, image + left * w.C, rows, columns, y + (r * w.out_width + o) * w.C);
        o += count;
      };
      if (beside >= 8) next(std::integral_constant<int64_t, 8>());
      else if (beside >= 4) next(std::integral_constant<int64_t, 4>());
      else if (beside >= 2) next(std::integral_constant<int64_t, 2>());
      else next(std::integral_constant<int64_t, 1>());
    }
  };
  run(0, lines, lines * w.out_width * w.C * w.kernel_height * w.kernel_width, [](int64_t) {}, each(line));
}

// False where there is no such activation.
bool depthwise(const Image& w, int64_t batch, float* y, int64_t activation) {
  const auto run = [&](auto kind) { depthwise<decltype(kind)::value>(w, batch, y); };
  if (activation != kNone) return with_activation(activation, run);
  run(std::integral_constant<int64_t, kNone>());
  return true;
}

}  // namespace

extern "C" __attribute__((visibility("hidden"))) AOTITorchError aoti_torch_cpu_depthwise(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, int64_t kernel_height, int64_t kernel_width,
    int64_t stride_height, int64_t stride_width, int64_t top, int64_t left, int64_t bottom, int64_t right,
    int64_t dilation_height, int64_t dilation_width, int64_t activation, AtenTensorHandle* out) {
  Image w{nullptr, nullptr, nullptr, 0, 0, 0, 0, 0, kernel_height, kernel_width, stride_height, stride_width, top, left,
          dilation_height, dilation_width};
  int64_t dims, *sizes;
  if (data(weight, &w.weight) || (bias && data(*bias, &w.bias))) return AOTI_TORCH_FAILURE;
  if (rows(x, &w.x, &dims, &sizes) || dims != 4) return AOTI_TORCH_FAILURE;
  w.H = sizes[1], w.W = sizes[2], w.C = sizes[3];
  const int64_t batch = sizes[0];
  const int64_t down = w.H + top + bottom - (kernel_height - 1) * dilation_height - 1;
  const int64_t across = w.W + left + right - (kernel_width - 1) * dilation_width - 1;
  if (down < 0 || across < 0) return AOTI_TORCH_FAILURE;  // smaller than a window
  w.out_height = down / stride_height + 1, w.out_width = across / stride_width + 1;
  const int64_t shape[] = {batch, w.out_height, w.out_width, w.C};
  float* y;
  if (AOTITorchError error = allocate(4, shape, out, &y)) return error;
  return depthwise(w, batch, y, activation) ? AOTI_TORCH_SUCCESS : AOTI_TORCH_FAILURE;
}

#endif
