// y[M, N] = x[M, K] @ w[N, K].T + bias with 4-bit weights, one float16 scale a group of inputs: x as it is in float32
// (int4_linear), or quantized row by row to int8 (int4_int8_linear). Mean what the references of the same names in
// lightning_accel.quantize.int4 mean, codes and integer sums bit by bit; float sums are added up in another order.
//
// Packed weights [ceil(N/16), K/8, 16, 4]: the low halves of a register's bytes are a tile of 16 channels by 4 inputs, the
// high halves the tile of the next 4 inputs; codes + 8. Scales [ceil(N/16), G, 16] float16.

#include "rows.h"
#include "shim.h"

namespace {

struct Weights {
  const uint8_t* packed;
  const uint16_t* scales;
  const float* bias;
  int64_t N, K, groups;
  int64_t ldy;  // of the output, which other layers may share

  const uint8_t* codes(int64_t n) const { return packed + n / kRows * (K / 8) * kTile + n % kRows * kCols; }
  const uint16_t* scale(int64_t n, int64_t g) const { return scales + (n / kRows * groups + g) * kRows + n % kRows; }
};

#ifdef VNNI
// Weights of the q-th halves of a byte in each lane; a lookup reads the lowest four bits.
inline Floats weights_of(Ints codes, int q) {
  const Floats values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  return _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * q), values);
}
#elif defined(AVX2)
inline Floats weights_of(Ints codes, int q) {  // without the 8 that codes have added they are two's complement
  const Ints top = _mm256_slli_epi32(_mm256_xor_si256(codes, _mm256_set1_epi8(static_cast<char>(0x88))), 28 - 4 * q);
  return floats(_mm256_srai_epi32(top, 28));
}

#ifndef __AVXVNNI__
inline Ints dot(Ints sums, Ints u, Ints s) {  // u is below 16: no sum of two products saturates
  Ints pairs;
  __asm__("vpmaddubsw %3, %2, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"
          : "+x"(sums), "=&x"(pairs) : "x"(u), "x"(s), "x"(_mm256_set1_epi16(1)));
  return sums;
}
#endif
#endif

#ifdef LANES

template <int M, int N>  // M rows by N registers of channels
void int8_block(const Weights& w, const Rows& rows, const int32_t* sums, int64_t m, int64_t n, float* y) {
  const Ints low = all(0x0f0f0f0f);
  const int64_t steps = w.K / w.groups / 8;
  Floats out[M][N];
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) out[i][j] = all(0.0f);
  for (int64_t g = 0; g < w.groups; g++) {
    Ints acc[M][N];
    for (int i = 0; i < M; i++)
      for (int j = 0; j < N; j++) acc[i][j] = all(sums[(m + i) * w.groups + g]);
    for (int64_t k = g * steps; k < (g + 1) * steps; k++) {
      Ints lo[N], hi[N];
      for (int j = 0; j < N; j++) {
        const Ints both = load(w.codes(n + j * kLanes) + k * kTile);
        if (M == 1) expect(w.codes(n + (j + N) * kLanes) + k * kTile);
        lo[j] = both & low;
        hi[j] = halves_of_bytes(both) & low;
      }
      for (int i = 0; i < M; i++) {
        const int8_t* codes = rows.codes.data() + (m + i) * rows.stride + k * 8;
        for (int j = 0; j < N; j++) acc[i][j] = dot(acc[i][j], lo[j], four(codes));
        for (int j = 0; j < N; j++) acc[i][j] = dot(acc[i][j], hi[j], four(codes + 4));
      }
    }
    for (int j = 0; j < N; j++) {
      const Floats scale = load_halves(w.scale(n + j * kLanes, g));
      for (int i = 0; i < M; i++) out[i][j] = fma(floats(acc[i][j]), scale, out[i][j]);
    }
  }
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) {
      const int64_t at = n + j * kLanes;
      const Lanes in = first(w.N - at);
      store(in, y + (m + i) * w.ldy + at, out[i][j] * all(rows.scale[m + i]) + load(in, w.bias + at));
    }
}

