/* The kernels for x86-64 with AVX512. */
#define LANES 16
#include "kernels.h"

#if defined(GLMAMBA_X86)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512dq"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512dq")
#endif
#include "vector.h"

#include "scan.h"

#include "deform.h"

const kernel_table glmamba_avx512 = {"avx512",       scan_forward,    scan_backward,
                                     deform_forward, deform_backward, deform_merge};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int glmamba_not_x86; /* C has no empty files */
#endif
