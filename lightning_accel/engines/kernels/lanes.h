// A register of channels, 16 with AVX512 and 8 with AVX2: what epilogues and the int4 kernels are written in.
// LANES is defined where there is one. Floats have the operators of the compiler's vectors; those of integers are of
// 64-bit lanes.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define VNNI 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define AVX2 1
#endif
#if defined(VNNI) || defined(AVX2)
#include <immintrin.h>
#define LANES 1
#endif

namespace {

#ifdef VNNI

using Ints = __m512i;
using Floats = __m512;
using Lanes = __mmask16;
constexpr int64_t kLanes = 16;

inline Lanes first(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

inline Ints load(const void* p) { return _mm512_loadu_si512(p); }
inline Ints load(Lanes in, const int32_t* p) { return _mm512_maskz_loadu_epi32(in, p); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline Floats load(Lanes in, const float* p) { return _mm512_maskz_loadu_ps(in, p); }
inline Floats load_halves(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store(int32_t* p, Ints x) { _mm512_storeu_si512(p, x); }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline void store(Lanes in, float* p, Floats x) { _mm512_mask_storeu_ps(p, in, x); }
inline void store_bytes(uint8_t* p, Ints x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}
inline void store_bytes(int64_t count, uint8_t* p, Ints x) {
  if (count >= kLanes) store_bytes(p, x);
  else _mm_mask_storeu_epi8(p, first(count), _mm512_cvtepi32_epi8(x));
}

inline Ints all(int32_t x) { return _mm512_set1_epi32(x); }
inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Ints bits(Floats x) { return _mm512_castps_si512(x); }
inline Floats floats(Ints x) { return _mm512_cvtepi32_ps(x); }
inline Ints ints(Floats x) { return _mm512_cvtps_epi32(x); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints max(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
inline Ints halves_of_bytes(Ints x) { return _mm512_srli_epi16(x, 4); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats abs(Floats x) { return _mm512_abs_ps(x); }
inline Floats round(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats number_or(Floats x, Floats other) {  // in place of a NaN
  return _mm512_mask_mov_ps(other, _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q), x);
}
inline Floats or_sign(Floats x, Floats of) {  // x | (of & sign)
  const Ints sign = bits(all(-0.0f));
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(bits(x), bits(of), sign, 0xf8));
}

#elif defined(AVX2)

using Ints = __m256i;
using Floats = __m256;
using Lanes = __m256i;
constexpr int64_t kLanes = 8;

inline Lanes first(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline Ints load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline Ints load(Lanes in, const int32_t* p) { return _mm256_maskload_epi32(p, in); }
inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline Floats load(Lanes in, const float* p) { return _mm256_maskload_ps(p, in); }
inline Floats load_halves(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store(int32_t* p, Ints x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
inline void store(Lanes in, float* p, Floats x) { _mm256_maskstore_ps(p, in, x); }
inline void store_bytes(uint8_t* p, Ints x) {
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
inline void store_bytes(int64_t count, uint8_t* p, Ints x) {
  uint8_t bytes[kLanes];
  if (count >= kLanes) return store_bytes(p, x);
  store_bytes(bytes, x);
  std::memcpy(p, bytes, std::max<int64_t>(count, 0));
}

inline Ints all(int32_t x) { return _mm256_set1_epi32(x); }
inline Floats all(float x) { return _mm256_set1_ps(x); }
inline Ints bits(Floats x) { return _mm256_castps_si256(x); }
inline Floats floats(Ints x) { return _mm256_cvtepi32_ps(x); }
inline Ints ints(Floats x) { return _mm256_cvtps_epi32(x); }
inline Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints max(Ints a, Ints b) { return _mm256_max_epi32(a, b); }
inline Ints halves_of_bytes(Ints x) { return _mm256_srli_epi16(x, 4); }
inline Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats abs(Floats x) { return _mm256_andnot_ps(all(-0.0f), x); }
inline Floats round(Floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats number_or(Floats x, Floats other) {
  return _mm256_blendv_ps(other, x, _mm256_cmp_ps(x, x, _CMP_ORD_Q));
}
inline Floats or_sign(Floats x, Floats of) { return _mm256_or_ps(x, _mm256_and_ps(of, all(-0.0f))); }
#endif

#ifdef LANES
inline Ints four(const int8_t* codes) {  // in each lane
  int32_t as_one;
  std::memcpy(&as_one, codes, sizeof as_one);
  return all(as_one);
}
#endif

}  // namespace
