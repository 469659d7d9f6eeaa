// Attention whose two products are of integers: means what lightning_accel.quantize.products.int8_attention_reference means.
//
// The scale of a key's value goes into its score: with
//     t = (codes_q @ codes_k.T) * (scale_q * scale) * scale_k + mask + log(scale_v)        w = exp(t - max t)
// the codes of a row's shares are round(255 * w), and what they are shares of is sum(w / scale_v). With AVX512-VNNI and AMX
// only: elsewhere compiled programs have the reference in its place.

#include "attention_call.h"
#include "rows.h"

namespace {

#ifdef VNNI

constexpr int64_t kQueries = 48;      // rows whose scores are kept, a multiple of 6
constexpr int64_t kScores = 1 << 14;  // scores that stay in the second cache
constexpr float kLog2Most = 7.99435344f, kLog2E = 1.44269504f;  // of 255, and of e
constexpr float kHidden = -1e6f;                                // largest scores below it are a mask's

struct Head {  // scratch of a thread: what heads and a block of their rows have become
  Buffer<int8_t> keys, values;     // tiles
  Buffer<int8_t> queries, shares;  // rows of unsigned codes
  Buffer<int32_t> start;           // of the sums of each key: codes of queries are larger by 128
  Buffer<float> query_scale, key_scale, added, back;  // added: mask and log(scale_v) of each key; back: 1 / scale_v
  Buffer<float> scores, lanes, factor;                // lanes: the largest scores of a row, for each lane of a register
  Buffer<float> copies;                               // of 16 rows whose columns lie apart
  Buffer<Row> rows;
  bool numbers = true;  // whether no key or value is NaN or infinite, nor a mask for all rows NaN
};

// 255 * e^x for x <= 0, within 4e-6 of itself down to x = -16 and 1e-5 beyond; 0 from where that is below float32. Of NaN
// it is any number.
inline __m512 power(__m512 x) {
  const __m512 magic = _mm512_set1_ps(12582912.0f);  // 1.5 * 2^23: added, it rounds to whole numbers
  x = _mm512_fmadd_ps(x, _mm512_set1_ps(kLog2E), _mm512_set1_ps(kLog2Most));
  x = _mm512_max_ps(x, _mm512_set1_ps(-200.0f));
  const __m512 rounded = _mm512_add_ps(x, magic);
  const __m512 r = _mm512_sub_ps(x, _mm512_sub_ps(rounded, magic));
  const float steps[] = {5.5917859e-2f, 2.4024745e-1f, 6.9312179e-1f, 9.9999928e-1f};
  __m512 y = _mm512_set1_ps(9.5701022e-3f);  // minimax of 2^r on [-1/2, 1/2], to 2.6e-6
#pragma GCC unroll 4
  for (int k = 0; k < 4; k++) y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(steps[k]));
  const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(rounded), 23);
  const __m512i scaled = _mm512_add_epi32(_mm512_castps_si512(y), exponent);
  return _mm512_castsi512_ps(_mm512_max_epi32(scaled, _mm512_setzero_si512()));
}

struct MostBits {
  static __m512 of(__m512 a, __m512 b) { return _mm512_castsi512_ps(max(bits(a), bits(b))); }
};

// Row n of 16, a copy where its columns lie apart.
inline const float* beside(const float* row, int64_t n, int64_t column, int64_t width, Buffer<float>& copies) {
  if (column == 1) return row;
  copies.grow(16 * wide(width));
  copy(row, column, width, wide(width), 1.0f, copies.data() + n * wide(width));
  return copies.data() + n * wide(width);
}

