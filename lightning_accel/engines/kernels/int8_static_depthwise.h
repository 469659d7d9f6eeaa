// Depthwise convolutions of codes [B, H, W, C]: a channel's sum over the window of that channel alone. Weights are tiles of
// 16 channels by 4 inputs of a window, as products.h has them; sums go to the same epilogues.
//
// An output row is computed from a table of pointers, four or more for each output: where in the image each input of its
// window begins, or, beyond the borders, a row of zero points (as QNNPACK's indirection buffer). The channels of four
// inputs are interleaved in registers, and one VNNI instruction multiplies and adds what belongs to 16 of them.

#pragma once

#include "static.h"

namespace {

#ifdef VNNI

constexpr int64_t kChannels = 64;  // channels of a step

// Four registers of four quarters each, as rows and columns of a square.
inline void transpose(__m512i* r) {
  const __m512i a = _mm512_shuffle_i32x4(r[0], r[1], 0x44), b = _mm512_shuffle_i32x4(r[2], r[3], 0x44);
  const __m512i c = _mm512_shuffle_i32x4(r[0], r[1], 0xee), d = _mm512_shuffle_i32x4(r[2], r[3], 0xee);
  r[0] = _mm512_shuffle_i32x4(a, b, 0x88), r[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
  r[2] = _mm512_shuffle_i32x4(c, d, 0x88), r[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
}

// Weights in the order in which interleaving leaves channels: 16 n + 4 i .. 16 n + 4 i + 3 in quarter n of register i.
struct DepthwiseWeights {
  Buffer<int8_t> weights;  // [steps, K4, 4 registers]
  Buffer<float> channels;  // [steps, 3, 64], start, scale and bias

  void pack(const Weights& w, int64_t K4) {
    const int8_t* tiles = w.tiles;
    const int64_t C = w.N, count = (C + kRows - 1) / kRows;
    channels.grow((count + 3) / 4 * 192);
    for (int64_t n = 0; n < C; n += kChannels)
      for (int64_t part = 0; part < 3; part++) {
        const void* all[3] = {w.start, w.scale, w.bias};
        const float* from = static_cast<const float*>(all[part]);
        __m512i r[4];
        for (int64_t i = 0; i < 4; i++) r[i] = bits(load(first(C - n - 16 * i), from + n + 16 * i));
        transpose(r);
        for (int64_t i = 0; i < 4; i++)
          _mm512_storeu_si512(channels.data() + n * 3 + part * kChannels + 16 * i, r[i]);
      }
    weights.grow((count + 3) / 4 * K4 * 4 * kTile);
    for (int64_t t = 0; t < count; t += 4)
      for (int64_t k = 0; k < K4; k++) {
        __m512i r[4];
        for (int64_t i = 0; i < 4; i++)
          r[i] = t + i < count ? load(tiles + ((t + i) * K4 + k) * kTile) : _mm512_setzero_si512();
        transpose(r);
        for (int64_t i = 0; i < 4; i++) _mm512_store_si512(weights.data() + (t * K4 + 4 * k + i) * kTile, r[i]);
      }
  }
};

template <class Out>
void depthwise_row(const uint8_t* const* inputs, int64_t outputs, int64_t K4, int64_t C, const DepthwiseWeights& w, int64_t m,
              const Out& out) {
  const int8_t* weights = w.weights.data();
  for (int64_t n = 0; n < C; n += kChannels, weights += 4 * K4 * kTile) {
    const int64_t left = C - n;
    const __mmask64 in = left >= 64 ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
    const float* scale = w.channels.data() + n * 3 + kChannels;
    const int32_t* start = reinterpret_cast<const int32_t*>(scale - kChannels);
    const decltype(out.at(0, 0)) columns[4] = {out.at(n, left), out.at(n + 16, left - 16), out.at(n + 32, left - 32),
                                               out.at(n + 48, left - 48)};
    const uint8_t* const* from = inputs;
    for (int64_t o = 0; o < outputs; o++) {
      __m512i sums[4] = {};
      const int8_t* at = weights;
      for (int64_t k = 0; k < K4; k++, from += 4, at += 4 * kTile) {
        const __m512i x0 = _mm512_maskz_loadu_epi8(in, from[0] + n), x1 = _mm512_maskz_loadu_epi8(in, from[1] + n);
        const __m512i x2 = _mm512_maskz_loadu_epi8(in, from[2] + n), x3 = _mm512_maskz_loadu_epi8(in, from[3] + n);
        const __m512i a = _mm512_unpacklo_epi8(x0, x1), b = _mm512_unpackhi_epi8(x0, x1);
        const __m512i c = _mm512_unpacklo_epi8(x2, x3), d = _mm512_unpackhi_epi8(x2, x3);
        sums[0] = dot(sums[0], _mm512_unpacklo_epi16(a, c), load(at));
        sums[1] = dot(sums[1], _mm512_unpackhi_epi16(a, c), load(at + 1 * kTile));
        sums[2] = dot(sums[2], _mm512_unpacklo_epi16(b, d), load(at + 2 * kTile));
        sums[3] = dot(sums[3], _mm512_unpackhi_epi16(b, d), load(at + 3 * kTile));
      }
      if constexpr (std::is_same_v<Out, Coded>) {
        const __m512i codes = pack_codes<4>(out.as, sums, kChannels, start, scale, scale + kChannels);
        _mm512_mask_storeu_epi8(out.codes + (m + o) * C + n, in, codes);
        continue;
      }
      transpose(sums);
      for (int64_t i = 0; i < 4 && 16 * i < left; i++) columns[i].store(m + o, sums[i]);
    }
  }
}

#elif defined(AVX2)

constexpr int64_t kChannels = 16;

struct DepthwiseWeights {  // weights of two inputs beside each other, in 16 bits, of channels 0-3 and 8-11, then of the others
  Buffer<int16_t> pairs;  // [steps, K4, 2, 32]

  void pack(const Weights& w, int64_t K4) {
    const int8_t* tiles = w.tiles;
    const int64_t count = (w.N + kRows - 1) / kRows * K4;
    pairs.grow(count * kTile);
    for (int64_t t = 0; t < count; t++)
      for (int64_t n = 0; n < kRows; n++)
        for (int64_t c = 0; c < kCols; c++)
          pairs.data()[t * kTile + c / 2 * 32 + n / 4 % 2 * 16 + (n / 8 * 4 + n % 4) * 2 + c % 2] =
              tiles[t * kTile + n * kCols + c];
  }
};

inline __m256i load_channels(const uint8_t* codes, int64_t count) {
  if (count >= kChannels) return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  uint8_t some[kChannels] = {};
  std::memcpy(some, codes, count);
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(some)));
}

template <class Out>
void depthwise_row(const uint8_t* const* inputs, int64_t outputs, int64_t K4, int64_t C, const DepthwiseWeights& w, int64_t m,
              const Out& out) {
  for (int64_t n = 0; n < C; n += kChannels) {
    const int64_t left = C - n;
    const auto low = out.at(n, left), high = out.at(n + kLanes, left - kLanes);
    const uint8_t* const* from = inputs;
    for (int64_t o = 0; o < outputs; o++) {
      __m256i sums[2] = {};
      const int16_t* weights = w.pairs.data() + n * K4 * kCols;
      for (int64_t k = 0; k < 2 * K4; k++, from += 2, weights += 32) {
        const __m256i x0 = load_channels(from[0] + n, left), x1 = load_channels(from[1] + n, left);
        const __m256i a = _mm256_madd_epi16(_mm256_unpacklo_epi16(x0, x1), load(weights));
        const __m256i b = _mm256_madd_epi16(_mm256_unpackhi_epi16(x0, x1), load(weights + 16));
        sums[0] = add(sums[0], a), sums[1] = add(sums[1], b);
      }
      low.store(m + o, _mm256_permute2x128_si256(sums[0], sums[1], 0x20));
      if (left > kLanes) high.store(m + o, _mm256_permute2x128_si256(sums[0], sums[1], 0x31));
    }
  }
}

#else

struct DepthwiseWeights {
  const int8_t* tiles;

