// The CUDA kernels, callable without CUDA's or torch's headers.
#pragma once
#include "../attention.h"

namespace equimini {

// Where a window lives: up to kRegisterWindow in registers, from kTensorWindow on, for 16-bit
// types, in what tensor cores multiply, else in shared memory.  Tests ask for others; registers
// stay for narrow windows.
enum class Path : int { automatic, registers, shared_memory, tensor_cores };
constexpr int64_t kRegisterWindow = 4, kTensorWindow = 16;

// Enqueue on `stream` (a cudaStream_t) of the current device; 0, or a cudaError_t.  Rows start
// at multiples of 16 bytes.  The backward pass needs `delta`, (B, H, Nq) floats of room.
int cuda_forward(const Attention& p, Dtype dtype, void* stream, Path path = Path::automatic);
int cuda_backward(const Attention& p, Dtype dtype, void* stream, float* delta,
                  Path path = Path::automatic);
const char* cuda_error_string(int error);

}  // namespace equimini
