// Integer products: rows of 8-bit codes by tiles of int8 weights, int32 sums handed to an epilogue.
//
// Weights come in tiles of 16 channels by 4 inputs, [ceil(N/16), ceil(K/4), 16, 4], one 512-bit register each: what one
// VNNI instruction reads, and 16 of them below each other are what one AMX instruction reads. Codes are rows of `stride`
// bytes, padded with zeros, signed (symmetric quantization) or unsigned (with a zero point).
//
// An epilogue is an object with
//     Column at(int64_t n, int64_t count)              // of channels n .. n + count, at most a register, with
//         void store(int64_t m, Ints sums)             // their sums in row m
// where there are LANES, so that what depends on the channels may stay in registers from row to row, and elsewhere with
//     void store(int64_t m, int64_t n, int64_t count, const int32_t* sums)
// For signed codes it has besides
//     int32_t start(int64_t m)                         // -128 * sum of the codes of row m
// and, on AVX512, it may take several registers at once, of `count` channels:
//     template <int N> void store_row(int64_t m, int64_t n, int64_t count, const Ints* sums)
// which it says by
//     static constexpr bool kTakesRows = true

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "lanes.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(VNNI) && defined(__AMX_INT8__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define AMX 1
#endif

namespace {

constexpr int64_t kRows = 16, kCols = 4, kTile = kRows * kCols;  // of a tile, and its bytes
constexpr int64_t kPanel = 4;                                    // tiles of channels that one task computes
constexpr int64_t kTileRows = 5;                                 // rows from which AMX is faster than VNNI
constexpr int64_t kParallel = 1 << 21;                           // products below which threads cost more than they give
constexpr int64_t kReading = 8;                                  // rows that reading the weights counts as, at least

// Scratch memory on a border of cache lines, kept from call to call. AMX reads rows of 64 bytes, and where each lies across
// two lines the products take up to twice as long.
template <class T>
class Buffer {
 public:
  void grow(int64_t count) {
    memory_.resize(std::max<size_t>(memory_.size(), count + 64 / sizeof(T)));
    data_ = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.data()) + 63) & ~uintptr_t{63});
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  std::vector<T> memory_;
  T* data_ = nullptr;
};

// Weights that are read soon, on their way to the second cache. The products of a single row wait for memory: they ask for
// the next channels' while they work on these. One register at a time, as AVX2 multiplies int8, it only costs.
inline void expect(const void* p) { __builtin_prefetch(p, 0, 2); }

struct Codes {
  const int8_t* data;  // [M rounded up to 16, stride]
  int64_t stride;      // bytes, a multiple of 64 and at least K
};

#ifdef VNNI

template <class Out, class = void>
struct TakesRows : std::false_type {};
template <class Out>
struct TakesRows<Out, std::void_t<decltype(Out::kTakesRows)>> : std::true_type {};

// sums + u * s, of unsigned by signed bytes. Of the intrinsic in its place GCC 12 keeps the sums of `block` in memory, and
// it takes 2.4 times as long.
inline __m512i dot(__m512i sums, __m512i u, __m512i s) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(u), "v"(s));
  return sums;
}

