// Attention in float32, which means what lightning_accel.engines.attention means. A row's result does not depend on the number
// of threads.

#include "attention_call.h"
#include "attention_few.h"
#include "attention_many.h"
#include "attention_tiles.h"

namespace {

#ifdef VNNI

void attend(const Problem& p, int64_t b, int64_t group, int64_t begin, int64_t count) {
#ifdef AMX_FLOAT
  const bool tiles = p.k.column == 1 && p.v.column == 1 && p.q.column == 1 && p.rows() >= kTiled && p.keys && amx_granted();
  if (tiles && attend_tiles(p, b, group, begin, count)) return;
#endif
  attend_many(p, b, group, begin, count);
}

#else  // any other CPU: correct, not fast

void attend(const Problem& p, int64_t b, int64_t group, int64_t begin, int64_t count) {
  float* s = scratch().take(p.keys);
  for (int64_t r = begin; r < begin + count; r++) {
    const float* q = p.query(b, group, r);
    const void* mask = p.seen(b, group, r);
    const int64_t keys = p.limit(r);
    float top = kNone;
    for (int64_t j = 0; j < keys; j++) {
      const float* k = p.k.at<float>(b, group, j);
      double sum = 0.0;
      for (int64_t d = 0; d < p.D; d++) sum += double(q[d * p.q.column]) * k[d * p.k.column];
      s[j] = static_cast<float>(sum * p.scale);
      if (mask && p.boolean) s[j] += static_cast<const uint8_t*>(mask)[j * p.mask.column] ? 0.0f : kNone;
      if (mask && !p.boolean) s[j] += static_cast<const float*>(mask)[j * p.mask.column];
      top = std::max(top, s[j]);
    }
    double sum = 0.0;
    for (int64_t j = 0; j < keys; j++) sum += s[j] = std::exp(s[j] - (top == kNone ? 0.0f : top));
    float* out = p.output(b, group, r);
    for (int64_t d = 0; d < p.Dv; d++) {
      double o = 0.0;
      for (int64_t j = 0; j < keys; j++) o += double(s[j]) * p.v.at<float>(b, group, j)[d * p.v.column];
      out[d] = static_cast<float>(o / (sum == 0.0 ? 1.0 : sum));
    }
  }
}

#endif

void attention(const Problem& p) {
#ifdef VNNI
  if (p.k.column == 1 && p.v.column == 1 && p.rows() <= kFew)
    return each_part(p, [&](int64_t b, int64_t from, int64_t to) { attend_few(p, b, from, to); });
#endif
  each_head(p, kFew, [&](int64_t b, int64_t group, int64_t begin, int64_t count) { attend(p, b, group, begin, count); });
}

}  // namespace

extern "C" __attribute__((visibility("hidden"))) AOTITorchError aoti_torch_cpu_attention(
    AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle* mask, int32_t is_causal, double scale,
    AtenTensorHandle* out) {
  Problem p;
  p.causal = is_causal;
  if (AOTITorchError error = open(q, k, v, mask, scale, out, &p)) return error;
  attention(p);
  return AOTI_TORCH_SUCCESS;
}