// 16 rows of floats on their way to codes, bit by bit those of Rows::quantize; past `count`, the last row again.
template <int kWhole>  // registers of a row, where it fills them, otherwise 0
class Sixteen {
 public:
  template <class At>
  Sixteen(int64_t count, int64_t width, const At& at) : width_(width) {
    __m512 most[16];
    for (int n = 0; n < 16; n++) {
      rows_[n] = at(std::min<int64_t>(n, count - 1));
      Ints top = all(0);
      for (int64_t d = 0; d < (kWhole ? kWhole * kWide : width); d += kWide)
        top = larger(top, kWhole ? _mm512_loadu_ps(rows_[n] + d) : load(first(width - d), rows_[n] + d));
      most[n] = _mm512_castsi512_ps(top);
    }
    const __m512 top = reduce<MostBits>(most), infinity = all(std::numeric_limits<float>::infinity());
    const __m512 tiny = all(kTiny);
    scale = max(top, tiny) / all(127.0f);
    scale = _mm512_mask_sub_ps(scale, _mm512_cmp_ps_mask(top, infinity, _CMP_NLT_UQ), infinity, infinity);  // NaN
    _mm512_store_ps(inverse_, all(1.0f) / scale);
  }

  __m512i codes(int n, int64_t d) const {  // d .. d + 64 of row n, with zeros past its end
    const float* x = rows_[n] + d;
    const auto at = [&](int i) {
      if (kWhole) return i < kWhole ? _mm512_loadu_ps(x + i * kWide) : _mm512_setzero_ps();
      return load(first(width_ - d - i * kWide), x + i * kWide);
    };
    return convert(at, all(inverse_[n]));
  }

  __m512 scale;

 private:
  const float* rows_[16];
  const int64_t width_;
  alignas(64) float inverse_[16];
};

// Calls f with the registers of a row of `width` floats, as `Sixteen` takes them.
template <class F>
void with_whole(int64_t width, const F& f) {
  switch (width) {
    case 32: return f(std::integral_constant<int, 2>());
    case 64: return f(std::integral_constant<int, 4>());
    default: return f(std::integral_constant<int, 0>());
  }
}

template <int kWhole>
void pack_keys(const Problem& p, int64_t b, int64_t group, Head& h) {
  const int64_t D4 = (p.D + kCols - 1) / kCols;
  for (int64_t j = 0; j < p.keys; j += kRows) {
    const auto at = [&](int64_t n) { return beside(p.k.at<float>(b, group, j + n), n, p.k.column, p.D, h.copies); };
    const Sixteen<kWhole> rows(p.keys - j, p.D, at);
    _mm512_store_ps(h.key_scale.data() + j, rows.scale);
    h.numbers &= !_mm512_cmp_ps_mask(rows.scale, rows.scale, _CMP_UNORD_Q);
    Ints sum = all(0);
    int8_t* to = h.keys.data() + j * D4 * kCols;
    for (int64_t d = 0; d < D4; d += 16) {
      __m512 a[16];
      for (int n = 0; n < 16; n++) a[n] = _mm512_castsi512_ps(rows.codes(n, d * kCols));
      transpose(a);
      for (int n = 0; n < std::min<int64_t>(16, D4 - d); n++, to += kTile) {
        sum = dot(sum, _mm512_set1_epi8(1), bits(a[n]));
        _mm512_storeu_si512(to, bits(a[n]));
      }
    }
    store(h.start.data() + j, _mm512_mullo_epi32(sum, all(-128)));
  }
}

// Four keys' codes of 64 channels as four tiles of 16 channels by four keys.
inline void interleave(const __m512i* rows, __m512i* tiles) {
  const __m512i a = _mm512_unpacklo_epi8(rows[0], rows[1]), b = _mm512_unpackhi_epi8(rows[0], rows[1]);
  const __m512i c = _mm512_unpacklo_epi8(rows[2], rows[3]), d = _mm512_unpackhi_epi8(rows[2], rows[3]);
  // quarters of a register: channels 0-3, 16-19, 32-35 and 48-51 of the first, 4-7 and so on of the next
  const __m512i first_ = _mm512_unpacklo_epi16(a, c), second = _mm512_unpackhi_epi16(a, c);
  const __m512i third = _mm512_unpacklo_epi16(b, d), fourth = _mm512_unpackhi_epi16(b, d);
  const __m512i low = _mm512_shuffle_i32x4(first_, second, 0x44), high = _mm512_shuffle_i32x4(first_, second, 0xee);
  const __m512i low_2 = _mm512_shuffle_i32x4(third, fourth, 0x44), high_2 = _mm512_shuffle_i32x4(third, fourth, 0xee);
  tiles[0] = _mm512_shuffle_i32x4(low, low_2, 0x88), tiles[1] = _mm512_shuffle_i32x4(low, low_2, 0xdd);
  tiles[2] = _mm512_shuffle_i32x4(high, high_2, 0x88), tiles[3] = _mm512_shuffle_i32x4(high, high_2, 0xdd);
}

