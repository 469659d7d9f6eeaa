// y = int8_linear(activate(int8_linear(x))): two layers of lightning_accel.quantize.ops.int8_linear_reference with an
// activation between them. Rows go through in blocks whose hidden activations stay in the cache; one after the other the
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
    Activate<kind> activate;

    void store(int64_t m, Ints sums) const {  // past the last channel sums, scale and bias are 0, and so is the output
      const Floats out = activate(value(m, sums));
      ::store(hidden + m * ld, out);
      ::store(most + m * 16, larger(load(most + m * 16), out));
    }
  };
  Column at(int64_t n, int64_t count) const { return {value.at(n, first(count)), hidden + n, ld, most, {}}; }

#ifdef VNNI
  static constexpr bool kTakesRows = true;  // a row's largest magnitudes are written once
  template <int N>
  void store_row(int64_t m, int64_t n, int64_t count, const Ints* sums) const {
    const Activate<kind> activate;
    Ints top = load(most + m * 16);
    for (int i = 0; i < N; i++) {  // as Column::store
      const int64_t from = n + i * kRows;
      const Floats out = activate(value.at(from, first(count - i * kRows))(m, sums[i]));
      ::store(hidden + m * ld + from, out);
      top = larger(top, out);
    }
    ::store(most + m * 16, top);
  }
#endif
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

  float top(int64_t m, int64_t M, int64_t threads) const {
    int32_t top = 0;
    for (int64_t t = 0; t < threads; t++)
      for (int64_t i = 0; i < 16; i++) top = std::max(top, most[(t * M + m) * 16 + i]);
    return as_float(top);
  }
};

constexpr int64_t kHiddenBytes = 3 << 19;  // of a block

template <int64_t kind>
void feed_forward(const float* x, int64_t M, const Layer& first, const Layer& second, float* y) {
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
    const Dequantize sums{s.in.start.data(), s.in.scale.data(), first.scale, first.bias};
    channels<false>({s.in.codes.data(), s.in.stride}, count, first, thread, threads,
                    Activated<kind>{sums, s.hidden.data(), ld, most});
    barrier();
    for (int64_t m = thread; m < count; m += threads)
      s.between.convert(s.hidden.data() + m * ld, second.K, m, s.top(m, count, threads));
    barrier();
    const Dequantize sums_2{s.between.start.data(), s.between.scale.data(), second.scale, second.bias};
    channels<false>({s.between.codes.data(), s.between.stride}, count, second, thread, threads,
                    Dequantized{sums_2, y + begin * second.N, second.N});
  };
  in_blocks<Scratch>(M, kHiddenBytes / (4 * ld), work(M, first.N * (first.K + second.N)), resize, block);
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