template <bool kUnsigned, int M, int N, class Out>  // M rows by N tiles of channels, sums in registers over all of K
inline void block(const Codes& x, int64_t m, const int8_t* w, int64_t K4, int64_t n, int64_t channels, const Out& out) {
  __m512i sums[M][N];
  // the instruction multiplies unsigned by signed bytes: of signed codes, a weight's sign bit is flipped (w + 128) and
  // 128 * sum(codes) taken off
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) {
      if constexpr (kUnsigned) sums[i][j] = _mm512_setzero_si512();
      else sums[i][j] = _mm512_set1_epi32(out.start(m + i));
    }
  for (int64_t k = 0; k < K4; k++) {
    __m512i tiles[N];
    for (int j = 0; j < N; j++) {
      tiles[j] = _mm512_loadu_si512(w + (j * K4 + k) * kTile);
      if (M == 1) expect(w + ((j + N) * K4 + k) * kTile);
      if (!kUnsigned) tiles[j] = _mm512_xor_si512(tiles[j], flip);
    }
    for (int i = 0; i < M; i++) {
      int32_t four;
      std::memcpy(&four, x.data + (m + i) * x.stride + k * kCols, 4);
      const __m512i codes = _mm512_set1_epi32(four);
      for (int j = 0; j < N; j++)
        sums[i][j] = kUnsigned ? dot(sums[i][j], codes, tiles[j]) : dot(sums[i][j], tiles[j], codes);
    }
  }
  if constexpr (N > 1 && TakesRows<Out>::value) {
    for (int i = 0; i < M; i++) out.template store_row<N>(m + i, n, channels, sums[i]);
    return;
  }
  for (int i = 0; i < M; i++)  // row by row: the sums of one lie beside each other in memory
    for (int j = 0; j < N; j++) out.at(n + j * kRows, channels - j * kRows).store(m + i, sums[i][j]);
}

template <bool kUnsigned, int N, class Out>
inline void panel_vnni(const Codes& x, int64_t M, const int8_t* w, int64_t K4, int64_t n, int64_t channels,
                       const Out& out) {
  int64_t m = 0;
  for (; m + 6 <= M; m += 6) block<kUnsigned, 6, N>(x, m, w, K4, n, channels, out);
  for (; m + 2 <= M; m += 2) block<kUnsigned, 2, N>(x, m, w, K4, n, channels, out);
  for (; m < M; m++) block<kUnsigned, 1, N>(x, m, w, K4, n, channels, out);
}
#endif

#ifdef AMX

// The system grants a process the use of AMX on demand; where it refuses, the vector path computes the same.
inline bool amx_granted() {
  static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
  return granted;
}

