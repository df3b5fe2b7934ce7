/* The kernels for x86-64 with AVX2. */
#define LANES 8
#include "kernels.h"

#if defined(GLMAMBA_X86)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include "vector.h"

#include "scan.h"

#include "deform.h"

const kernel_table glmamba_avx2 = {"avx2", scan_forward, scan_backward, deform_forward, deform_backward, deform_merge};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int glmamba_not_x86; /* C has no empty files */
#endif
