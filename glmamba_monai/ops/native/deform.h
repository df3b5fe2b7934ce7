/* Modulated deformable convolution (the formula is in glmamba_monai/ops/deform_conv.py).
 *
 * A band of output positions is sampled for one tap into a buffer of the nearest caches and multiplied with the tap's
 * weights at once, so the samples of a whole image never exist.
 */
enum {
    BAND = 72, /* output positions; a multiple of every TILE_ROWS, and DEFORM_ITEM of it */
#if LANES == 16
    TILE_ROWS = 12,
    TILE_VECTORS = 2
#elif LANES == 4 && !defined(GLMAMBA_X86)
    TILE_ROWS = 6, /* 32 registers */
    TILE_VECTORS = 4
#else
    TILE_ROWS = 6,
    TILE_VECTORS = 2
#endif
};

INLINE int64_t padded(int64_t count) { return (count + PAD - 1) / PAD * PAD; }

/* c[rows][vectors] += a b over `depth`; b and c have rows of n floats, a[i][j] is at i * row + j * step. */
INLINE void tile(const int rows, const int vectors, int64_t depth, const float *a, int64_t row, int64_t step,
                 const float *b, float *c, int64_t n) {
    vec sum[TILE_ROWS][TILE_VECTORS];
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) sum[i][j] = load(c + i * n + j * LANES);
    for (int64_t d = 0; d < depth; d++, a += step, b += n) {
        vec right[TILE_VECTORS];
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) right[j] = load(b + j * LANES);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++) sum[i][j] += right[j] * a[i * row];
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) store(c + i * n + j * LANES, sum[i][j]);
}

static void tiles_wide(int64_t m, int64_t depth, const float *a, int64_t row, int64_t step, const float *b, float *c,
                       int64_t n) {
    int64_t i = 0;
    for (; i + TILE_ROWS <= m; i += TILE_ROWS)
        tile(TILE_ROWS, TILE_VECTORS, depth, a + i * row, row, step, b, c + i * n, n);
    for (; i < m; i++) tile(1, TILE_VECTORS, depth, a + i * row, row, step, b, c + i * n, n);
}

static void tiles_narrow(int64_t m, int64_t depth, const float *a, int64_t row, int64_t step, const float *b, float *c,
                         int64_t n) {
    int64_t i = 0;
    for (; i + TILE_ROWS <= m; i += TILE_ROWS) tile(TILE_ROWS, 1, depth, a + i * row, row, step, b, c + i * n, n);
    for (; i < m; i++) tile(1, 1, depth, a + i * row, row, step, b, c + i * n, n);
}

/* c (m, n) += a (m, depth) b (depth, n), n a multiple of PAD. */
static void multiply_add(int64_t m, int64_t depth, int64_t n, const float *a, int64_t row, int64_t step, const float *b,
                         float *c) {
    int64_t j = 0;
    for (; j + TILE_VECTORS * LANES <= n; j += TILE_VECTORS * LANES)
        tiles_wide(m, depth, a, row, step, b + j, c + j, n);
    for (; j < n; j += LANES) tiles_narrow(m, depth, a, row, step, b + j, c + j, n);
}

/* Where one tap of one output position samples. */
typedef struct {
    int64_t
        corner[4]; /* index of a pixel's first channel in its image, or -1 outside: (0, 0), (0, 1), (1, 0), (1, 1) */
    float dy, dx, mask; /* fractions from corner (0, 0), and the mask */
} sample_point;

/* The whole part of a pixel's offset, to be added as an integer: the position of a pixel far from the origin would
 * round the fraction off. Beyond 2^24 all is outside, but may not fit an integer; NaN counts as that. */
INLINE int64_t split(float moved, float *fraction) {
    float whole = floorf(moved);
    *fraction = moved - whole;
    return whole > -16777216.0f && whole < 16777216.0f ? (int64_t)(int32_t)whole : -16777216;
}

INLINE sample_point locate(const deform_args *s, int64_t image, int64_t position, int64_t tap) {
    sample_point p;
    int64_t taps = s->kernel_y * s->kernel_x, at = (image * s->out_height * s->out_width + position) * taps + tap;
    int64_t y = position / s->out_width + tap / s->kernel_x - s->pad_y + split(s->offset[2 * at], &p.dy);
    int64_t x = position % s->out_width + tap % s->kernel_x - s->pad_x + split(s->offset[2 * at + 1], &p.dx);
    p.mask = s->mask ? s->mask[at] : 1.0f;
    for (int i = 0; i < 4; i++) {
        int64_t row = y + i / 2, column = x + i % 2;
        int inside = row >= 0 && row < s->height && column >= 0 && column < s->width;
        p.corner[i] = inside ? (row * s->width + column) * s->channels : -1;
    }
    return p;
}