// GCC's AMX intrinsics do not tell the compiler all of the memory that they read and write.
inline void in_memory(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Our eight tiles, each 16 rows of 64 bytes, for as long as it lives; then those of whoever used them before: oneDNN
// remembers what it configured in a thread and does not configure it again.
class Tiles {
 public:
  Tiles() {
    in_memory(&before_);
    _tile_storeconfig(&before_);
    TileConfig config;
    std::fill(config.bytes, config.bytes + 8, 64);
    std::fill(config.rows, config.rows + 8, 16);
    in_memory(&config);
    _tile_loadconfig(&config);
  }
  ~Tiles() {
    in_memory(&before_);
    _tile_loadconfig(&before_);
  }

 private:
  TileConfig before_;
};

// The sums of 32 rows by two tiles of channels, on their way from the tile registers to an epilogue. It takes them row by
// row between the products of the next block, which run meanwhile: the two use different units of the core.
template <class Out>
class Pending {
 public:
  Pending(int64_t n, int64_t channels, const Out& out) : n_(n), channels_(channels), out_(out) {}

  int32_t* next() const { return sums_[turn_][0]; }  // where to store the four registers of the next block
  void put(int64_t m, int64_t rows, int64_t tile, bool two) {
    in_memory(sums_);
    ready_ = sums_[turn_][0], turn_ ^= 1;
    m_ = m, rows_ = rows, at_ = 0, from_ = tile * kRows, two_ = two;
  }
  void take(int64_t most) {  // up to as many rows
    const int64_t from = at_, to = std::min(rows_, at_ + most);
    at_ = to;
    if (from == to) return;
    const auto left = out_.at(n_ + from_, channels_ - from_);
    if (!two_) {
      for (int64_t i = from; i < to; i++) left.store(m_ + i, sums(i, 0));
      return;
    }
    const auto right = out_.at(n_ + from_ + kRows, channels_ - from_ - kRows);
    for (int64_t i = from; i < to; i++) {
      left.store(m_ + i, sums(i, 0));
      right.store(m_ + i, sums(i, 1));
    }
  }

 private:
  __m512i sums(int64_t row, int64_t tile) const {
    return _mm512_load_si512(ready_ + (row / 16 * 2 + tile) * 256 + row % 16 * 16);
  }

  alignas(64) mutable int32_t sums_[2][4][256];
  const int32_t* ready_ = nullptr;
  int64_t turn_ = 0, m_ = 0, rows_ = 0, at_ = 0, from_ = 0;
  bool two_ = false;
  const int64_t n_, channels_;
  const Out out_;
};

template <bool kUnsigned, class Out>  // 32 (or 16) rows by 32 (or 16) channels at a time
void panel_amx(const Codes& x, int64_t M, const int8_t* w, int64_t K4, int64_t tiles, int64_t n, int64_t channels,
               const Out& out) {
  alignas(64) int8_t rest[2][1024];
  const Tiles configured;
  Pending<Out> pending(n, channels, out);
  const int64_t whole = K4 / 16, left = K4 % 16, steps = whole + (left > 0), share = 32 / std::max<int64_t>(steps, 1) + 1;
  for (int64_t t = 0; t < tiles; t += 2) {
    const bool two = t + 1 < tiles;
    const int8_t* first_w = w + t * K4 * kTile;
    const int8_t* second_w = two ? first_w + K4 * kTile : first_w;
    if (left) {  // the last inputs, padded with zeros: past the end of the last tile there may be no memory
      std::memset(rest, 0, sizeof rest);
      std::memcpy(rest[0], first_w + whole * 1024, left * kTile);
      std::memcpy(rest[1], second_w + whole * 1024, left * kTile);
    }
    in_memory(rest);
    for (int64_t m = 0; m < M; m += 32) {
      const bool both = m + 16 < M;
      const int8_t* a = x.data + m * x.stride;
      const int8_t* b = both ? a + 16 * x.stride : a;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t k = 0; k < steps; k++) {
        const bool last = k == whole;
        _tile_loadd(6, last ? rest[0] : first_w + k * 1024, 64);
        _tile_loadd(7, last ? rest[1] : second_w + k * 1024, 64);
        _tile_loadd(4, a + k * 64, x.stride);
        _tile_loadd(5, b + k * 64, x.stride);
        if (kUnsigned) {
          _tile_dpbusd(0, 4, 6);
          _tile_dpbusd(1, 4, 7);
          _tile_dpbusd(2, 5, 6);
          _tile_dpbusd(3, 5, 7);
        } else {
          _tile_dpbssd(0, 4, 6);
          _tile_dpbssd(1, 4, 7);
          _tile_dpbssd(2, 5, 6);
          _tile_dpbssd(3, 5, 7);
        }
        pending.take(share);
      }
      int32_t* sums = pending.next();
      _tile_stored(0, sums, 64);
      _tile_stored(1, sums + 256, 64);
      _tile_stored(2, sums + 512, 64);
      _tile_stored(3, sums + 768, 64);
      pending.put(m, std::min<int64_t>(32, M - m), t, two);
    }
  }
  pending.take(32);
}
#endif

#ifdef AVX2

constexpr int64_t kChunk = 24;  // rows that meet the weights while they are in the cache

template <class Code>
struct Chunk {  // of rows of codes
  const Code* data;
  int64_t stride;
};

// What registers of weights, codes and sums are: weights_at, codes_at, add_products, `eight` channels' sums. Products
// are in assembly for the reason that `dot` above is.
#ifdef __AVXVNNI__

using Code = int8_t;
constexpr int64_t kWide = 8;     // channels in a register
constexpr bool kFlipped = true;  // sign bits of weights, for signed codes, as above

template <bool kUnsigned>
inline __m256i weights_at(const int8_t* w) {
  const __m256i weights = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
  return kUnsigned ? weights : _mm256_xor_si256(weights, _mm256_set1_epi8(static_cast<char>(0x80)));
}

inline __m256i codes_at(const int8_t* codes) { return four(codes); }

inline __m256i dot(__m256i sums, __m256i u, __m256i s) {
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(u), "x"(s));
  return sums;
}