template <int M, int N>
void float_block(const Weights& w, const float* x, int64_t m, int64_t n, float* y) {
  const int64_t steps = w.K / w.groups / 8;
  Floats out[M][N];
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) out[i][j] = all(0.0f);
  for (int64_t g = 0; g < w.groups; g++) {
    Floats acc[M][N];
    for (int i = 0; i < M; i++)
      for (int j = 0; j < N; j++) acc[i][j] = all(0.0f);
    for (int64_t k = g * steps; k < (g + 1) * steps; k++) {
      Ints codes[N];
      for (int j = 0; j < N; j++) codes[j] = load(w.codes(n + j * kLanes) + k * kTile);
      if (M == 1)
        for (int j = 0; j < N; j++) expect(w.codes(n + (j + N) * kLanes) + k * kTile);
#pragma GCC unroll 8
      for (int q = 0; q < 8; q++) {
        const int64_t input = k * 8 + q % 2 * 4 + q / 2;
        Floats weights[N];
        for (int j = 0; j < N; j++) weights[j] = weights_of(codes[j], q);
        for (int i = 0; i < M; i++)
          for (int j = 0; j < N; j++) acc[i][j] = fma(weights[j], all(x[(m + i) * w.K + input]), acc[i][j]);
      }
    }
    for (int j = 0; j < N; j++) {
      const Floats scale = load_halves(w.scale(n + j * kLanes, g));
      for (int i = 0; i < M; i++) out[i][j] = fma(acc[i][j], scale, out[i][j]);
    }
  }
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) {
      const int64_t at = n + j * kLanes;
      const Lanes in = first(w.N - at);
      store(in, y + (m + i) * w.ldy + at, out[i][j] + load(in, w.bias + at));
    }
}

// Calls block(row, channel) so that all rows and the channels from n to before `end` are covered: one row by up to four
// registers of channels at a time, or four rows by two.
template <class Block>
void cover(int64_t M, int64_t n, int64_t end, const Block& block) {
  int64_t m = 0;
  for (; m + 4 <= M; m += 4)
    for (int64_t at = n; at < end; at += 2 * kLanes)
      at + kLanes < end ? block.template operator()<4, 2>(m, at) : block.template operator()<4, 1>(m, at);
  for (; m < M; m++)
    for (int64_t at = n; at < end; at += 4 * kLanes) switch ((end - at + kLanes - 1) / kLanes) {
        case 1: block.template operator()<1, 1>(m, at); break;
        case 2: block.template operator()<1, 2>(m, at); break;
        case 3: block.template operator()<1, 3>(m, at); break;
        default: block.template operator()<1, 4>(m, at);
      }
}

struct Int8Block {
  const Weights& w;
  const Rows& rows;
  const int32_t* sums;
  float* y;
  template <int M, int N>
  void operator()(int64_t m, int64_t n) const {
    int8_block<M, N>(w, rows, sums, m, n, y);
  }
};

struct FloatBlock {
  const Weights& w;
  const float* x;
  float* y;
  template <int M, int N>
  void operator()(int64_t m, int64_t n) const {
    float_block<M, N>(w, x, m, n, y);
  }
};

#else  // any other CPU: as fast as the compiler makes it

