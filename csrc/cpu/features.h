// What this processor can do, asked when the program runs, so that one build serves every machine.
#pragma once

#include <array>

namespace fastmeta::cpu {

struct Feature {
  const char* name;
  bool live;
};

// Where the compiler offers no way to ask (MSVC), nothing is claimed.
inline std::array<Feature, 7> features() {
#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
  __builtin_cpu_init();
  // Also asks whether the operating system saves the wide registers. It returns an int that is not
  // always 0 or 1.
#define FASTMETA_SUPPORTS(name) (__builtin_cpu_supports(name) != 0)
#else
#define FASTMETA_SUPPORTS(name) false
#endif
#if defined(__ARM_NEON)
  constexpr bool neon = true;
#else
  constexpr bool neon = false;
#endif
  return {{
      {"avx2", FASTMETA_SUPPORTS("avx2")},
      {"fma", FASTMETA_SUPPORTS("fma")},
      {"avx512f", FASTMETA_SUPPORTS("avx512f")},
      {"avx512dq", FASTMETA_SUPPORTS("avx512dq")},
      {"avx512bw", FASTMETA_SUPPORTS("avx512bw")},
      {"avx512vl", FASTMETA_SUPPORTS("avx512vl")},
      {"neon", neon},
  }};
#undef FASTMETA_SUPPORTS
}

}  // namespace fastmeta::cpu