  void pack(const Weights& w, int64_t) { tiles = w.tiles; }
};

template <class Out>
void depthwise_row(const uint8_t* const* inputs, int64_t outputs, int64_t K4, int64_t C, const DepthwiseWeights& w, int64_t m,
              const Out& out) {
  for (int64_t o = 0; o < outputs; o++, inputs += K4 * kCols)
    for (int64_t n = 0; n < C; n += kRows) {
      int32_t sums[kRows] = {};
      const int64_t count = std::min(kRows, C - n);
      for (int64_t k = 0; k < K4 * kCols; k++)
        for (int64_t i = 0; i < count; i++)
          sums[i] += int32_t(w.tiles[n * K4 * kCols + k / kCols * kTile + i * kCols + k % kCols]) * inputs[k][n + i];
      out.store(m + o, n, C - n, sums);
    }
}
#endif

// Covers all output rows of images with windows `x` (int8_static.cpp).
template <class Windows, class Out>
void depthwise(const Windows& x, int64_t batch, const Weights& w, const Out& out) {
  static thread_local DepthwiseWeights packed;
  const int64_t K4 = (x.kernel_height * x.kernel_width + kCols - 1) / kCols;
  packed.pack(w, K4);
  const DepthwiseWeights& weights = packed;  // of this thread: in the others of a team the name means their own
  const auto row = [&](int64_t r) {
    static thread_local std::vector<const uint8_t*> inputs;
    static thread_local std::vector<uint8_t> beyond;
    beyond.assign(x.C, static_cast<uint8_t>(x.zero));
    inputs.assign(x.out_width * K4 * kCols, beyond.data());
    const int64_t oy = r % x.out_height;
    const uint8_t* image = x.codes + r / x.out_height * x.H * x.W * x.C;
    for (int64_t i = 0; i < x.kernel_height; i++) {
      const int64_t y = oy * x.stride_height - x.top + i * x.down;
      if (y < 0 || y >= x.H) continue;
      for (int64_t j = 0; j < x.kernel_width; j++)
        for (int64_t o = 0; o < x.out_width; o++) {
          const int64_t at = o * x.stride_width - x.left + j * x.across;
          if (at >= 0 && at < x.W)
            inputs[o * K4 * kCols + i * x.kernel_width + j] = image + (y * x.W + at) * x.C;
        }
    }
    depthwise_row(inputs.data(), x.out_width, K4, x.C, weights, r * x.out_width, out);
  };
  const int64_t rows = batch * x.out_height;
  run(0, rows, rows * x.out_width * x.C * K4 * kCols, [](int64_t) {}, each(row));
}

}  // namespace
