// Does this processor have the instructions that the compiler was free to use?  To be asked
// without using any of them.
#pragma once
#if defined(__x86_64__)
#include <cpuid.h>
#define FOR_ANY_PROCESSOR __attribute__((target("arch=x86-64")))
#else
#define FOR_ANY_PROCESSOR
#endif

namespace equimini {

// The first that this processor, or its operating system, lacks; nullptr if there is none.
FOR_ANY_PROCESSOR inline const char* missing_instructions() {
#if defined(__x86_64__)
#define NEEDS(name) if (!__builtin_cpu_supports(name)) return name;
  __builtin_cpu_init();
#ifdef __SSE4_2__
  NEEDS("sse4.2") NEEDS("popcnt")
#endif
#ifdef __AVX__
  NEEDS("avx")
#endif
#ifdef __AVX2__  // these come together
  NEEDS("avx2") NEEDS("fma") NEEDS("bmi") NEEDS("bmi2")
#endif
#ifdef __F16C__
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_F16C)) return "f16c";
#endif
#ifdef __AVX512F__
  NEEDS("avx512f")
#endif
#ifdef __AVX512VL__  // and these
  NEEDS("avx512vl") NEEDS("avx512bw") NEEDS("avx512dq") NEEDS("avx512cd")
#endif
#ifdef __AVX512VBMI__
  NEEDS("avx512vbmi")
#endif
#ifdef __AVX512VNNI__
  NEEDS("avx512vnni")
#endif
#ifdef __AVX512BF16__
  NEEDS("avx512bf16")
#endif
#ifdef __AVX512FP16__
  NEEDS("avx512fp16")
#endif
#undef NEEDS
#endif
  return nullptr;
}

}  // namespace equimini
