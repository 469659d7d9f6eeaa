// Layers with static uint8 activations, as lightning_accel.quantize.static has them: y = float(codes @ w.T + start) * scale
// + bias, bit by bit.

#pragma once

#include <cmath>

#include "products.h"
#include "shim.h"

namespace {

struct Weights {
  const int8_t* tiles;
  const int32_t* start;
  const float *scale, *bias;
  int64_t N, K;
};

// float(sum + start) * scale + bias
struct Scale {
  const Weights& w;

#ifdef LANES
  struct Column {
    Ints start;
    Floats scale, bias;

    Floats operator()(Ints sums) const { return floats(add(sums, start)) * scale + bias; }
  };
  Column at(int64_t n, Lanes in) const {
    return {load(in, w.start + n), load(in, w.scale + n), load(in, w.bias + n)};
  }
#else
  float operator()(int64_t n, int32_t sum) const {
    return static_cast<float>(sum + w.start[n]) * w.scale[n] + w.bias[n];
  }
#endif
};

struct Scaled {  // an epilogue: scaled sums are the output
  Scale value;
  float* y;

  Scaled after(int64_t rows) const { return {value, y + rows * value.w.N}; }

#ifdef LANES
  struct Column {
    Scale::Column value;
    float* y;
    int64_t ldy;
    Lanes in;

    void store(int64_t m, Ints sums) const { ::store(in, y + m * ldy, value(sums)); }
  };
  Column at(int64_t n, int64_t count) const {
    const Lanes in = first(count);
    return {value.at(n, in), y + n, value.w.N, in};
  }
#else
  void store(int64_t m, int64_t n, int64_t count, const int32_t* sums) const {
    for (int64_t i = 0; i < std::min(count, kRows); i++) y[m * value.w.N + n + i] = value(n + i, sums[i]);
  }
#endif
};

struct Affine {  // codes of floats: clamp(round(x * factor) + zero, least, most), NaN as 0.0
  float factor;
  int32_t zero, least, most;  // least <= zero <= most
};

#ifdef VNNI
// Codes of N registers of sums of `count` channels, packed four by four within quarters of a register. What belongs to the
// channels is in the order of the sums.
template <int N>
inline __m512i pack_codes(const Affine& as, const __m512i* sums, int64_t count, const int32_t* start, const float* scale,
                          const float* bias) {
  __m512i q[4] = {};
  const auto codes_of = [&](int i, Ints s, Floats w, Floats b) {
    Floats moved = (floats(add(sums[i], s)) * w + b) * all(as.factor);
    if (as.least != as.zero) moved = number_or(moved, all(0.0f));  // else a NaN becomes the least integer
    q[i] = ints(_mm512_min_ps(all(65536.0f), moved));             // of a NaN, the second
  };
  if (count >= 16 * N) {
    for (int i = 0; i < N; i++)
      codes_of(i, load(start + 16 * i), _mm512_loadu_ps(scale + 16 * i), _mm512_loadu_ps(bias + 16 * i));
  } else {
    for (int i = 0; i < N; i++) {
      const Lanes in = first(count - 16 * i);
      codes_of(i, load(in, start + 16 * i), load(in, scale + 16 * i), load(in, bias + 16 * i));
    }
  }
  const __m512i zero = _mm512_set1_epi16(static_cast<int16_t>(as.zero));
  const __m512i low = _mm512_adds_epi16(_mm512_packs_epi32(q[0], q[1]), zero);
  const __m512i high = _mm512_adds_epi16(_mm512_packs_epi32(q[2], q[3]), zero);
  const __m512i codes = _mm512_min_epu8(_mm512_packus_epi16(low, high), _mm512_set1_epi8(static_cast<char>(as.most)));
  return _mm512_max_epu8(codes, _mm512_set1_epi8(static_cast<char>(as.least)));
}
#endif

struct Coded {  // an epilogue: the codes of scaled sums are the output
  Scale value;
  Affine as;
  uint8_t* codes;

