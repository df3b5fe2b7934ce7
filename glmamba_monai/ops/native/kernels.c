/* The entry points that Python calls: the kernels of the best instruction set that this processor has. */
#include "kernels.h"

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

EXPORT int glmamba_interface(void) { return INTERFACE; }

/* The kernels for the index-th of the instruction sets that this processor has, the best first; NULL after the last. */
EXPORT const kernel_table *glmamba_kernels(int index) {
    const kernel_table *found[3];
    int count = 0;
#if defined(GLMAMBA_X86)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq"))
        found[count++] = &glmamba_avx512;
    if (avx2) found[count++] = &glmamba_avx2;
#endif
    found[count++] = &glmamba_baseline;
    return index >= 0 && index < count ? found[index] : 0;
}
