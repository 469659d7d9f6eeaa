// What the operators' C interfaces share: a float32 input [..., K] in rows, an output [..., N] of the same leading shape.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace {

struct Call {
  const float* x;
  float* y;
  int64_t M, N, K;
};

template <class T>
AOTITorchError data(AtenTensorHandle tensor, const T** pointer) {
  void* p;
  if (aoti_torch_get_data_ptr(tensor, &p)) return AOTI_TORCH_FAILURE;
  *pointer = static_cast<const T*>(p);
  return AOTI_TORCH_SUCCESS;
}

// Checks `x`, allocates the output with as many channels as `channels` [N] has elements.
inline AOTITorchError open(AtenTensorHandle x, AtenTensorHandle channels, AtenTensorHandle* out, Call* call) {
  constexpr int64_t kMaxDims = 8;
  int32_t dtype;
  bool contiguous;
  int64_t dims, *sizes, *n;
  if (aoti_torch_get_dtype(x, &dtype) || dtype != aoti_torch_dtype_float32()) return AOTI_TORCH_FAILURE;
  if (aoti_torch_is_contiguous(x, &contiguous) || !contiguous) return AOTI_TORCH_FAILURE;
  if (aoti_torch_get_dim(x, &dims) || dims < 1 || dims > kMaxDims) return AOTI_TORCH_FAILURE;
  if (aoti_torch_get_sizes(x, &sizes) || aoti_torch_get_sizes(channels, &n)) return AOTI_TORCH_FAILURE;
  int64_t shape[kMaxDims], strides[kMaxDims], step = 1;
  call->M = 1;
  for (int64_t d = 0; d + 1 < dims; d++) call->M *= shape[d] = sizes[d];
  call->K = sizes[dims - 1];
  call->N = shape[dims - 1] = n[0];
  for (int64_t d = dims - 1; d >= 0; d--) {
    strides[d] = step;
    step *= shape[d];
  }
  if (data(x, &call->x)) return AOTI_TORCH_FAILURE;
  if (AOTITorchError error = aoti_torch_empty_strided(dims, shape, strides, aoti_torch_dtype_float32(),
                                                      aoti_torch_device_type_cpu(), 0, out))
    return error;
  void* y;
  if (aoti_torch_get_data_ptr(*out, &y)) return AOTI_TORCH_FAILURE;
  call->y = static_cast<float*>(y);
  return AOTI_TORCH_SUCCESS;
}

}  // namespace
