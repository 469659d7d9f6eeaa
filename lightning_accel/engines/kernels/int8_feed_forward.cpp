// y = int8_linear(activate(int8_linear(x))): two layers of lightning_accel.quantize.ops.int8_linear_reference with an
// activation between them; in a gated block the outputs of a third layer of x are a factor of it. Rows go through in blocks whose hidden activations stay in the cache; one after the other the
// two layers would write and read them five times through memory. The products are bit by bit those of int8_linear, and
// activations within the bound of activation.h.

#include "activation.h"
#include "blocks.h"
#include "rows.h"
#include "shim.h"

namespace {

struct Layer {
  const int8_t* tiles;
  const float *scale, *bias;
  int64_t N, K;
};

constexpr int64_t kTimes = -2;  // in the place of an Activation: what is there is multiplied

template <int64_t kind>
struct Between {  // of a value of the first product
  Activate<kind> activate;

#ifdef LANES
  Floats operator()(Floats x, const float*) const { return activate(x); }
#else
  float operator()(float x, const float*) const { return activate(x); }
#endif
};
template <>
struct Between<kTimes> {
#ifdef LANES
  Floats operator()(Floats x, const float* hidden) const { return load(hidden) * x; }
#else
  float operator()(float x, const float* hidden) const { return *hidden * x; }
#endif
};

template <int64_t kind>
struct Activated {  // the epilogue of the first product; the largest magnitudes of a row come in 16 parts
  Dequantize value;
  float* hidden;
  int64_t ld;
  int32_t* most;  // [M, 16]

  int32_t start(int64_t m) const { return value.starts[m]; }

#ifdef LANES
  struct Column {
    Dequantize::Column value;
    float* hidden;
    int64_t ld;
    int32_t* most;
    Between<kind> between;

    void store(int64_t m, Ints sums) const {  // past the last channel sums, scale and bias are 0, and so is the output
      const Floats out = between(value(m, sums), hidden + m * ld);
      ::store(hidden + m * ld, out);
      ::store(most + m * 16, larger(load(most + m * 16), out));
    }
  };
  Column at(int64_t n, int64_t count) const { return {value.at(n, first(count)), hidden + n, ld, most, {}}; }

#ifdef VNNI
  static constexpr bool kTakesRows = true;  // a row's largest magnitudes are written once
  template <int N>
  void store_row(int64_t m, int64_t n, int64_t count, const Ints* sums) const {
    const Between<kind> between;
    Ints top = load(most + m * 16);
    for (int i = 0; i < N; i++) {  // as Column::store
      const int64_t from = n + i * kRows;
      float* at = hidden + m * ld + from;
      const Floats out = between(value.at(from, first(count - i * kRows))(m, sums[i]), at);
      ::store(at, out);
      top = larger(top, out);
    }
    ::store(most + m * 16, top);
  }
#endif
#else
  void store(int64_t m, int64_t n, int64_t count, const int32_t* sums) const {
    for (int64_t i = 0; i < std::min(count, kRows); i++) {
      float* at = hidden + m * ld + n + i;
      const float out = *at = Between<kind>()(value(m, n + i, sums[i]), at);
      most[m * 16 + i] = larger(most[m * 16 + i], out);
    }
  }
#endif
};

struct Scratch {  // of a block of rows
  Rows in, between;
  Buffer<float> hidden;  // [M, ld]
  Buffer<int32_t> most;  // [threads, M, 16]