template <int kWhole>
void pack_values(const Problem& p, int64_t b, int64_t group, Head& h) {
  const int64_t S4 = (p.keys + kCols - 1) / kCols;
  for (int64_t j = 0; j < p.keys; j += kRows) {
    const auto at = [&](int64_t n) { return beside(p.v.at<float>(b, group, j + n), n, p.v.column, p.Dv, h.copies); };
    const Sixteen<kWhole> rows(p.keys - j, p.Dv, at);
    alignas(64) float scales[16];
    _mm512_store_ps(scales, rows.scale);
    for (int n = 0; n < 16; n++) h.added.data()[j + n] = j + n < p.keys ? std::log(scales[n]) : kNone;
    _mm512_store_ps(h.back.data() + j, all(1.0f) / rows.scale);
    h.numbers &= !_mm512_cmp_ps_mask(rows.scale, rows.scale, _CMP_UNORD_Q);
    for (int64_t e = 0; e < p.Dv; e += kTile)
      for (int n = 0; n < 16 && (j + n) / kCols < S4; n += kCols) {
        const __m512i codes[] = {rows.codes(n, e), rows.codes(n + 1, e), rows.codes(n + 2, e), rows.codes(n + 3, e)};
        __m512i tiles[4];
        interleave(codes, tiles);
        for (int64_t i = 0; i < 4 && e + i * kRows < p.Dv; i++)
          _mm512_storeu_si512(h.values.data() + ((e / kRows + i) * S4 + (j + n) / kCols) * kTile, tiles[i]);
      }
  }
}

template <int kWhole>
void pack_queries(const Problem& p, int64_t b, int64_t group, int64_t begin, int64_t count, int64_t stride, Head& h) {
  for (int64_t m = 0; m < count; m += 16) {
    const auto at = [&](int64_t n) {
      return beside(p.query(b, group, begin + m + n), n, p.q.column, p.D, h.copies);
    };
    const Sixteen<kWhole> rows(count - m, p.D, at);
    _mm512_store_ps(h.query_scale.data() + m, rows.scale * all(p.scale));
    for (int n = 0; n < 16; n++)
      for (int64_t d = 0; d < p.D; d += kTile) {
        const __m512i codes = _mm512_xor_si512(rows.codes(n, d), _mm512_set1_epi8(static_cast<char>(0x80)));
        _mm512_storeu_si512(h.queries.data() + (m + n) * stride + d, codes);
      }
  }
}

struct Scores {  // an epilogue
  static constexpr bool kTakesRows = true;
  const Problem& p;
  const Head& h;
  bool masks;  // whether each row has a mask of its own
  float *scores, *lanes;
  int64_t stride;

  struct Column {
    const Scores& of;
    int64_t n;

    void store(int64_t m, Ints sums) const { of.store_row<1>(m, n, 0, &sums); }
  };
  Column at(int64_t n, int64_t) const { return {*this, n}; }

  template <int N>
  void store_row(int64_t m, int64_t n, int64_t, const Ints* sums) const {
    const Floats scale = all(h.query_scale[m]);
    Floats top = _mm512_load_ps(lanes + m * kWide);
    for (int i = 0; i < N; i++) {
      const int64_t j = n + i * kWide;
      Floats t = floats(add(sums[i], ::load(h.start.data() + j))) * scale;
      t = fma(t, _mm512_load_ps(h.key_scale.data() + j), _mm512_load_ps(h.added.data() + j));
      if (masks) t = masked(p, h.rows[m], j, t);
      _mm512_store_ps(scores + m * stride + j, t);
      top = max(top, t);
    }
    _mm512_store_ps(lanes + m * kWide, top);
  }
};

