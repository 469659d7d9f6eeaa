// y[M, N] = x[M, K] @ w[N, K].T + bias + residual[M, N] in float32, and an activation of it. Each output is one sum, from
// the first input to the last, in fused multiply-adds: a row's result depends neither on the other rows nor on the number of
// threads.
//
// Weights come in tiles of 32 channels, [ceil(N/32), K, 32], padded with zeros: the order in which they are multiplied, so
// that few rows, which wait for the weights, read memory from front to back.

#include <array>
#include <utility>

#include "activation.h"
#include "shim.h"

#ifdef LANES

namespace {

constexpr int64_t kChannels = 32;                           // of a tile
constexpr int64_t kColumns = 2 * kLanes;                    // of a block of sums, in two registers
constexpr int kMost = kLanes == 16 ? 12 : 6;                // rows of a block: there are 32 registers, or 16
constexpr int64_t kWays = 8, kPage = 4096 / sizeof(float);  // of the first cache; rows so far apart share its places
constexpr int64_t kCopied = 1 << 24;                        // floats, at most, that are copied for that reason
constexpr int64_t kNear = 1 << 16;                          // floats of rows that stay in the second cache

struct Rest {  // of an output, from its first channel on: what is added to sums, where there is any, and their limits
  const float *bias, *residual;
  float least = -INFINITY, most = INFINITY;

