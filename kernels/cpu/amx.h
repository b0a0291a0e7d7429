// AMX and AVX-512 BF16: what the compiler knows, what this machine has, the tiles' shape. Each source includes it once, after simd.h.
#pragma once
#if QTUNE_X86
#include <cpuid.h>
#include "simd_x86.h"
#if (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11)
#define HAS_BF16 1
#define AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")))
#if defined(__linux__)
#define HAS_AMX 1
#define AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c")))
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif
#endif

namespace {

inline bool has_bf16() {
#if HAS_BF16
    unsigned a, b, c, d;
    return best_isa() == ISA_AVX512 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
#else
    return false;
#endif
}

inline bool has_amx() {    // asks Linux for the tiles' state, which it grants a process once and for all
#if HAS_AMX
    unsigned a, b, c, d;
    if (!has_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;    // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
    return false;
#endif
}

#if HAS_AMX
// Eight tiles of 16 rows of 64 bytes. Others in this process set the thread's tiles too, so every item of work loads it anew.
struct alignas(64) Tiling { uint8_t palette, start, zero[14]; uint16_t bytes[16]; uint8_t rows[16]; };
const Tiling TILING = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
#endif

}  // namespace
