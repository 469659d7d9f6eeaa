// y = int8_linear(activate(int8_linear(x))): two layers of lightning_accel.quantize.ops.int8_linear_reference with an
// activation between them. Rows go through in blocks whose hidden activations stay in the cache; one after the other the
// two layers would write and read them five times through memory. The products are bit by bit those of int8_linear, and
// activations within the bound of activation.h.

#include "activation.h"
#include "rows.h"
#include "shim.h"

namespace {

struct Layer {
  const int8_t* tiles;
  const float *scale, *bias;
  int64_t N, K;
};

template <int64_t kind>
struct Activated {  // the epilogue of the first product; the largest magnitudes of a row come in 16 parts
  Dequantize value;
  float* hidden;
  int64_t ld;
  int32_t* most;  // [M, 16]

  int32_t start(int64_t m) const { return value.starts[m]; }

#ifdef VNNI
  struct Column {
    Dequantize::Column value;
    float* hidden;
    int64_t ld;
    int32_t* most;
    Activate<kind> activate;

    void store(int64_t m, __m512i sums) const {  // past the last channel sums, scale and bias are 0, and so is the output
      const __m512 out = activate(value(m, sums));
      _mm512_storeu_ps(hidden + m * ld, out);
      _mm512_store_si512(most + m * 16, larger(_mm512_load_si512(most + m * 16), out));
    }
  };
  Column at(int64_t n, int64_t count) const { return {value.at(n, first(count)), hidden + n, ld, most, {}}; }
#else
  void store(int64_t m, int64_t n, int64_t count, const int32_t* sums) const {
    for (int64_t i = 0; i < std::min(count, kRows); i++) {
      const float out = Activate<kind>()(value(m, n + i, sums[i]));
      hidden[m * ld + n + i] = out;
      most[m * 16 + i] = larger(most[m * 16 + i], out);
    }
  }
#endif
};

struct Scratch {  // of a block of rows
  Rows in, between;
  Buffer<float> hidden;  // [M, ld]
  Buffer<int32_t> most;  // [threads, M, 16]
  int64_t ld = 0;

  void resize(int64_t M, int64_t threads, const Layer& first, const Layer& second) {
    ld = ((first.N + 15) / 16 | 1) * 16;  // an odd number of cache lines
    in.resize(M, first.K);
    between.resize(M, second.K);
    hidden.grow(M * ld);
    most.grow(threads * M * 16);
  }
  float top(int64_t m, int64_t M, int64_t threads) const {
    int32_t top = 0;
    for (int64_t t = 0; t < threads; t++)
      for (int64_t i = 0; i < 16; i++) top = std::max(top, most[(t * M + m) * 16 + i]);
    return as_float(top);
  }
};

// A thread's share of the channels of a layer.
template <class Out>
void channels(const Rows& rows, int64_t M, const Layer& layer, int64_t thread, int64_t threads, const Out& out) {
  const int64_t K4 = (layer.K + kCols - 1) / kCols, tiles = (layer.N + kRows - 1) / kRows;
  const int64_t pairs = (tiles + 1) / 2, t = pairs * thread / threads * 2;
  const int64_t end = std::min(tiles, pairs * (thread + 1) / threads * 2);
  product<false>({rows.codes.data(), rows.stride}, M, layer.tiles + t * K4 * kTile, K4, end - t, t * kRows,
                 layer.N - t * kRows, out);
}

// What one of the threads that share a block of rows does; each waits for all at a barrier.
template <int64_t kind, class Barrier>
void block(const float* x, int64_t M, const Layer& first, const Layer& second, float* y, Scratch& s, int64_t thread,
           int64_t threads, const Barrier& barrier) {
  for (int64_t m = thread; m < M; m += threads) s.in.quantize(x, first.K, m);
  int32_t* most = s.most.data() + thread * M * 16;
  std::fill(most, most + M * 16, 0);
  barrier();
  channels(s.in, M, first, thread, threads,
           Activated<kind>{{s.in.start.data(), s.in.scale.data(), first.scale, first.bias}, s.hidden.data(), s.ld, most});
  barrier();
  for (int64_t m = thread; m < M; m += threads)
    s.between.convert(s.hidden.data() + m * s.ld, second.K, m, s.top(m, M, threads));
  barrier();
  channels(s.between, M, second, thread, threads,
           Dequantized{{s.between.start.data(), s.between.scale.data(), second.scale, second.bias}, y, second.N});
}

constexpr int64_t kMostRows = 128, kHiddenBytes = 3 << 19;  // of a block

template <int64_t kind>
void feed_forward(const float* x, int64_t M, const Layer& first, const Layer& second, float* y) {
  static thread_local Scratch scratch;
  int64_t threads = 1;
#ifdef _OPENMP
  if (M * first.N * (first.K + second.N) >= 2 * kParallel) threads = omp_get_max_threads();
#endif
  const int64_t fit = std::min(kMostRows, kHiddenBytes / (4 * std::max<int64_t>(first.N, 1))) / 32 * 32;
  const int64_t most = std::max<int64_t>(32, std::min(fit, ((M + threads - 1) / threads + 31) / 32 * 32));
  const int64_t blocks = (M + most - 1) / most;
  const auto alone = [&](int64_t b) {
    const int64_t m = b * most, count = std::min(most, M - m);
    scratch.resize(count, 1, first, second);
    block<kind>(x + m * first.K, count, first, second, y + m * second.N, scratch, 0, 1, [] {});
  };
  if (threads == 1) {
    for (int64_t b = 0; b < blocks; b++) alone(b);
    return;
  }
#ifdef _OPENMP
  if (blocks >= threads) {
#pragma omp parallel for
    for (int64_t b = 0; b < blocks; b++) alone(b);
    return;
  }
  Scratch& shared = scratch;  // of this thread: in the others of a team the name means their own
  shared.resize(M, threads, first, second);
#pragma omp parallel
  block<kind>(x, M, first, second, y, shared, omp_get_thread_num(), omp_get_num_threads(), [] {
#pragma omp barrier
  });
#endif
}

AOTITorchError open(AtenTensorHandle tiles, AtenTensorHandle scale, AtenTensorHandle* bias, int64_t K, Layer* layer) {
  int64_t* n;
  layer->bias = nullptr;
  if (data(tiles, &layer->tiles) || data(scale, &layer->scale) || (bias && data(*bias, &layer->bias)))
    return AOTI_TORCH_FAILURE;
  if (aoti_torch_get_sizes(scale, &n)) return AOTI_TORCH_FAILURE;
  layer->N = n[0], layer->K = K;
  return AOTI_TORCH_SUCCESS;
}

}  // namespace

extern "C" __attribute__((visibility("hidden"))) AOTITorchError aoti_torch_cpu_int8_feed_forward(
    AtenTensorHandle x, AtenTensorHandle tiles, AtenTensorHandle scale, AtenTensorHandle* bias, AtenTensorHandle tiles_2,
    AtenTensorHandle scale_2, AtenTensorHandle* bias_2, int64_t activation, AtenTensorHandle* out) {
  Call<float> call;
  Layer first, second;
  if (AOTITorchError error = open(x, scale_2, out, &call)) return error;
  if (open(tiles, scale, bias, call.K, &first) || open(tiles_2, scale_2, bias_2, first.N, &second))
    return AOTI_TORCH_FAILURE;
  const bool known = with_activation(activation, [&](auto kind) {
    feed_forward<decltype(kind)::value>(call.x, call.M, first, second, call.y);
  });
  return known ? AOTI_TORCH_SUCCESS : AOTI_TORCH_FAILURE;
}
