// y = static_linear(codes(activate(static_linear(x)))): two layers of lightning_accel.quantize.static's
// int8_static_linear_reference with an activation and affine_codes between them. The first product's sums become codes at
// once, which stay in the cache. Products and codes are bit by bit theirs, activations within the bound of activation.h.

#include "activation.h"
#include "blocks.h"
#include "static.h"

namespace {

template <int64_t kind>
struct Activated {  // the epilogue of the first product: clamp(round(activation * factor) + zero_point, 0, 255), NaN as 0.0
  Scale value;
  float factor, zero_point;
  uint8_t* codes;
  int64_t stride;

#ifdef LANES
  struct Column {
    Scale::Column value;
    Activate<kind> activate;
    Floats factor, zero_point;
    uint8_t* codes;
    int64_t stride;

    void store(int64_t m, Ints sums) const {  // a register's codes are in the row's memory, past the last channel too
      const Floats moved = round(activate(value(sums)) * factor) + zero_point;
      const Floats code = min(max(number_or(moved, zero_point), all(0.0f)), all(255.0f));
      store_bytes(codes + m * stride, ints(code));
    }
  };
  Column at(int64_t n, int64_t count) const {
    return {value.at(n, first(count)), {}, all(factor), all(zero_point), codes + n, stride};
  }
#else
  void store(int64_t m, int64_t n, int64_t count, const int32_t* sums) const {
    for (int64_t i = 0; i < std::min(count, kRows); i++) {
      const float moved = std::nearbyint(Activate<kind>()(value(n + i, sums[i])) * factor) + zero_point;
      const float code = moved == moved ? std::min(std::max(moved, 0.0f), 255.0f) : zero_point;
      codes[m * stride + n + i] = static_cast<uint8_t>(code);
    }
  }
#endif
};

struct Scratch {  // of a block of rows
  Buffer<uint8_t> in, between;
};

inline int64_t stride_of(int64_t K) { return ((K + 63) / 64 | 1) * 64; }  // an odd number of cache lines

template <int64_t kind>
void feed_forward(const uint8_t* x, int64_t M, const Weights& first, const Weights& second, float factor,
                  float zero_point, float* y) {
  const Matrix source{x, M, first.K};
  const int64_t whole = source.in_place(), ld_in = stride_of(first.K), ld = stride_of(second.K);
  const auto resize = [&](Scratch& s, int64_t count, int64_t) {
    s.in.grow((count + 15) / 16 * 16 * ld_in);
    s.between.grow((count + 15) / 16 * 16 * ld);
  };
  const auto block = [&](int64_t begin, int64_t count, Scratch& s, int64_t thread, int64_t threads, auto barrier) {
    const bool in_place = begin + count <= whole;
    const int64_t share = (count + threads - 1) / threads, m = std::min(count, thread * share);
    if (!in_place) source.copy_rows(begin + m, std::min(share, count - m), s.in.data() + m * ld_in, ld_in);
    barrier();
    const Codes in{reinterpret_cast<const int8_t*>(in_place ? x + begin * first.K : s.in.data()),
                   in_place ? first.K : ld_in};
    channels<true>(in, count, first, thread, threads,
                   Activated<kind>{{first}, factor, zero_point, s.between.data(), ld});
    barrier();
    channels<true>({reinterpret_cast<const int8_t*>(s.between.data()), ld}, count, second, thread, threads,
                   Scaled{{second}, y + begin * second.N});
  };
  in_blocks<Scratch>(M, kBlockRows, work(M, first.N * (first.K + second.N)), resize, block);
}

}  // namespace

extern "C" __attribute__((visibility("hidden"))) AOTITorchError aoti_torch_cpu_int8_static_feed_forward(
    AtenTensorHandle codes, AtenTensorHandle tiles, AtenTensorHandle start, AtenTensorHandle scale,
    AtenTensorHandle bias, AtenTensorHandle tiles_2, AtenTensorHandle start_2, AtenTensorHandle scale_2,
    AtenTensorHandle bias_2, int64_t activation, double factor, int64_t zero_point, AtenTensorHandle* out) {
  Call<uint8_t> call;
  Weights first, second;
  if (open(tiles, start, scale, bias, &first) || open(tiles_2, start_2, scale_2, bias_2, &second))
    return AOTI_TORCH_FAILURE;
  if (AOTITorchError error = open(codes, scale_2, out, &call)) return error;
  first.K = call.K, second.K = first.N;
  const bool known = with_activation(activation, [&](auto kind) {
    feed_forward<decltype(kind)::value>(call.x, call.M, first, second, static_cast<float>(factor),
                                        static_cast<float>(zero_point), call.y);
  });
  return known ? AOTI_TORCH_SUCCESS : AOTI_TORCH_FAILURE;
}
