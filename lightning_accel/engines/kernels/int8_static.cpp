// y[M, N] = float(codes[M, K] @ w[N, K].T + start[N]) * scale[N] + bias[N]: uint8 activations with one scale and zero
// point a layer, int8 weights with one scale an output channel; linear layers, and convolutions of [B, H, W, C]. Mean
// what the references of the same names in lightning_accel.quantize.static mean, bit by bit: int32 sums and the same
// order of float operations. A convolution copies the windows of a block of outputs into rows that stay in the cache;
// int8_static_depthwise.h has those where each channel is a group.

#include "int8_static_depthwise.h"

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

template <class Source, class Out>
void multiply(const Source& source, int64_t M, const Weights& w, const Out& out) {
  const int64_t K4 = (w.K + kCols - 1) / kCols, tiles = (w.N + kRows - 1) / kRows, stride = ((w.K + 63) / 64 | 1) * 64;
  const int64_t panels = (tiles + kPanel - 1) / kPanel, whole = source.in_place();
  const auto products = [&](const uint8_t* codes, int64_t ld, int64_t m, int64_t count, int64_t from, int64_t to) {
    const int64_t t = from * kPanel;
    product<true>({reinterpret_cast<const int8_t*>(codes), ld}, count, w.tiles + t * K4 * kTile, K4,
                  std::min(to * kPanel, tiles) - t, t * kRows, w.N - t * kRows, out.after(m));
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
        (left + 15) / 16, panels, work(M, w.N * w.K),
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

template <class Out>
void linear(const uint8_t* codes, int64_t M, const Weights& w, const Out& out) {
  multiply(Matrix{codes, M, w.K}, M, w, out);
}

template <class Out>
void conv2d(const Windows& x, int64_t batch, int64_t groups, const Weights& w, const Out& out) {
  const int64_t M = batch * x.out_height * x.out_width;
  if (groups > 1) return depthwise(x, batch, w, out);
  const bool pixels = x.kernel_height * x.kernel_width * x.stride_height * x.stride_width == 1 && M == batch * x.H * x.W;
  pixels ? linear(x.codes, M, w, out) : multiply(x, M, w, out);
}

struct Convolution {
  Windows x;
  Weights w;
  int64_t batch, groups, shape[4];  // of the output
};

// Checks the inputs of a convolution and finds the shape of its output.
AOTITorchError open(AtenTensorHandle codes, AtenTensorHandle tiles, AtenTensorHandle start, AtenTensorHandle scale,
                    AtenTensorHandle bias, int64_t bottom, int64_t right, Convolution* conv) {
  int64_t dims, *sizes;
  Windows& x = conv->x;
  Weights& w = conv->w;
  if (open(tiles, start, scale, bias, &w) || rows(codes, &x.codes, &dims, &sizes) || dims != 4) return AOTI_TORCH_FAILURE;
  conv->batch = sizes[0], x.H = sizes[1], x.W = sizes[2], x.C = sizes[3];
  const int64_t down = x.H + x.top + bottom - (x.kernel_height - 1) * x.down - 1;
  const int64_t across = x.W + x.left + right - (x.kernel_width - 1) * x.across - 1;
  if (conv->groups > 1 && (conv->groups != x.C || conv->groups != w.N)) return AOTI_TORCH_FAILURE;  // not depthwise
  if (down < 0 || across < 0) return AOTI_TORCH_FAILURE;  // smaller than a window
  x.out_height = down / x.stride_height + 1, x.out_width = across / x.stride_width + 1;
  const int64_t shape[] = {conv->batch, x.out_height, x.out_width, w.N};
  std::copy(shape, shape + 4, conv->shape);
  w.K = x.kernel_height * x.kernel_width * x.C / conv->groups;
  return AOTI_TORCH_SUCCESS;
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
  linear(call.x, call.M, w, Scaled{{w}, call.y});
  return AOTI_TORCH_SUCCESS;
}

#define CONVOLUTION \
  AtenTensorHandle codes, AtenTensorHandle tiles, AtenTensorHandle start, AtenTensorHandle scale, AtenTensorHandle bias, \
      int64_t zero_point, int64_t kernel_height, int64_t kernel_width, int64_t stride_height, int64_t stride_width, \
      int64_t top, int64_t left, int64_t bottom, int64_t right, int64_t dilation_height, int64_t dilation_width, \
      int64_t groups
#define OPEN_CONVOLUTION(conv) \
  Convolution conv{}; \
  conv.x = {nullptr, 0, 0, 0, 0, 0, zero_point, kernel_height, kernel_width, stride_height, stride_width, top, left, \
            dilation_height, dilation_width}; \
  conv.groups = groups; \
  if (open(codes, tiles, start, scale, bias, bottom, right, &conv)) return AOTI_TORCH_FAILURE

LIGHTNING_ACCEL_EXPORT AOTITorchError aoti_torch_cpu_int8_static_conv2d_tiled(CONVOLUTION, AtenTensorHandle* out) {
  OPEN_CONVOLUTION(conv);
  float* y;
  if (AOTITorchError error = allocate(4, conv.shape, out, &y)) return error;
  conv2d(conv.x, conv.batch, groups, conv.w, Scaled{{conv.w}, y});
  return AOTI_TORCH_SUCCESS;
}

LIGHTNING_ACCEL_EXPORT AOTITorchError aoti_torch_cpu_int8_static_conv2d_coded(
    CONVOLUTION, double factor, int64_t zero, int64_t least, int64_t most, AtenTensorHandle* out) {
  OPEN_CONVOLUTION(conv);
  uint8_t* y;
  if (AOTITorchError error = allocate(4, conv.shape, out, &y)) return error;
  const Affine as{static_cast<float>(factor), static_cast<int32_t>(zero), static_cast<int32_t>(least),
                  static_cast<int32_t>(most)};
  conv2d(conv.x, conv.batch, groups, conv.w, Coded{{conv.w}, as, y});
  return AOTI_TORCH_SUCCESS;
}