struct Output {  // an epilogue
  const Problem& p;
  int64_t b, group, begin;
  const float* factor;

  struct Column {
    const Output& of;
    int64_t n;
    Lanes in;

    void store(int64_t m, Ints sums) const {
      ::store(in, of.p.output(of.b, of.group, of.begin + m) + n, floats(sums) * all(of.factor[m]));
    }
  };
  Column at(int64_t n, int64_t count) const { return {*this, n, first(count)}; }
};

// Codes of a row of `count` scores, a multiple of 64; returns the sum of what they are shares of, a part in each lane.
__m512 shares(const float* scores, const float* back, int64_t count, float top, bool numbers, int8_t* codes) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512 sums[] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t j = 0; j < count; j += 64) {
    __m512 w[4];
    __m512i q[4];
    for (int n = 0; n < 4; n++) w[n] = power(_mm512_load_ps(scores + j + n * kWide) - all(top));
    for (int n = 0; n < 4; n++) sums[n % 2] = fma(w[n], _mm512_load_ps(back + j + n * kWide), sums[n % 2]);
    for (int n = 0; n < 4; n++) q[n] = _mm512_cvtps_epi32(w[n]);
    const __m512i packed = _mm512_packus_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
    _mm512_storeu_si512(codes + j, _mm512_permutexvar_epi32(order, packed));
  }
  for (int64_t j = 0; j < count && !numbers; j += kWide) {  // `power` makes numbers of NaN
    const __m512 t = _mm512_load_ps(scores + j);
    sums[0] = _mm512_mask_mov_ps(sums[0], _mm512_cmp_ps_mask(t, t, _CMP_UNORD_Q), t);
  }
  return sums[0] + sums[1];
}

// Scores of a row that a mask of large numbers hides as a whole, which leaves of them nothing but itself: those that are
// alike, and in them the scales of values again. Returns the largest.
float unhidden(float* scores, const float* back, int64_t keys, float top) {
  float most = kNone;
  for (int64_t j = 0; j < keys; j++) most = std::max(most, scores[j] = scores[j] == top ? -std::log(back[j]) : kNone);
  return most;
}

// Shares of M rows, whose scores are there up to `tiles` of keys, and what sums with values are multiplied by.
void share(Head& h, int64_t M, int64_t keys, int64_t tiles, int64_t S, int64_t stride, int64_t bytes, bool numbers) {
  for (int64_t m = 0; m < M; m += 16) {
    __m512 rows[16];
    alignas(64) float tops[16];
    for (int n = 0; n < 16; n++) rows[n] = _mm512_load_ps(h.lanes.data() + (m + n) * kWide);
    const __m512 top = reduce<Most>(rows), infinity = all(-kNone);
    _mm512_store_ps(tops, _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(top, all(kNone), _CMP_NEQ_UQ), top));
    for (int64_t n = 0; n < std::min<int64_t>(16, M - m); n++) {
      float* scores = h.scores.data() + (m + n) * stride;
      for (int64_t j = tiles * kRows; j < S; j += kWide) _mm512_store_ps(scores + j, all(kNone));
      if (tops[n] < kHidden) tops[n] = unhidden(scores, h.back.data(), keys, tops[n]);
      rows[n] = shares(scores, h.back.data(), S, tops[n], numbers, h.shares.data() + (m + n) * bytes);
    }
    const __m512 total = reduce<Sum>(rows);
    __m512 factor = _mm512_maskz_div_ps(_mm512_cmp_ps_mask(total, all(0.0f), _CMP_NEQ_UQ), all(1.0f), total);
    factor = _mm512_mask_sub_ps(factor, _mm512_cmp_ps_mask(top, infinity, _CMP_NLT_UQ), infinity, infinity);  // NaN
    _mm512_store_ps(h.factor.data() + m, factor);
  }
}

