// y[M, N] = float(codes[M, K] @ w[N, K].T + start[N]) * scale[N] + bias[N]: uint8 activations with one scale and zero
// point a layer, int8 weights with one scale an output channel; linear layers, and convolutions of [B, H, W, C]. Mean
// what the references of the same names in lightning_accel.quantize.static mean, bit by bit: int32 sums and the same
// order of float operations. A convolution copies the windows of a block of outputs into rows that stay in the cache.

#include "static.h"

namespace {

struct Windows {  // a row for each output of a convolution: the inputs in its window, in the order [kh, kw, C]
  const uint8_t* codes;
  int64_t H, W, C, out_height, out_width;
  int64_t zero, kernel_height, kernel_width, stride_height, stride_width, top, left, down, across;

  int64_t in_place() const { return 0; }
  void copy_rows(int64_t m, int64_t count, uint8_t* to, int64_t stride) const {
    while (count > 0) {  // outputs beside each other
      const int64_t ox = m % out_width, oy = m / out_width % out_height, b = m / out_width / out_height;
      const int64_t n = std::min(count, out_width - ox);
      for (int64_t i = 0; i < kernel_height; i++) {
        const int64_t y = oy * stride_height - top + i * down;
        uint8_t* row = to + i * kernel_width * C;
        if (y >= 0 && y < H) copy_row(codes + (b * H + y) * W * C, ox, n, row, stride);
        else for (int64_t o = 0; o < n; o++) std::memset(row + o * stride, static_cast<int>(zero), kernel_width * C);
      }
      m += n, count -= n, to += n * stride;
    }
  }

 private:
  // A row of the windows of n outputs, from a line of the image.
  void copy_row(const uint8_t* line, int64_t ox, int64_t n, uint8_t* to, int64_t stride) const {
    // of those windows that lie inside, a row is one piece
    int64_t from = (left + stride_width - 1) / stride_width - ox, until = W + left - kernel_width;
    until = until < 0 || across != 1 ? 0 : until / stride_width + 1 - ox;
    from = std::min(std::max<int64_t>(from, 0), n), until = std::min(std::max(until, from), n);
    for (int64_t o = 0; o < from; o++) copy_pixels(line, (ox + o) * stride_width - left, to + o * stride);
    if (from < until)
      copy(to + from * stride, stride, line + ((ox + from) * stride_width - left) * C, stride_width * C,
           kernel_width * C, until - from);
    for (int64_t o = until; o < n; o++) copy_pixels(line, (ox + o) * stride_width - left, to + o * stride);
  }
  void copy_pixels(const uint8_t* line, int64_t x, uint8_t* to) const {
    for (int64_t j = 0; j < kernel_width; j++, x += across, to += C) {
      if (x >= 0 && x < W) copy(to, 0, line + x * C, 0, C, 1);
      else std::memset(to, static_cast<int>(zero), C);
    }
  }
};

inline int64_t threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

constexpr int64_t kBlockBytes = 1 << 17;  // of the rows that one task copies and multiplies: they stay in the cache

template <class Source>
void multiply(const Source& source, int64_t M, const Weights& w, float* y) {
  const int64_t K4 = (w.K + kCols - 1) / kCols, tiles = (w.N + kRows - 1) / kRows, stride = ((w.K + 63) / 64 | 1) * 64;
  const int64_t panels = (tiles + kPanel - 1) / kPanel, whole = source.in_place();
  const auto products = [&](const uint8_t* codes, int64_t ld, int64_t m, int64_t count, int64_t from, int64_t to) {
    const int64_t t = from * kPanel;
    product<true>({reinterpret_cast<const int8_t*>(codes), ld}, count, w.tiles + t * K4 * kTile, K4,
                  std::min(to * kPanel, tiles) - t, t * kRows, w.N - t * kRows, Scaled{{w}, y + m * w.N});
  };
  static thread_local Buffer<uint8_t> scratch;
  const int64_t share = (M + threads() - 1) / threads() + 31;  // of a thread, to be rounded down to a multiple of 32
  const int64_t most = std::max<int64_t>(32, std::min({int64_t{256}, kBlockBytes / stride, share}) / 32 * 32);
  const int64_t blocks = (M + most - 1) / most;
  if (panels >= blocks) {  // few rows: all of them, then panels of channels
    const int64_t left = M - whole;
    Buffer<uint8_t>& rows = scratch;  // of this thread: in the others of a team the name means their own
    rows.grow((left + 15) / 16 * 16 * stride);
    run(
        (left + 15) / 16, panels, M * w.N * w.K,
        [&](int64_t i) {
          source.copy_rows(whole + i * 16, std::min<int64_t>(16, left - i * 16), rows.data() + i * 16 * stride, stride);
        },
        [&](int64_t from, int64_t to) {
          if (whole) products(source.codes, w.K, 0, whole, from, to);
          if (left) products(rows.data(), stride, whole, left, from, to);
        });
    return;
  }
  const auto block = [&](int64_t b) {
    const int64_t m = b * most, count = std::min(most, M - m);
    const uint8_t* codes = source.codes + m * w.K;
    int64_t ld = w.K;
    if (m + count > whole) {
      scratch.grow(most * stride);
      source.copy_rows(m, count, scratch.data(), stride);
      codes = scratch.data(), ld = stride;
    }
    products(codes, ld, m, count, 0, panels);
  };
  run(0, blocks, M * w.N * w.K, [](int64_t) {}, each(block));
}

void linear(const uint8_t* codes, int64_t M, const Weights& w, float* y) {
  multiply(Matrix{codes, M, w.K}, M, w, y);
}

void conv2d(const Windows& x, int64_t batch, const Weights& w, float* y) {
  const int64_t M = batch * x.out_height * x.out_width;
  const bool pixels = x.kernel_height * x.kernel_width * x.stride_height * x.stride_width == 1 && !x.top && !x.left;
  pixels ? linear(x.codes, M, w, y) : multiply(x, M, w, y);
}

}  // namespace