  float top(int64_t m, int64_t M, int64_t threads) const {
    int32_t top = 0;
    for (int64_t t = 0; t < threads; t++)
      for (int64_t i = 0; i < 16; i++) top = std::max(top, most[(t * M + m) * 16 + i]);
    return as_float(top);
  }
};

constexpr int64_t kHiddenBytes = 3 << 19;  // of a block

// Without a gate, `up` has no tiles.
template <int64_t kind>
void feed_forward(const float* x, int64_t M, const Layer& first, const Layer& up, const Layer& second, float* y) {
  const int64_t ld = ((first.N + 15) / 16 | 1) * 16;  // an odd number of cache lines
  const auto resize = [&](Scratch& s, int64_t count, int64_t threads) {
    s.in.resize(count, first.K);
    s.between.resize(count, second.K);
    s.hidden.grow(count * ld);
    s.most.grow(threads * count * 16);
  };
  const auto block = [&](int64_t begin, int64_t count, Scratch& s, int64_t thread, int64_t threads, auto barrier) {
    for (int64_t m = thread; m < count; m += threads) s.in.quantize(x + begin * first.K, first.K, m);
    int32_t* most = s.most.data() + thread * count * 16;
    std::fill(most, most + count * 16, 0);
    barrier();
    const Codes codes{s.in.codes.data(), s.in.stride};
    const auto sums = [&](const Layer& of) -> Dequantize {
      return {s.in.start.data(), s.in.scale.data(), of.scale, of.bias};
    };
    channels<false>(codes, count, first, thread, threads, Activated<kind>{sums(first), s.hidden.data(), ld, most});
    if (up.tiles) {  // of the same channels
      std::fill(most, most + count * 16, 0);
      channels<false>(codes, count, up, thread, threads, Activated<kTimes>{sums(up), s.hidden.data(), ld, most});
    }
    barrier();
    for (int64_t m = thread; m < count; m += threads)
      s.between.convert(s.hidden.data() + m * ld, second.K, m, s.top(m, count, threads));
    barrier();
    const Dequantize sums_2{s.between.start.data(), s.between.scale.data(), second.scale, second.bias};
    channels<false>({s.between.codes.data(), s.between.stride}, count, second, thread, threads,
                    Dequantized{sums_2, y + begin * second.N, second.N});
  };
  const int64_t weights = first.N * (first.K + (up.tiles ? up.K : 0) + second.N);
  in_blocks<Scratch>(M, kHiddenBytes / (4 * ld), work(M, weights), resize, block);
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

AOTITorchError feed_forward(AtenTensorHandle x, const Layer& first, const Layer& up, const Layer& second,
                            AtenTensorHandle scale, int64_t activation, AtenTensorHandle* out) {
  Call<float> call;
  if (AOTITorchError error = open(x, scale, out, &call)) return error;
  const bool known = with_activation(activation, [&](auto kind) {
    feed_forward<decltype(kind)::value>(call.x, call.M, first, up, second, call.y);
  });
  return known ? AOTI_TORCH_SUCCESS : AOTI_TORCH_FAILURE;
}

// The last of the sizes of `x`, 0 where it has none.
int64_t inputs(AtenTensorHandle x) {
  int64_t dims, *sizes;
  return aoti_torch_get_dim(x, &dims) || dims < 1 || aoti_torch_get_sizes(x, &sizes) ? 0 : sizes[dims - 1];
}

}  // namespace

#define LIGHTNING_ACCEL_EXPORT extern "C" __attribute__((visibility("hidden")))

LIGHTNING_ACCEL_EXPORT AOTITorchError aoti_torch_cpu_int8_feed_forward(
    AtenTensorHandle x, AtenTensorHandle tiles, AtenTensorHandle scale, AtenTensorHandle* bias, AtenTensorHandle tiles_2,
    AtenTensorHandle scale_2, AtenTensorHandle* bias_2, int64_t activation, AtenTensorHandle* out) {
  Layer first, second;
  if (open(tiles, scale, bias, inputs(x), &first) || open(tiles_2, scale_2, bias_2, first.N, &second))
    return AOTI_TORCH_FAILURE;
  return feed_forward(x, first, Layer{}, second, scale_2, activation, out);
}

LIGHTNING_ACCEL_EXPORT AOTITorchError aoti_torch_cpu_int8_gated_feed_forward(
    AtenTensorHandle x, AtenTensorHandle tiles, AtenTensorHandle scale, AtenTensorHandle* bias, AtenTensorHandle up_tiles,
    AtenTensorHandle up_scale, AtenTensorHandle* up_bias, AtenTensorHandle tiles_2, AtenTensorHandle scale_2,
    AtenTensorHandle* bias_2, int64_t activation, AtenTensorHandle* out) {
  Layer first, up, second;
  if (open(tiles, scale, bias, inputs(x), &first) || open(up_tiles, up_scale, up_bias, first.K, &up) || up.N != first.N ||
      open(tiles_2, scale_2, bias_2, first.N, &second))
    return AOTI_TORCH_FAILURE;
  return feed_forward(x, first, up, second, scale_2, activation, out);
}