inline float half_to_float(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * std::ldexp(static_cast<float>(fraction), -24);
  const uint32_t bits = sign | (exponent + 112) << 23 | fraction << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline int code(const Weights& w, int64_t n, int64_t k) {
  const uint8_t byte = w.codes(n)[k / 8 * kTile + k % 4];
  return (k % 8 < 4 ? byte & 15 : byte >> 4) - 8;
}

template <class T, class Sum>  // sums of the groups of one channel and row, times their scales
float channel(const Weights& w, const T* x, int64_t n) {
  const int64_t size = w.K / w.groups;
  float out = 0.0f;
  for (int64_t g = 0; g < w.groups; g++) {
    Sum sum = 0;
    for (int64_t k = g * size; k < (g + 1) * size; k++) sum += static_cast<Sum>(code(w, n, k)) * x[k];
    out += static_cast<float>(sum) * half_to_float(*w.scale(n, g));
  }
  return out;
}

#endif

// Calls multiply(layer, its first channel in y, from, to) for the panels of all layers, one after the other.
template <class Multiply>
void in_panels(const Weights* layers, int64_t count, int64_t p, const Multiply& multiply) {
  int64_t n = 0;
  for (const Weights* w = layers; w < layers + count; w++) {
    const int64_t own = (w->N + kPanel * kRows - 1) / (kPanel * kRows), from = p * kPanel * kRows;
    if (p < own) return multiply(*w, n, from, std::min(w->N, from + kPanel * kRows));
    p -= own, n += w->N;
  }
}

inline int64_t panels(const Weights* layers, int64_t count) {
  int64_t all = 0;
  for (int64_t i = 0; i < count; i++) all += (layers[i].N + kPanel * kRows - 1) / (kPanel * kRows);
  return all;
}

void int4_linear(const float* x, const Weights* layers, int64_t count, float* y, int64_t M, int64_t N, int64_t K) {
  const auto multiply = [&](int64_t p) {
    in_panels(layers, count, p, [&](const Weights& w, int64_t first, int64_t from, int64_t to) {
#ifdef LANES
      cover(M, from, to, FloatBlock{w, x, y + first});
#else
      for (int64_t m = 0; m < M; m++)
        for (int64_t n = from; n < to; n++)
          y[m * N + first + n] = channel<float, float>(w, x + m * K, n) + w.bias[n];
#endif
    });
  };
  run(0, panels(layers, count), work(M, N * K), [](int64_t) {}, each(multiply));
}

void int4_int8_linear(const float* x, const Weights* layers, int64_t count, float* y, int64_t M, int64_t N, int64_t K) {
  const int64_t groups = layers->groups, size = K / groups;
  static thread_local Rows scratch;
  static thread_local std::vector<int32_t> scratch_sums;  // [M, groups], -8 * sum of codes: weights' codes have 8 added
  Rows& rows = scratch;
  std::vector<int32_t>& sums = scratch_sums;
  rows.resize(M, K);
  sums.resize(std::max<size_t>(sums.size(), M * groups));
  const auto quantize = [&](int64_t m) {
    rows.quantize(x, K, m);
    const int8_t* codes = rows.codes.data() + m * rows.stride;
    for (int64_t g = 0; g < groups; g++) {
      int32_t sum = 0;
      for (int64_t k = g * size; k < (g + 1) * size; k++) sum += codes[k];
      sums[m * groups + g] = -8 * sum;
    }
  };
  const auto multiply = [&](int64_t p) {
    in_panels(layers, count, p, [&](const Weights& w, int64_t first, int64_t from, int64_t to) {
#ifdef LANES
      cover(M, from, to, Int8Block{w, rows, sums.data(), y + first});
#else
      for (int64_t m = 0; m < M; m++)
        for (int64_t n = from; n < to; n++)
          y[m * N + first + n] =
              channel<int8_t, int32_t>(w, rows.codes.data() + m * rows.stride, n) * rows.scale[m] + w.bias[n];
#endif
    });
  };
  run(M, panels(layers, count), work(M, N * K), quantize, each(multiply));
}

AOTITorchError layer(AtenTensorHandle packed, AtenTensorHandle scale, AtenTensorHandle bias, Weights* w) {
  int64_t *groups, *n;
  if (data(packed, &w->packed) || data(scale, &w->scales) || data(bias, &w->bias)) return AOTI_TORCH_FAILURE;
  if (aoti_torch_get_sizes(scale, &groups) || aoti_torch_get_sizes(bias, &n)) return AOTI_TORCH_FAILURE;
  w->groups = groups[1], w->N = n[0];
  return AOTI_TORCH_SUCCESS;
}

using Linears = void (*)(const float*, const Weights*, int64_t, float*, int64_t, int64_t, int64_t);

AOTITorchError call_with(Linears linears, AtenTensorHandle x, Weights* layers, int64_t count, AtenTensorHandle* out) {
  Call<float> call;
  int64_t N = 0;
  for (int64_t i = 0; i < count; i++) {
    N += layers[i].N;
    if (layers[i].groups != layers->groups) return AOTI_TORCH_FAILURE;  // sums of codes are of groups of one size
  }
  if (AOTITorchError error = open(x, N, out, &call)) return error;
  for (int64_t i = 0; i < count; i++) layers[i].K = call.K, layers[i].ldy = N;
  linears(call.x, layers, count, call.y, call.M, N, call.K);
  return AOTI_TORCH_SUCCESS;
}

}  // namespace

#define LIGHTNING_ACCEL_OPERATOR(name)                                                                               \
  extern "C" __attribute__((visibility("hidden"))) AOTITorchError aoti_torch_cpu_##name(                             \
      AtenTensorHandle x, AtenTensorHandle packed, AtenTensorHandle scale, AtenTensorHandle bias,                    \
      AtenTensorHandle* out) {                                                                                       \
    Weights only;                                                                                                    \
    return layer(packed, scale, bias, &only) ? AOTI_TORCH_FAILURE : call_with(name, x, &only, 1, out);               \
  }                                                                                                                  \
  extern "C" __attribute__((visibility("hidden"))) AOTITorchError aoti_torch_cpu_##name##s(                          \
      AtenTensorHandle x, AtenTensorHandle packed, AtenTensorHandle scale, AtenTensorHandle* bias,                   \
      AtenTensorHandle packed_2, AtenTensorHandle scale_2, AtenTensorHandle* bias_2, AtenTensorHandle* packed_3,     \
      AtenTensorHandle* scale_3, AtenTensorHandle* bias_3, AtenTensorHandle* out) {                                  \
    Weights layers[3];                                                                                               \
    if (layer(packed, scale, *bias, layers) || layer(packed_2, scale_2, *bias_2, layers + 1))                        \
      return AOTI_TORCH_FAILURE;                                                                                     \
    if (packed_3 && layer(*packed_3, *scale_3, *bias_3, layers + 2)) return AOTI_TORCH_FAILURE;                      \
    return call_with(name, x, layers, packed_3 ? 3 : 2, out);                                                        \
  }

LIGHTNING_ACCEL_OPERATOR(int4_linear)
LIGHTNING_ACCEL_OPERATOR(int4_int8_linear)