#define LIGHTNING_ACCEL_EXPORT extern "C" __attribute__((visibility("hidden")))

LIGHTNING_ACCEL_EXPORT AOTITorchError aoti_torch_cpu_int8_static_linear_tiled(
    AtenTensorHandle codes, AtenTensorHandle tiles, AtenTensorHandle start, AtenTensorHandle scale,
    AtenTensorHandle bias, AtenTensorHandle* out) {
  Call<uint8_t> call;
  Weights w;
  if (open(tiles, start, scale, bias, &w)) return AOTI_TORCH_FAILURE;
  if (AOTITorchError error = open(codes, scale, out, &call)) return error;
  w.K = call.K;
  linear(call.x, call.M, w, call.y);
  return AOTI_TORCH_SUCCESS;
}

LIGHTNING_ACCEL_EXPORT AOTITorchError aoti_torch_cpu_int8_static_conv2d_tiled(
    AtenTensorHandle codes, AtenTensorHandle tiles, AtenTensorHandle start, AtenTensorHandle scale,
    AtenTensorHandle bias, int64_t zero_point, int64_t kernel_height, int64_t kernel_width, int64_t stride_height,
    int64_t stride_width, int64_t padding_height, int64_t padding_width, int64_t dilation_height,
    int64_t dilation_width, AtenTensorHandle* out) {
  const uint8_t* x;
  int64_t dims, *sizes;
  Weights w;
  if (open(tiles, start, scale, bias, &w) || rows(codes, &x, &dims, &sizes) || dims != 4) return AOTI_TORCH_FAILURE;
  const int64_t batch = sizes[0], H = sizes[1], W = sizes[2], C = sizes[3];
  const int64_t down = H + 2 * padding_height - (kernel_height - 1) * dilation_height - 1;
  const int64_t across = W + 2 * padding_width - (kernel_width - 1) * dilation_width - 1;
  if (down < 0 || across < 0) return AOTI_TORCH_FAILURE;  // smaller than a window
  const int64_t out_height = down / stride_height + 1, out_width = across / stride_width + 1;
  const int64_t shape[] = {batch, out_height, out_width, w.N};
  float* y;
  if (AOTITorchError error = allocate(4, shape, out, &y)) return error;
  w.K = kernel_height * kernel_width * C;
  conv2d({x, H, W, C, out_height, out_width, zero_point, kernel_height, kernel_width, stride_height, stride_width,
          padding_height, padding_width, dilation_height, dilation_width},
         batch, w, y);
  return AOTI_TORCH_SUCCESS;
}