template <bool kUnsigned>
inline __m256i add_products(__m256i sums, __m256i codes, __m256i weights) {
  return kUnsigned ? dot(sums, codes, weights) : dot(sums, weights, codes);
}

inline Ints eight(const __m256i* sums) { return *sums; }

template <bool kUnsigned>
inline Chunk<int8_t> chunk_of(const Codes& x, int64_t m, int64_t, int64_t) {
  return {x.data + m * x.stride, x.stride};
}

#else  // 16 bits hold codes of either sign, and _mm256_madd_epi16 adds their products in pairs: a channel has two sums

using Code = int16_t;
constexpr int64_t kWide = 4;
constexpr bool kFlipped = false;

template <bool kUnsigned>
inline __m256i weights_at(const int8_t* w) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
}

inline __m256i codes_at(const int16_t* codes) {
  int64_t four;
  std::memcpy(&four, codes, sizeof four);
  return _mm256_set1_epi64x(four);
}

template <bool kUnsigned>
inline __m256i add_products(__m256i sums, __m256i codes, __m256i weights) {
  __m256i pairs;
  __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sums), "=&x"(pairs) : "x"(codes), "x"(weights));
  return sums;
}

inline Ints eight(const __m256i* sums) {
  return _mm256_permute4x64_epi64(_mm256_hadd_epi32(sums[0], sums[1]), 0xd8);  // from the order 0 1 4 5 2 3 6 7
}

template <bool kUnsigned>
inline Chunk<int16_t> chunk_of(const Codes& x, int64_t m, int64_t count, int64_t K) {
  static thread_local Buffer<int16_t> buffer;
  const int64_t stride = x.stride + 32;  // an odd number of cache lines
  buffer.grow(kChunk * stride);
  for (int64_t i = 0; i < count; i++)
    for (int64_t k = 0; k < K; k += 16) {
      const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x.data + (m + i) * x.stride + k));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(buffer.data() + i * stride + k),
                          kUnsigned ? _mm256_cvtepu8_epi16(codes) : _mm256_cvtepi8_epi16(codes));
    }
  return {buffer.data(), stride};
}
#endif

template <bool kUnsigned, int M, int N, class Out>  // M rows by N registers of channels
inline void block(const Chunk<Code>& x, int64_t m, const int8_t* w, int64_t K4, int64_t n, int64_t channels,
                  const Out& out) {
  __m256i sums[M][N];
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) {
      if constexpr (kFlipped && !kUnsigned) sums[i][j] = all(out.start(m + i));
      else sums[i][j] = _mm256_setzero_si256();
    }
  for (int64_t k = 0; k < K4; k++) {
    __m256i weights[N];
    for (int j = 0; j < N; j++) weights[j] = weights_at<kUnsigned>(w + k * kTile + j * kWide * kCols);
    for (int i = 0; i < M; i++) {
      const __m256i codes = codes_at(x.data + i * x.stride + k * kCols);
      for (int j = 0; j < N; j++) sums[i][j] = add_products<kUnsigned>(sums[i][j], codes, weights[j]);
    }
  }
  for (int64_t j = 0; j < N; j += kLanes / kWide) {
    const auto column = out.at(n + j * kWide, channels - j * kWide);
    for (int i = 0; i < M; i++) column.store(m + i, eight(&sums[i][j]));
  }
}

template <bool kUnsigned, class Out>
void panel_avx2(const Codes& x, int64_t M, const int8_t* w, int64_t K4, int64_t tiles, int64_t n, int64_t channels,
                const Out& out) {
  for (int64_t begin = 0; begin < M; begin += kChunk) {
    const int64_t count = std::min(kChunk, M - begin);
    const Chunk<Code> chunk = chunk_of<kUnsigned>(x, begin, count, K4 * kCols);
    for (int64_t t = 0; t < tiles; t++) {
      const auto multiply = [&](int64_t m, auto rows) {
        constexpr int64_t N = rows > 2 ? 2 : kRows / kWide;  // there are 16 registers
        for (int64_t r = t * kRows; r < (t + 1) * kRows; r += N * kWide)
          block<kUnsigned, rows, N>({chunk.data + m * chunk.stride, chunk.stride}, begin + m,
                                    w + t * K4 * kTile + r % kRows * kCols, K4, n + r, channels - r, out);
      };
      int64_t m = 0;
      for (; m + 6 <= count; m += 6) multiply(m, std::integral_constant<int, 6>());
      for (; m + 2 <= count; m += 2) multiply(m, std::integral_constant<int, 2>());
      for (; m < count; m++) multiply(m, std::integral_constant<int, 1>());
    }
  }
}
#endif

