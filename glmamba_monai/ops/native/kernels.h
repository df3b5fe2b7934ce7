/* What Python passes to the kernels, and the table of entry points that every instruction set fills.
 *
 * All arrays are float32, contiguous, channels last. A kernel works on one item; items of one call may run at the same
 * time, and none writes what another reads or writes. An entry point returns 0, or 1 when memory ran out.
 */
#ifndef GLMAMBA_KERNELS_H
#define GLMAMBA_KERNELS_H

#include <stdint.h>

enum {
    INTERFACE = 1,     /* to be raised with every change of this file, so that Python never loads a stale build */
    DIRECTIONS = 4,    /* of a map: along rows, along columns, and both reversed */
    BLOCK = 16,        /* channels that are scanned together; A, D and the bias are padded to a multiple of it */
    GROUP = 8,         /* states that are scanned together; A, B and C are padded to a multiple of it */
    STEPS = 64,        /* positions between two stored states of a scan */
    DEFORM_ITEM = 576, /* output positions of one item of deform_forward */
    PAD = 16           /* the last axis of deform_args.weight is padded to a multiple of it */
};

/* The fields keep this order in Python (glmamba_monai/ops/native/__init__.py). Shapes: R regions (images, or quadrants
 * of images), K directions, S chunks of STEPS positions, G groups of channel blocks. */
typedef struct {
    const float *u;      /* (B, H, W, D) */
    const float *delta;  /* (B, H, W, K, D), before bias and softplus */
    const float *a;      /* (K, blocks, N, BLOCK), times log2(e) */
    const float *b;      /* (B, H, W, K, N) */
    const float *c;      /* (B, H, W, K, N) */
    const float *skip;   /* (K, blocks * BLOCK), the D of the formula */
    const float *bias;   /* (K, blocks * BLOCK) */
    float *states;       /* (R, K, S, blocks, N, BLOCK), the state before each chunk */
    float *y;            /* (B, H, W, D) */
    const float *grad_y; /* (B, H, W, D) */
    float *grad_u;       /* (B, H, W, K, D), to be summed over K */
    float *grad_delta;   /* (B, H, W, K, D) */
    float *grad_a;       /* (R, K, blocks, N, BLOCK), to be summed over R; for the unscaled A */
    float *grad_b;       /* (G, B, H, W, K, N), to be summed over G */
    float *grad_c;       /* (G, B, H, W, K, N), to be summed over G */
    float *grad_skip;    /* (R, K, blocks * BLOCK), to be summed over R */
    float *grad_bias;    /* (R, K, blocks * BLOCK), to be summed over R */
    int64_t batch, height, width, channels;
    int64_t states_n;         /* N, padded */
    int64_t quadrants;        /* 1: a region is an image; 2: each of the 2 x 2 quadrants */
    int64_t blocks_per_group; /* channel blocks of one item of the backward pass */
} scan_args;

typedef struct {
    const float *input;  /* (B, H, W, C) */
    const float *offset; /* (B, H_out, W_out, taps, 2): dy, dx */
    const float *mask;   /* (B, H_out, W_out, taps), or NULL for all ones */
    const float *weight; /* forward: (taps, C, C_out padded); backward: (taps, C_out, C padded) */
    float *output;       /* (B, H_out, W_out, C_out) */
    const float *grad;   /* (B, H_out, W_out, C_out) */
    float *grad_parts;   /* (B, stripes, H, W, C), zero; an item adds to its own */
    float *grad_input;   /* (B, H, W, C) */
    float *grad_offset;  /* as offset */
    float *grad_mask;    /* as mask */
    float *grad_weight;  /* (B, stripes, taps, C, C_out padded), zero */
    int64_t *touched;    /* (B, stripes, 2): first and last + 1 input row that an item of the backward pass added to */
    int64_t batch, height, width, channels;
    int64_t out_height, out_width, out_channels;
    int64_t kernel_y, kernel_x, pad_y, pad_x;
    int64_t stripes; /* items of the backward pass per image: bands of output rows */
} deform_args;

typedef struct {
    const char *name;                                          /* of the instruction set */
    int (*scan_forward)(const scan_args *, int64_t item);      /* R * blocks items */
    int (*scan_backward)(const scan_args *, int64_t item);     /* R * K * G items */
    int (*deform_forward)(const deform_args *, int64_t item);  /* B * ceil(H_out * W_out / DEFORM_ITEM) items */
    int (*deform_backward)(const deform_args *, int64_t item); /* B * stripes items */
    int (*deform_merge)(const deform_args *, int64_t item);    /* B * H items, after deform_backward */
} kernel_table;

extern const kernel_table glmamba_baseline;
#if defined(__x86_64__)
#define GLMAMBA_X86 1
extern const kernel_table glmamba_avx2;
extern const kernel_table glmamba_avx512;
#endif

#endif