  Coded after(int64_t rows) const { return {value, as, codes + rows * value.w.N}; }

#ifdef VNNI
  static constexpr bool kTakesRows = true;
  template <int N>
  void store_row(int64_t m, int64_t n, int64_t count, const Ints* sums) const {
    const Weights& w = value.w;
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i packed =
        _mm512_permutexvar_epi32(order, pack_codes<N>(as, sums, count, w.start + n, w.scale + n, w.bias + n));
    uint8_t* to = codes + m * w.N + n;
    if (N == 4 && count >= 64) _mm512_storeu_si512(to, packed);
    else if (N == 2 && count >= 32) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(packed));
    else _mm512_mask_storeu_epi8(to, ~uint64_t{0} >> (64 - std::min<int64_t>(count, 16 * N)), packed);
  }
#endif

#ifdef LANES
  struct Column {
    Scale::Column value;
    Floats factor, low, high;
    Ints zero;
    uint8_t* codes;
    int64_t stride, count;

    void store(int64_t m, Ints sums) const {
      const Floats moved = number_or(value(sums) * factor, all(0.0f));
      store_bytes(count, codes + m * stride, add(ints(min(max(moved, low), high)), zero));
    }
  };
  Column at(int64_t n, int64_t count) const {
    const float low = static_cast<float>(as.least - as.zero), high = static_cast<float>(as.most - as.zero);
    return {value.at(n, first(count)), all(as.factor), all(low), all(high), all(as.zero), codes + n, value.w.N, count};
  }
#else
  void store(int64_t m, int64_t n, int64_t count, const int32_t* sums) const {
    for (int64_t i = 0; i < std::min(count, kRows); i++) {
      const float moved = value(n + i, sums[i]) * as.factor;
      const float low = static_cast<float>(as.least - as.zero), high = static_cast<float>(as.most - as.zero);
      const float code = moved == moved ? std::min(std::max(moved, low), high) : 0.0f;
      codes[m * value.w.N + n + i] = static_cast<uint8_t>(static_cast<int32_t>(std::nearbyint(code)) + as.zero);
    }
  }
#endif
};

// Copies `count` pieces of `bytes`, each `step` after the one before it.
inline void copy(uint8_t* to, int64_t to_step, const uint8_t* from, int64_t from_step, int64_t bytes, int64_t count) {
#ifdef VNNI  // without a call: pieces are short
  const int64_t lines = (bytes - 1) / 64 * 64;
  const __mmask64 last = ~uint64_t{0} >> (64 - (bytes - lines));
  for (int64_t i = 0; i < count; i++, to += to_step, from += from_step) {
    for (int64_t at = 0; at < lines; at += 64) _mm512_storeu_si512(to + at, _mm512_loadu_si512(from + at));
    _mm512_mask_storeu_epi8(to + lines, last, _mm512_maskz_loadu_epi8(last, from + lines));
  }
#else
  for (int64_t i = 0; i < count; i++) std::memcpy(to + i * to_step, from + i * from_step, bytes);
#endif
}

struct Matrix {  // rows as they are in memory
  const uint8_t* codes;
  int64_t M, K;

  // Rows from the first one on that products can read where they are. They read a row in steps; what is past its end
  // meets weights of 0, but past the end of the last there may be no memory. AMX reads 16 rows at a time.
  int64_t in_place() const {
#ifdef AMX
    return K % 64 == 0 ? M / 16 * 16 : 0;
#elif defined(AVX2) && !defined(__AVXVNNI__)
    return K % 16 == 0 ? M : 0;
#else
    return K % kCols == 0 ? M : 0;
#endif
  }
  void copy_rows(int64_t m, int64_t count, uint8_t* to, int64_t stride) const {
    copy(to, stride, codes + m * K, K, K, count);
  }
};

AOTITorchError open(AtenTensorHandle tiles, AtenTensorHandle start, AtenTensorHandle scale, AtenTensorHandle bias,
                    Weights* w) {
  int64_t* n;
  if (data(tiles, &w->tiles) || data(start, &w->start) || data(scale, &w->scale) || data(bias, &w->bias))
    return AOTI_TORCH_FAILURE;
  if (aoti_torch_get_sizes(scale, &n)) return AOTI_TORCH_FAILURE;
  w->N = n[0];
  return AOTI_TORCH_SUCCESS;
}

}  // namespace