/* to[channel] = the bilinear value times the mask; `zeros` stands for every pixel outside. */
static void interpolate(const sample_point *p, const float *image, const float *zeros, int64_t channels, float *to) {
    const float *from[4];
    for (int i = 0; i < 4; i++) from[i] = p->corner[i] < 0 ? zeros : image + p->corner[i];
    float top = (1 - p->dy) * p->mask, bottom = p->dy * p->mask;
    float w0 = top * (1 - p->dx), w1 = top * p->dx, w2 = bottom * (1 - p->dx), w3 = bottom * p->dx;
    int64_t c = 0;
    for (; c + LANES <= channels; c += LANES)
        store(to + c,
              load(from[0] + c) * w0 + load(from[1] + c) * w1 + load(from[2] + c) * w2 + load(from[3] + c) * w3);
    for (; c < channels; c++) to[c] = from[0][c] * w0 + from[1][c] * w1 + from[2][c] * w2 + from[3][c] * w3;
}

static int deform_forward(const deform_args *s, int64_t item) {
    int64_t size = s->out_height * s->out_width, taps = s->kernel_y * s->kernel_x;
    int64_t items = (size + DEFORM_ITEM - 1) / DEFORM_ITEM, image = item / items;
    int64_t start = item % items * DEFORM_ITEM, end = start + DEFORM_ITEM < size ? start + DEFORM_ITEM : size;
    int64_t depth = padded(s->channels), n = padded(s->out_channels);
    const float *pixels = s->input + image * s->height * s->width * s->channels;
    void *memory;
    float *sampled = aligned_floats(BAND * (depth + n) + depth, &memory);
    if (!sampled) return 1;
    float *sum = sampled + BAND * depth, *zeros = sum + BAND * n;
    memset(zeros, 0, depth * sizeof(float));
    unsigned control = flush_subnormals();

    for (int64_t band = start; band < end; band += BAND) {
        int64_t rows = end - band < BAND ? end - band : BAND;
        memset(sum, 0, rows * n * sizeof(float));
        for (int64_t tap = 0; tap < taps; tap++) {
            for (int64_t i = 0; i < rows; i++) {
                sample_point p = locate(s, image, band + i, tap);
                interpolate(&p, pixels, zeros, s->channels, sampled + i * depth);
            }
            multiply_add(rows, s->channels, n, sampled, depth, 1, s->weight + tap * s->channels * n, sum);
        }
        float *to = s->output + (image * size + band) * s->out_channels;
        for (int64_t i = 0; i < rows; i++)
            memcpy(to + i * s->out_channels, sum + i * n, s->out_channels * sizeof(float));
    }
    restore_subnormals(control);
    free(memory);
    return 0;
}

/* Gradients of one output position and tap, from `grad`, the gradient of its masked sample. Adds to the four pixels of
 * `part`, or to `bin` for those outside. */
static void spread(const sample_point *p, const float *image, const float *zeros, const float *grad, int64_t channels,
                   float *part, float *bin, float *grad_offset, float *grad_mask) {
    const float *from[4];
    float *to[4];
    for (int i = 0; i < 4; i++) {
        int outside = p->corner[i] < 0;
        from[i] = outside ? zeros : image + p->corner[i];
        to[i] = outside ? bin : part + p->corner[i];
    }
    float dy = p->dy, dx = p->dx;
    float share[4] = {(1 - dy) * (1 - dx), (1 - dy) * dx, dy * (1 - dx), dy * dx};
    float weight[4] = {share[0] * p->mask, share[1] * p->mask, share[2] * p->mask, share[3] * p->mask};
    vec sums[4] = {{0}, {0}, {0}, {0}};
    float dot[4];
    int64_t c = 0;
    for (; c + LANES <= channels; c += LANES) {
        vec g = load(grad + c);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            sums[i] += g * load(from[i] + c);
            store(to[i] + c, load(to[i] + c) + g * weight[i]);
        }
    }
    for (int i = 0; i < 4; i++) dot[i] = sum_lanes(sums[i]);
    for (; c < channels; c++)
        for (int i = 0; i < 4; i++) {
            dot[i] += grad[c] * from[i][c];
            to[i][c] += grad[c] * weight[i];
        }
    grad_offset[0] = p->mask * ((dot[2] - dot[0]) * (1 - dx) + (dot[3] - dot[1]) * dx);
    grad_offset[1] = p->mask * ((dot[1] - dot[0]) * (1 - dy) + (dot[3] - dot[2]) * dy);
    if (grad_mask) *grad_mask = dot[0] * share[0] + dot[1] * share[1] + dot[2] * share[2] + dot[3] * share[3];
}