#ifndef LANES  // any other CPU: the same numbers, as fast as the compiler makes it

template <bool kUnsigned, class Out>
void panel_plain(const Codes& x, int64_t M, const int8_t* w, int64_t K4, int64_t tiles, int64_t n, int64_t channels,
                 const Out& out) {
  for (int64_t m = 0; m < M; m++)
    for (int64_t t = 0; t < tiles; t++) {
      int32_t sums[kRows] = {};
      const int8_t* codes = x.data + m * x.stride;
      for (int64_t k = 0; k < K4; k++, codes += kCols) {
        const int8_t* tile = w + (t * K4 + k) * kTile;
        for (int r = 0; r < kRows; r++)
          for (int c = 0; c < kCols; c++)
            sums[r] += int32_t(tile[r * kCols + c]) * (kUnsigned ? uint8_t(codes[c]) : codes[c]);
      }
      out.store(m, n + t * kRows, channels - t * kRows, sums);
    }
}
#endif

// Products of all rows with `tiles` tiles of channels, from channel n on.
template <bool kUnsigned, class Out>
void product(const Codes& x, int64_t M, const int8_t* w, int64_t K4, int64_t tiles, int64_t n, int64_t channels,
             const Out& out) {
#ifdef AMX
  if (M >= kTileRows && amx_granted()) return panel_amx<kUnsigned>(x, M, w, K4, tiles, n, channels, out);
#endif
#ifdef VNNI
  for (; tiles > 0; tiles -= kPanel, w += kPanel * K4 * kTile, n += kPanel * kRows, channels -= kPanel * kRows) {
    switch (tiles) {
      case 1: panel_vnni<kUnsigned, 1>(x, M, w, K4, n, channels, out); break;
      case 2: panel_vnni<kUnsigned, 2>(x, M, w, K4, n, channels, out); break;
      case 3: panel_vnni<kUnsigned, 3>(x, M, w, K4, n, channels, out); break;
      default: panel_vnni<kUnsigned, 4>(x, M, w, K4, n, channels, out);
    }
  }
#elif defined(AVX2)
  panel_avx2<kUnsigned>(x, M, w, K4, tiles, n, channels, out);
#else
  panel_plain<kUnsigned>(x, M, w, K4, tiles, n, channels, out);
#endif
}

// For `run`: multiply(p) for one panel after the other.
template <class Multiply>
auto each(const Multiply& multiply) {
  return [&multiply](int64_t from, int64_t to) {
    for (int64_t p = from; p < to; p++) multiply(p);
  };
}

// What products of M rows with so many weights are worth, in products: those of few rows wait for the weights.
inline int64_t work(int64_t M, int64_t weights) { return std::max(M, kReading) * weights; }

// Quantizes M rows, then multiplies them by panels of channels, from the first to before the last, in parallel where it
// pays.
template <class Quantize, class Multiply>
void run(int64_t M, int64_t panels, int64_t products, const Quantize& quantize, const Multiply& multiply) {
#ifdef _OPENMP
  if (omp_get_max_threads() > 1 && products >= kParallel) {
#pragma omp parallel
    {
#pragma omp for
      for (int64_t m = 0; m < M; m++) quantize(m);
      const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
      multiply(panels * thread / threads, panels * (thread + 1) / threads);
    }
    return;
  }
#endif
  for (int64_t m = 0; m < M; m++) quantize(m);
  multiply(0, panels);
}

}  // namespace
