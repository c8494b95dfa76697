// The CUDA kernels, callable without CUDA's or torch's headers.
#pragma once
#include "common.h"

namespace equimini {

// Which kernels: up to a window of kNarrowWindow those of cuda_narrow.cuh, and from kTensorWindow
// on, for 16-bit types, the tensor cores.  Tests ask for others; narrow ones stay for narrow
// windows.
enum class Path : int { automatic, narrow, cuda_cores, tensor_cores };
constexpr int64_t kNarrowWindow = 4, kTensorWindow = 16;

// Enqueue on `stream` (a cudaStream_t) of the current device; 0, or a cudaError_t.  Rows start
// at multiples of 16 bytes.  The backward pass needs `delta`, (B, H, Nq) floats of room.
int cuda_forward(const Attention& p, Dtype dtype, void* stream, Path path = Path::automatic);
int cuda_backward(const Attention& p, Dtype dtype, void* stream, float* delta,
                  Path path = Path::automatic);
const char* cuda_error_string(int error);

}  // namespace equimini