  Rest at(int64_t m, int64_t n, int64_t N) const {
    return {bias ? bias + n : nullptr, residual ? residual + m * N + n : nullptr, least, most};
  }
};

// M rows by the channels of `registers` of a row of a tile.
template <int M, int registers>
void block(const float* x, int64_t stride, int64_t K, const float* w, const Rest& rest, float* y, int64_t N,
           int64_t channels) {
  Floats sums[M][registers];
  for (int i = 0; i < M; i++)
    for (int j = 0; j < registers; j++) sums[i][j] = all(0.0f);
  for (int64_t k = 0; k < K; k++, w += kChannels) {
    Floats weights[registers];
    for (int j = 0; j < registers; j++) weights[j] = load(w + j * kLanes);
    for (int i = 0; i < M; i++) {
      const Floats input = all(x[i * stride + k]);
      for (int j = 0; j < registers; j++) sums[i][j] = fma(input, weights[j], sums[i][j]);
    }
  }
  for (int64_t j = 0; j < registers; j++) {
    const int64_t n = j * kLanes;
    const Lanes in = first(channels - n);
    const Floats start = rest.bias ? load(in, rest.bias + n) : all(0.0f);
    const Floats least = all(rest.least), most = all(rest.most);
    for (int i = 0; i < M; i++) {
      Floats sum = sums[i][j] + start;
      if (rest.residual) sum = sum + load(in, rest.residual + i * N + n);
      store(in, y + i * N + n, min(most, max(least, sum)));  // of a NaN, the second
    }
  }
}

using Block = decltype(&block<1, 1>);
template <int registers, int... M>
constexpr std::array<Block, sizeof...(M)> blocks(std::integer_sequence<int, M...>) {
  return {block<M + 1, registers>...};
}
constexpr std::array<Block, kMost> kBlocks[2] = {  // of 1 to kMost rows, and of one register or two
    blocks<1>(std::make_integer_sequence<int, kMost>()), blocks<2>(std::make_integer_sequence<int, kMost>())};

constexpr int64_t kNone = -1;  // in the place of an Activation

template <int64_t kind>
void activate(float* y, int64_t count, int64_t N, int64_t channels) {
  const Activate<kind> function;
  for (int64_t n = 0; n < std::min(channels, kColumns); n += kLanes) {
    const Lanes in = first(channels - n);
    for (int64_t i = 0; i < count; i++) store(in, y + i * N + n, function(load(in, y + i * N + n)));
  }
}

// Into how many groups of blocks of rows the work on a tile of channels is divided, so that threads have enough of it.
inline int64_t groups_of(int64_t tiles, int64_t blocks) {
#ifdef _OPENMP
  const int64_t enough = 4 * omp_get_max_threads();
  if (enough > 4 && 0 < tiles && tiles < enough && blocks) return std::min(blocks, (enough + tiles - 1) / tiles);
#endif
  return 1;
}

template <int64_t kind>
void linear(const float* x, const float* w, const Rest& rest, float* y, int64_t M, int64_t N, int64_t K) {
  const int64_t tiles = (N + kChannels - 1) / kChannels, parts = (M + kMost - 1) / kMost;
  // all rows by a tile of weights after the other, or, where less is read so, groups of rows by all weights
  const int64_t near = std::max<int64_t>(1, kNear / std::max<int64_t>(K, 1) / kMost), many = (parts + near - 1) / near;
  const bool by_rows = many > 1 && many * N < (tiles - 1) * M;
  const int64_t groups = std::max(groups_of(tiles, parts), by_rows ? many : 1);
  static thread_local Buffer<float> scratch;
  Buffer<float>& copy = scratch;  // of this thread: in the others of a team the name means their own
  const bool apart = K % kPage == 0 && M > kWays && M * K <= kCopied;
  const int64_t stride = apart ? K + 16 : K;
  if (apart) copy.grow(M * stride);
  const float* rows = apart ? copy.data() : x;
  run(
      M, tiles * groups, sizeof(float) * work(M, N * K),
      [&](int64_t m) {
        if (apart) std::memcpy(copy.data() + m * stride, x + m * K, K * sizeof(float));
      },
      each([&](int64_t task) {
        const int64_t t = by_rows ? task % tiles : task / groups, group = by_rows ? task / tiles : task % groups;
        for (int64_t part = parts * group / groups; part < parts * (group + 1) / groups; part++) {
          const int64_t m = M * part / parts, count = M * (part + 1) / parts - m;
          for (int64_t n = t * kChannels, c = 0; c < kChannels && n + c < N; c += kColumns) {
            const int64_t left = N - n - c;
            float* out = y + m * N + n + c;
            const Block block = kBlocks[left > kLanes][count - 1];
            block(rows + m * stride, stride, K, w + t * K * kChannels + c, rest.at(m, n + c, N), out, N, left);
            if constexpr (kind != kNone) activate<kind>(out, count, N, left);
          }
        }
      }));
}

// False where there is no such activation.
bool linear(const float* x, const float* w, const float* bias, const float* residual, float* y, int64_t M, int64_t N,
            int64_t K, int64_t activation) {
  const auto limited = [&](float least, float most) {
    linear<kNone>(x, w, {bias, residual, least, most}, y, M, N, K);
  };
  switch (activation) {  // those that are limits cost nothing
    case kNone: limited(-INFINITY, INFINITY); return true;
    case kRelu: limited(0.0f, INFINITY); return true;
    case kRelu6: limited(0.0f, 6.0f); return true;
    case kGelu: linear<kGelu>(x, w, {bias, residual}, y, M, N, K); return true;
    case kGeluTanh: linear<kGeluTanh>(x, w, {bias, residual}, y, M, N, K); return true;
    case kSilu: linear<kSilu>(x, w, {bias, residual}, y, M, N, K); return true;
    default: return false;
  }
}

}  // namespace

extern "C" __attribute__((visibility("hidden"))) AOTITorchError aoti_torch_cpu_linear_tiled(
    AtenTensorHandle x, AtenTensorHandle tiles, AtenTensorHandle* bias, AtenTensorHandle* residual, int64_t channels,
    int64_t activation, AtenTensorHandle* out) {
  Call<float> call;
  const float *w, *b = nullptr, *more = nullptr;
  int64_t dims, *sizes;
  if (data(tiles, &w) || (bias && data(*bias, &b))) return AOTI_TORCH_FAILURE;
  if (residual && rows(*residual, &more, &dims, &sizes)) return AOTI_TORCH_FAILURE;
  if (AOTITorchError error = open(x, channels, out, &call)) return error;
  return linear(call.x, w, b, more, call.y, call.M, call.N, call.K, activation) ? AOTI_TORCH_SUCCESS : AOTI_TORCH_FAILURE;
}

#endif
