// What the attention operators share: their C interface, and heads and rows as tasks of threads.

#pragma once

#include "attention.h"
#include "shim.h"

namespace {

constexpr int64_t kParallelProducts = 1 << 18;  // below, threads cost more than they give

// Calls attend(b, group, begin, count) for all rows; `whole` rows or fewer of a head stay together.
template <class Attend>
void each_head(const Problem& p, int64_t whole, const Attend& attend) {
  const int64_t rows = p.rows(), heads = p.B * p.groups;
  if (!heads || !rows) return;
#ifdef _OPENMP
  const int64_t threads = omp_get_max_threads();
  if (threads > 1 && heads * rows * p.keys * (p.D + p.Dv) >= kParallelProducts) {
    // rows of a head are divided only where heads do not suffice: each part packs the keys again
    const int64_t parts = rows <= whole ? 1 : std::clamp<int64_t>(2 * threads / heads, 1, (rows + 95) / 96);
    const int64_t size = ((rows + parts - 1) / parts + 5) / 6 * 6;
#pragma omp parallel for schedule(dynamic)
    for (int64_t t = 0; t < heads * parts; t++) {
      const int64_t head = t / parts, begin = t % parts * size;
      if (begin < rows) attend(head / p.groups, head % p.groups, begin, std::min(size, rows - begin));
    }
    return;
  }
#endif
  for (int64_t h = 0; h < heads; h++) attend(h / p.groups, h % p.groups, 0, rows);
}

// Calls attend(b, from, to) for all heads of keys, as many at once as there are threads for.
template <class Attend>
void each_part(const Problem& p, const Attend& attend) {
  if (!p.rows()) return;
#ifdef _OPENMP
  const int64_t threads = omp_get_max_threads();
  if (threads > 1 && p.B * p.groups * p.rows() * p.keys * (p.D + p.Dv) >= kParallelProducts) {
    const int64_t parts = std::clamp<int64_t>((threads + p.B - 1) / p.B, 1, p.groups);
#pragma omp parallel for schedule(dynamic)
    for (int64_t t = 0; t < p.B * parts; t++) {
      const int64_t part = t % parts;
      attend(t / parts, p.groups * part / parts, p.groups * (part + 1) / parts);
    }
    return;
  }
#endif
  for (int64_t b = 0; b < p.B; b++) attend(b, 0, p.groups);
}

// Sizes and strides of the last four dimensions; those that are missing or 1 are broadcast.
AOTITorchError view(AtenTensorHandle tensor, View* to, int64_t* shape) {
  int64_t dims, *sizes, *strides;
  void* p;
  if (aoti_torch_get_dim(tensor, &dims) || dims > 4 || aoti_torch_get_sizes(tensor, &sizes) ||
      aoti_torch_get_strides(tensor, &strides) || aoti_torch_get_data_ptr(tensor, &p))
    return AOTI_TORCH_FAILURE;
  int64_t* steps[4] = {&to->batch, &to->head, &to->row, &to->column};
  for (int64_t d = 0; d < 4; d++) {
    const int64_t own = d - (4 - dims);
    shape[d] = own < 0 ? 1 : sizes[own];
    *steps[d] = shape[d] == 1 ? 0 : strides[own];
  }
  to->data = p;
  return AOTI_TORCH_SUCCESS;
}

// The same of float32 [B, heads, rows, columns], where a size of `columns` says nothing of its stride.
AOTITorchError operand(AtenTensorHandle tensor, View* to, int64_t* shape) {
  int64_t dims;
  int32_t dtype;
  if (aoti_torch_get_dim(tensor, &dims) || dims != 4 || aoti_torch_get_dtype(tensor, &dtype) ||
      dtype != aoti_torch_dtype_float32() || view(tensor, to, shape))
    return AOTI_TORCH_FAILURE;
  if (shape[3] == 1) to->column = 1;
  return AOTI_TORCH_SUCCESS;
}

bool fits(int64_t size, int64_t whole) { return size == whole || size == 1; }

// Checks the inputs, and allocates the output.
AOTITorchError open(AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle* mask, double scale,
                    AtenTensorHandle* out, Problem* p) {
  int64_t a[4], c[4], e[4], m[4];
  if (operand(q, &p->q, a) || operand(k, &p->k, c) || operand(v, &p->v, e)) return AOTI_TORCH_FAILURE;
  p->B = a[0], p->H = a[1], p->queries = a[2], p->D = a[3], p->groups = c[1], p->keys = c[2], p->Dv = e[3];
  const bool alike = fits(c[0], p->B) && fits(e[0], p->B) && c[3] == p->D && e[1] == c[1] && e[2] == c[2];
  if (!alike || !p->groups || p->H % p->groups) return AOTI_TORCH_FAILURE;
  if (mask) {
    int32_t dtype;
    if (view(*mask, &p->mask, m) || aoti_torch_get_dtype(*mask, &dtype)) return AOTI_TORCH_FAILURE;
    p->boolean = dtype == aoti_torch_dtype_bool();
    if (!p->boolean && dtype != aoti_torch_dtype_float32()) return AOTI_TORCH_FAILURE;
    if (!fits(m[0], p->B) || !fits(m[1], p->H) || !fits(m[2], p->queries) || !fits(m[3], p->keys))
      return AOTI_TORCH_FAILURE;
  }
  p->scale = static_cast<float>(scale);
  const int64_t shape[4] = {p->B, p->H, p->queries, p->Dv};
  const int64_t strides[4] = {p->queries * p->H * p->Dv, p->Dv, p->H * p->Dv, 1};
  if (aoti_torch_empty_strided(4, shape, strides, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, out))
    return AOTI_TORCH_FAILURE;
  void* y;
  if (aoti_torch_get_data_ptr(*out, &y)) return AOTI_TORCH_FAILURE;
  p->out = static_cast<float*>(y);
  return AOTI_TORCH_SUCCESS;
}

}  // namespace
