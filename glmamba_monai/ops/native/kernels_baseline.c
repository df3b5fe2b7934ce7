/* The kernels for any machine: SSE2 on x86-64, NEON on arm64. */
#define LANES 4
#include "vector.h"

#include "scan.h"

#include "deform.h"

const kernel_table glmamba_baseline = {"baseline",     scan_forward,    scan_backward,
                                       deform_forward, deform_backward, deform_merge};
