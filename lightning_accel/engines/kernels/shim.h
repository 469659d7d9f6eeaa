// What the operators' C interfaces share: an input [..., K] in rows, a float32 output [..., N] of the same leading shape.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace {

constexpr int64_t kMaxDims = 8;

inline int32_t dtype_of(const float*) { return aoti_torch_dtype_float32(); }
inline int32_t dtype_of(const uint8_t*) { return aoti_torch_dtype_uint8(); }

template <class T>
AOTITorchError data(AtenTensorHandle tensor, const T** pointer) {
  void* p;
  if (aoti_torch_get_data_ptr(tensor, &p)) return AOTI_TORCH_FAILURE;
  *pointer = static_cast<const T*>(p);
  return AOTI_TORCH_SUCCESS;
}

// Checks that `x` is of T, contiguous and of 1 to kMaxDims dimensions.
template <class T>
AOTITorchError rows(AtenTensorHandle x, const T** pointer, int64_t* dims, int64_t** sizes) {
  int32_t dtype;
  bool contiguous;
  if (aoti_torch_get_dtype(x, &dtype) || dtype != dtype_of(*pointer)) return AOTI_TORCH_FAILURE;
  if (aoti_torch_is_contiguous(x, &contiguous) || !contiguous) return AOTI_TORCH_FAILURE;
  if (aoti_torch_get_dim(x, dims) || *dims < 1 || *dims > kMaxDims) return AOTI_TORCH_FAILURE;
  if (aoti_torch_get_sizes(x, sizes)) return AOTI_TORCH_FAILURE;
  return data(x, pointer);
}

// Allocates a contiguous output.
template <class T>
AOTITorchError allocate(int64_t dims, const int64_t* shape, AtenTensorHandle* out, T** y) {
  int64_t strides[kMaxDims], step = 1;
  for (int64_t d = dims - 1; d >= 0; d--) {
    strides[d] = step;
    step *= shape[d];
  }
  if (AOTITorchError error = aoti_torch_empty_strided(dims, shape, strides, dtype_of(*y),
                                                      aoti_torch_device_type_cpu(), 0, out))
    return error;
  void* p;
  if (aoti_torch_get_data_ptr(*out, &p)) return AOTI_TORCH_FAILURE;
  *y = static_cast<T*>(p);
  return AOTI_TORCH_SUCCESS;
}

template <class T>
struct Call {
  const T* x;
  float* y;
  int64_t M, N, K;
};

// Checks `x`, allocates the output of N channels.
template <class T>
AOTITorchError open(AtenTensorHandle x, int64_t N, AtenTensorHandle* out, Call<T>* call) {
  int64_t dims, *sizes, shape[kMaxDims];
  if (rows(x, &call->x, &dims, &sizes)) return AOTI_TORCH_FAILURE;
  call->M = 1;
  for (int64_t d = 0; d + 1 < dims; d++) call->M *= shape[d] = sizes[d];
  call->K = sizes[dims - 1];
  call->N = shape[dims - 1] = N;
  return allocate(dims, shape, out, &call->y);
}

// The same with as many channels as `channels` [N] has elements.
template <class T>
AOTITorchError open(AtenTensorHandle x, AtenTensorHandle channels, AtenTensorHandle* out, Call<T>* call) {
  int64_t* n;
  if (aoti_torch_get_sizes(channels, &n)) return AOTI_TORCH_FAILURE;
  return open(x, n[0], out, call);
}

}  // namespace
