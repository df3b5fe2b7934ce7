/* Vectors of LANES floats in the GNU C notation, and the functions of them that C lacks.
 *
 * The including file sets LANES and switches the compiler to the instruction set; all else follows.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

#if defined(GLMAMBA_X86)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline, unused))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float loose_vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE vec load(const float *p) { return *(const loose_vec *)p; }
INLINE void store(float *p, vec x) { *(loose_vec *)p = x; }

/* NaN in x stays NaN. */
INLINE vec clamp(vec x, float low, float high) {
#if LANES == 16
    return _mm512_min_ps((vec)_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), x));
#elif LANES == 8
    return _mm256_min_ps(_mm256_set1_ps(high), _mm256_max_ps(_mm256_set1_ps(low), x));
#elif defined(GLMAMBA_X86)
    return _mm_min_ps(_mm_set1_ps(high), _mm_max_ps(_mm_set1_ps(low), x));
#elif defined(__ARM_NEON)
    return (vec)vminq_f32(vdupq_n_f32(high), vmaxq_f32(vdupq_n_f32(low), (float32x4_t)x));
#else
    for (int i = 0; i < LANES; i++) x[i] = x[i] < low ? low : x[i] > high ? high : x[i];
    return x;
#endif
}

INLINE vec choose(ivec condition, vec yes, vec no) { return (vec)((condition & (ivec)yes) | (~condition & (ivec)no)); }

INLINE float sum_lanes(vec x) {
#if defined(GLMAMBA_X86)
#if LANES == 16
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 part = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif LANES == 8
    __m128 part = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
#else
    __m128 part = x;
#endif
    part = _mm_add_ps(part, _mm_movehl_ps(part, part));
    return _mm_cvtss_f32(_mm_add_ss(part, _mm_shuffle_ps(part, part, 1)));
#else
    return (x[0] + x[2]) + (x[1] + x[3]); /* LANES is 4 */
#endif
}

/* Added to a float of at most 2^22 in size, it leaves the nearest whole number in the low bits of the mantissa. */
#define ROUNDER 12582912.0f

/* (p with |log2 p| <= 1/2) * 2^n, n = rounded - ROUNDER in [-127, 128]; at -127 p is 1 or flushed to zero. */
INLINE vec scale(vec p, vec rounded) { return (vec)((ivec)p + ((ivec)rounded << 23)); }

/* 2^x; relative error 1.2e-7, 0 from -127 down (also for -inf), inf from 128 up. */
INLINE vec exp2_vec(vec x) {
    x = clamp(x, -127.0f, 128.0f);
    vec rounded = x + ROUNDER;
    vec f = x - (rounded - ROUNDER);
    /* (2^f - 1) / f, minimax for the relative error of 2^f, which is exact at 0: errors of slow decays would add up */
    vec q = f * 0.0001535336178631678f + 0.0013398874378204196f;
    q = q * f + 0.009618437358438965f;
    q = q * f + 0.055503324712572896f;
    q = q * f + 0.24022647913618694f;
    q = q * f + 0.6931472028549825f;
    return scale(q * f + 1.0f, rounded);
}

/* e^x; relative error 1.2e-7 also where x is large, as ln 2 is subtracted in two parts. */
INLINE vec exp_vec(vec x) {
    x = clamp(x, -88.0f, 88.0f);
    vec rounded = x * 1.44269504f + ROUNDER;
    vec n = rounded - ROUNDER;
    vec f = x - n * 0.693359375f;
    f = f + n * 2.12194440e-4f;
    vec q = f * 0.0013843653401184699f + 0.008374155289886389f;
    q = q * f + 0.04166800203902748f;
    q = q * f + 0.16666431262998035f;
    q = q * f + 0.49999994209025034f;
    q = q * f + 1.0000000321649396f;
    return scale(q * f + 1.0f, rounded);
}

/* log(1 + w) for 0 <= w <= 1 by 2 atanh(w / (2 + w)); the error is relative also where w is tiny. */
INLINE vec log1p_vec(vec w) {
    vec s = w / (w + 2.0f);
    vec s2 = s * s;
    vec q = s2 * 0.14089167543367273f + 0.13980301373585732f;
    q = q * s2 + 0.20012455139769061f;
    q = q * s2 + 0.3333315734106424f;
    q = q * s2 + 1.000000003960519f;
    return (s + s) * q;
}

/* log(1 + e^x) and its derivative, both with a relative error of some 1e-7 as long as e^-|x| is a normal float. */
INLINE vec softplus(vec x, vec *derivative) {
    ivec negative = x < (vec){0};
    vec w = exp_vec(choose(negative, x, -x));
    vec r = 1.0f / (w + 1.0f);
    *derivative = choose(negative, w * r, r);
    return log1p_vec(w) + choose(negative, (vec){0}, x);
}

/* Decayed states end as subnormal numbers, which slow x86 down tenfold: flushed to zero while a kernel runs. */
INLINE unsigned flush_subnormals(void) {
#if defined(GLMAMBA_X86)
    unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    return before;
#else
    return 0;
#endif
}

INLINE void restore_subnormals(unsigned before) {
#if defined(GLMAMBA_X86)
    _mm_setcsr(before);
#else
    (void)before;
#endif
}

/* Memory on a cache line's border; `*memory` is what free() takes. */
INLINE float *aligned_floats(size_t count, void **memory) {
    *memory = malloc(count * sizeof(float) + 64);
    return *memory ? (float *)(((uintptr_t)*memory + 63) & ~(uintptr_t)63) : NULL;
}
