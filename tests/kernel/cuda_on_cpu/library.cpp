// The CUDA kernels as a library for the CPU; emulation.py compiles and calls it.
#include "../by_path.cu"

extern "C" void set_schedule(unsigned seed) { cuda_on_cpu::machine.random.seed(seed); }