/* One stripe of output rows of one image. Its samples may lie anywhere, so it adds to an image of its own; what
 * `deform_merge` has to read of that is in `touched`. */
static int deform_backward(const deform_args *s, int64_t item) {
    int64_t size = s->out_height * s->out_width, taps = s->kernel_y * s->kernel_x;
    int64_t image = item / s->stripes, stripe = item % s->stripes;
    int64_t start = stripe * s->out_height / s->stripes * s->out_width;
    int64_t end = (stripe + 1) * s->out_height / s->stripes * s->out_width;
    int64_t width = padded(s->channels), n = padded(s->out_channels), pixels = s->height * s->width * s->channels;
    const float *input = s->input + image * pixels;
    float *part = s->grad_parts + item * pixels, *grad_weight = s->grad_weight + item * taps * s->channels * n;
    void *memory;
    float *sampled = aligned_floats(BAND * (2 * width + n) + 2 * width, &memory);
    if (!sampled) return 1;
    float *grad_sampled = sampled + BAND * width, *dy = grad_sampled + BAND * width;
    float *zeros = dy + BAND * n, *bin = zeros + width;
    memset(zeros, 0, 2 * width * sizeof(float)); /* zeros and bin */
    sample_point point[BAND];
    int64_t first = pixels, last = -1;
    unsigned control = flush_subnormals();

    for (int64_t band = start; band < end; band += BAND) {
        int64_t rows = end - band < BAND ? end - band : BAND;
        memset(dy, 0, rows * n * sizeof(float));
        for (int64_t i = 0; i < rows; i++)
            memcpy(dy + i * n, s->grad + (image * size + band + i) * s->out_channels, s->out_channels * sizeof(float));
        for (int64_t tap = 0; tap < taps; tap++) {
            for (int64_t i = 0; i < rows; i++) {
                point[i] = locate(s, image, band + i, tap);
                interpolate(&point[i], input, zeros, s->channels, sampled + i * width);
                for (int j = 0; j < 4; j++) {
                    int64_t corner = point[i].corner[j];
                    if (corner >= 0 && corner < first) first = corner;
                    if (corner > last) last = corner;
                }
            }
            multiply_add(s->channels, rows, n, sampled, 1, width, dy, grad_weight + tap * s->channels * n);
            memset(grad_sampled, 0, rows * width * sizeof(float));
            multiply_add(rows, s->out_channels, width, dy, n, 1, s->weight + tap * s->out_channels * width,
                         grad_sampled);
            for (int64_t i = 0; i < rows; i++) {
                int64_t at = (image * size + band + i) * taps + tap;
                spread(&point[i], input, zeros, grad_sampled + i * width, s->channels, part, bin,
                       s->grad_offset + 2 * at, s->grad_mask ? s->grad_mask + at : NULL);
            }
        }
    }
    s->touched[2 * item] = last < 0 ? 0 : first / (s->width * s->channels);
    s->touched[2 * item + 1] = last < 0 ? 0 : last / (s->width * s->channels) + 1;
    restore_subnormals(control);
    free(memory);
    return 0;
}

/* One row of grad_input: the sum over the stripes that touched it, in their order. */
static int deform_merge(const deform_args *s, int64_t item) {
    int64_t image = item / s->height, row = item % s->height, count = s->width * s->channels;
    float *to = s->grad_input + item * count;
    memset(to, 0, count * sizeof(float));
    for (int64_t stripe = image * s->stripes; stripe < (image + 1) * s->stripes; stripe++) {
        if (row < s->touched[2 * stripe] || row >= s->touched[2 * stripe + 1]) continue;
        const float *from = s->grad_parts + (stripe * s->height + row) * count;
        for (int64_t i = 0; i < count; i++) to[i] += from[i];
    }
    return 0;
}
