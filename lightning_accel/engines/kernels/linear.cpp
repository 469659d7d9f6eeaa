// y[M, N] = x[M, K] @ w[N, K].T + bias in float32, and an activation of it. Each output is one sum, from the first input to
// the last, in fused multiply-adds: a row's result depends neither on the other rows nor on the number of threads.
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

template <int M>
void block(const float* x, int64_t stride, int64_t K, const float* w, const float* bias, float* y, int64_t N,
           int64_t channels) {
  Floats sums[M][2];
  for (int i = 0; i < M; i++) sums[i][0] = sums[i][1] = all(0.0f);
  for (int64_t k = 0; k < K; k++, w += kChannels) {
    const Floats left = load(w), right = load(w + kLanes);
    for (int i = 0; i < M; i++) {
      const Floats input = all(x[i * stride + k]);
      sums[i][0] = fma(input, left, sums[i][0]);
      sums[i][1] = fma(input, right, sums[i][1]);
    }
  }
  for (int64_t j = 0; j < 2; j++) {
    const int64_t n = j * kLanes;
    const Lanes in = first(channels - n);
    const Floats start = bias ? load(in, bias + n) : all(0.0f);
    for (int i = 0; i < M; i++) store(in, y + i * N + n, sums[i][j] + start);
  }
}

using Block = decltype(&block<1>);
template <int... M>
constexpr std::array<Block, sizeof...(M)> blocks(std::integer_sequence<int, M...>) {
  return {block<M + 1>...};
}
constexpr auto kBlocks = blocks(std::make_integer_sequence<int, kMost>());  // of 1 to kMost rows

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
void linear(const float* x, const float* w, const float* bias, float* y, int64_t M, int64_t N, int64_t K) {
  const int64_t tiles = (N + kChannels - 1) / kChannels, parts = (M + kMost - 1) / kMost, groups = groups_of(tiles, parts);
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
        const int64_t t = task / groups, group = task % groups;
        for (int64_t part = parts * group / groups; part < parts * (group + 1) / groups; part++) {
          const int64_t m = M * part / parts, count = M * (part + 1) / parts - m;
          for (int64_t n = t * kChannels, c = 0; c < kChannels && n + c < N; c += kColumns) {
            float* out = y + m * N + n + c;
            kBlocks[count - 1](rows + m * stride, stride, K, w + t * K * kChannels + c, bias ? bias + n + c : nullptr, out,
                               N, N - n - c);
            if constexpr (kind != kNone) activate<kind>(out, count, N, N - n - c);
          }
        }
      }));
}

}  // namespace

extern "C" __attribute__((visibility("hidden"))) AOTITorchError aoti_torch_cpu_linear_tiled(
    AtenTensorHandle x, AtenTensorHandle tiles, AtenTensorHandle* bias, int64_t channels, int64_t activation,
    AtenTensorHandle* out) {
  Call<float> call;
  const float *w, *b = nullptr;
  if (data(tiles, &w) || (bias && data(*bias, &b))) return AOTI_TORCH_FAILURE;
  if (AOTITorchError error = open(x, channels, out, &call)) return error;
  const auto run = [&](auto kind) { linear<decltype(kind)::value>(call.x, w, b, call.y, call.M, call.N, call.K); };
  if (activation == kNone) run(std::integral_constant<int64_t, kNone>());
  else if (!with_activation(activation, run)) return AOTI_TORCH_FAILURE;
  return AOTI_TORCH_SUCCESS;
}

#endif