void attend(const Problem& p, int64_t b, int64_t group, int64_t begin, int64_t count) {
  static thread_local Head scratch;
  Head& h = scratch;
  const int64_t S = (p.keys + 63) / 64 * 64, tiles = (p.keys + kRows - 1) / kRows;
  const int64_t D4 = (p.D + kCols - 1) / kCols, S4 = (p.keys + kCols - 1) / kCols, channels = (p.Dv + kRows - 1) / kRows;
  const int64_t block = std::min(kQueries, std::max<int64_t>(6, kScores / std::max<int64_t>(S, 1) / 6 * 6));
  const int64_t even = (block + 15) / 16 * 16, row = ((p.D + 63) / 64 | 1) * 64, stride = S + kWide, bytes = S + 64;
  h.keys.grow(S * D4 * kCols), h.values.grow(channels * S4 * kTile), h.start.grow(S);
  for (Buffer<float>* buffer : {&h.key_scale, &h.added, &h.back}) buffer->grow(S);
  for (Buffer<float>* buffer : {&h.query_scale, &h.factor}) buffer->grow(even);
  h.queries.grow(even * row), h.shares.grow(even * bytes), h.scores.grow(even * stride), h.lanes.grow(even * kWide);
  h.rows.grow(even);
  h.numbers = true;
  with_whole(p.D, [&](auto whole) { pack_keys<whole()>(p, b, group, h); });
  with_whole(p.Dv, [&](auto whole) { pack_values<whole()>(p, b, group, h); });
  for (int64_t j = tiles * kRows; j < S; j += kWide) _mm512_store_ps(h.back.data() + j, all(0.0f));
  const bool one = p.mask.data && !p.mask.row && (p.H == p.groups || !p.mask.head);  // mask for all rows
  if (one) {
    const Row seen{p.seen(b, group, begin), p.keys};
    for (int64_t j = 0; j < p.keys; j += kWide) {
      const __m512 added = masked(p, seen, j, _mm512_load_ps(h.added.data() + j));
      _mm512_store_ps(h.added.data() + j, added);
      h.numbers &= !_mm512_cmp_ps_mask(added, added, _CMP_UNORD_Q);
      // a hidden key's scale may be NaN
      const Lanes visible = _mm512_cmp_ps_mask(added, all(kNone), _CMP_NEQ_UQ);
      _mm512_store_ps(h.key_scale.data() + j, _mm512_maskz_load_ps(visible, h.key_scale.data() + j));
    }
  }
  const bool masks = p.mask.data && !one, numbers = h.numbers && (!masks || p.boolean);
  for (int64_t m = 0; m < count; m += block) {
    const int64_t M = std::min(block, count - m);
    with_whole(p.D, [&](auto whole) { pack_queries<whole()>(p, b, group, begin + m, M, row, h); });
    for (int64_t i = 0; i < M; i++) h.rows.data()[i] = {p.seen(b, group, begin + m + i), p.keys};
    std::fill_n(h.lanes.data(), M * kWide, kNone);
    const Scores scores{p, h, masks, h.scores.data(), h.lanes.data(), stride};
    product<true>({h.queries.data(), row}, M, h.keys.data(), D4, tiles, 0, p.keys, scores);
    share(h, M, p.keys, tiles, S, stride, bytes, numbers);
    const Output output{p, b, group, begin + m, h.factor.data()};
    product<true>({h.shares.data(), bytes}, M, h.values.data(), S4, channels, 0, p.Dv, output);
  }
}

bool attention(const Problem& p) {
  if (p.keys > std::numeric_limits<int32_t>::max() / (255 * 127)) return false;  // sums could overflow
  each_head(p, 0, [&](int64_t b, int64_t group, int64_t begin, int64_t count) { attend(p, b, group, begin, count); });
  return true;
}

#else

bool attention(const Problem&) { return false; }

#endif

}  // namespace

extern "C" __attribute__((visibility("hidden"))) AOTITorchError aoti_torch_cpu_int8_attention(
    AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle* mask, double scale,
    AtenTensorHandle* out) {
  Problem p;
  if (AOTITorchError error = open(q, k, v, mask, scale, out, &p)) return error;
  return attention(p) ? AOTI_TORCH_SUCCESS : AOTI_TORCH_FAILURE;
}
