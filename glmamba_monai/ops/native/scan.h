/* The selective scan of a map in four directions (the formula is in glmamba_monai/ops/ss2d.py).
 *
 * Lanes are channels. A chunk of positions goes through three steps: gather its rows for one block of channels, run
 * the recurrence for one group of states at a time, write the rows back. So the states and their decay rates stay in
 * registers, and the rest of a chunk in the nearest caches, in whichever direction the map is read.
 */
#define LOG2_E 1.44269504f
#define LN_2 0.69314718f

typedef struct {
    int64_t image, top, left, height, width; /* of the region in its map */
    int64_t blocks, chunks, positions;
} region;

INLINE region region_of(const scan_args *s, int64_t index) {
    int64_t q = s->quadrants;
    region r = {.image = index / (q * q), .height = s->height / q, .width = s->width / q};
    r.top = index / q % q * r.height;
    r.left = index % q * r.width;
    r.blocks = (s->channels + BLOCK - 1) / BLOCK;
    r.positions = r.height * r.width;
    r.chunks = (r.positions + STEPS - 1) / STEPS;
    return r;
}

/* Indices of the map positions that a direction visits in one chunk; returns how many there are. */
static int chunk_positions(const scan_args *s, const region *r, int direction, int64_t chunk, int64_t *position) {
    int64_t start = chunk * STEPS, count = r->positions - start;
    if (count > STEPS) count = STEPS;
    for (int64_t i = 0; i < count; i++) {
        int64_t t = direction < 2 ? start + i : r->positions - 1 - start - i;
        int64_t row = direction % 2 ? t % r->height : t / r->width;
        int64_t column = direction % 2 ? t / r->height : t % r->width;
        position[i] = (r->image * s->height + r->top + row) * s->width + r->left + column;
    }
    return (int)count;
}

/* `lanes` < BLOCK in the last block of channels only. */
INLINE void read_block(float *to, const float *from, int lanes) {
    if (lanes == BLOCK) {
        for (int i = 0; i < BLOCK; i += LANES) store(to + i, load(from + i));
    } else {
        memset(to, 0, BLOCK * sizeof(float));
        memcpy(to, from, lanes * sizeof(float));
    }
}

INLINE void write_block(float *to, const float *from, int lanes) {
    if (lanes == BLOCK)
        for (int i = 0; i < BLOCK; i += LANES) store(to + i, load(from + i));
    else
        memcpy(to, from, lanes * sizeof(float));
}

INLINE int lanes_of(const scan_args *s, int64_t block) {
    int64_t left = s->channels - block * BLOCK;
    return left < BLOCK ? (int)left : BLOCK;
}

/* One chunk, LANES channels and GROUP states: adds to y; dt, drive and y are rows of BLOCK, b and c of `row`. */
static void forward_steps(int steps, const int64_t *position, const float *dt, const float *drive, float *y,
                          const float *a, const float *b, const float *c, int64_t row, float *state) {
    vec h[GROUP], rate[GROUP];
    for (int n = 0; n < GROUP; n++) {
        h[n] = load(state + n * BLOCK);
        rate[n] = load(a + n * BLOCK);
    }
    for (int t = 0; t < steps; t++) {
        vec step = load(dt + t * BLOCK), in = load(drive + t * BLOCK);
        const float *bt = b + position[t] * row, *ct = c + position[t] * row;
        vec even = load(y + t * BLOCK), odd = {0};
#pragma GCC unroll 4
        for (int n = 0; n < GROUP; n += 2) {
            h[n] = exp2_vec(step * rate[n]) * h[n] + in * bt[n];
            even += h[n] * ct[n];
            h[n + 1] = exp2_vec(step * rate[n + 1]) * h[n + 1] + in * bt[n + 1];
            odd += h[n + 1] * ct[n + 1];
        }
        store(y + t * BLOCK, even + odd);
    }
    for (int n = 0; n < GROUP; n++) store(state + n * BLOCK, h[n]);
}

static int scan_forward(const scan_args *s, int64_t item) {
    int64_t blocks = (s->channels + BLOCK - 1) / BLOCK, block = item % blocks, n = s->states_n;
    region r = region_of(s, item / blocks);
    int lanes = lanes_of(s, block);
    void *memory;
    float *state = aligned_floats(BLOCK * (n + 3 * STEPS), &memory);
    if (!state) return 1;
    float *dt = state + n * BLOCK, *drive = dt + STEPS * BLOCK, *y = drive + STEPS * BLOCK;
    int64_t position[STEPS];
    unsigned control = flush_subnormals();

    for (int k = 0; k < DIRECTIONS; k++) {
        const float *a = s->a + (k * blocks + block) * n * BLOCK;
        const float *skip = s->skip + (k * blocks + block) * BLOCK, *bias = s->bias + (k * blocks + block) * BLOCK;
        memset(state, 0, n * BLOCK * sizeof(float));
        for (int64_t chunk = 0; chunk < r.chunks; chunk++) {
            int steps = chunk_positions(s, &r, k, chunk, position);
            int64_t saved = (((item / blocks * DIRECTIONS + k) * r.chunks + chunk) * blocks + block) * n * BLOCK;
            memcpy(s->states + saved, state, n * BLOCK * sizeof(float));
            for (int t = 0; t < steps; t++) {
                float u[BLOCK];
                read_block(u, s->u + position[t] * s->channels + block * BLOCK, lanes);
                read_block(dt + t * BLOCK, s->delta + (position[t] * DIRECTIONS + k) * s->channels + block * BLOCK,
                           lanes);
                for (int i = 0; i < BLOCK; i += LANES) {
                    vec unused, x = softplus(load(dt + t * BLOCK + i) + load(bias + i), &unused);
                    store(dt + t * BLOCK + i, x);
                    store(drive + t * BLOCK + i, x * load(u + i));
                    store(y + t * BLOCK + i, load(u + i) * load(skip + i));
                }
            }
            for (int i = 0; i < BLOCK; i += LANES)
                for (int64_t j = 0; j < n; j += GROUP)
                    forward_steps(steps, position, dt + i, drive + i, y + i, a + j * BLOCK + i, s->b + k * n + j,
                                  s->c + k * n + j, DIRECTIONS * n, state + j * BLOCK + i);
            for (int t = 0; t < steps; t++) {
                float *to = s->y + position[t] * s->channels + block * BLOCK, before[BLOCK];
                if (k > 0) {
                    read_block(before, to, lanes);
                    for (int i = 0; i < BLOCK; i += LANES)
                        store(y + t * BLOCK + i, load(y + t * BLOCK + i) + load(before + i));
                }
                write_block(to, y + t * BLOCK, lanes);
            }
        }
    }
    restore_subnormals(control);
    free(memory);
    return 0;
}

/* What the backward pass of one item keeps between its steps; rows of BLOCK, for LANES channels at `+ i`. */
typedef struct {
    float *u, *dt, *slope, *drive, *dy; /* (STEPS): inputs of the chunk; slope is the derivative of softplus */
    float *grad_drive, *grad_exponent;  /* (STEPS): gradient of dt * u, and of dt by way of the decay, times log2(e) */
    float *h, *decay;                   /* (STEPS + 1, GROUP, LANES), (STEPS, GROUP, LANES) */
    float *carry, *grad_a;              /* (blocks, N): decay_t+1 * gradient of h_t+1; gradient of A so far */
    float *grad_skip, *grad_bias;       /* (blocks) */
    float *grad_b, *grad_c;             /* (STEPS, N, LANES), to be summed over lanes */
} backward_scratch;

INLINE float *take(float **memory, size_t count) { return (*memory += count) - count; }

/* One chunk, LANES channels and GROUP states, from the states `start` before it: first forwards, keeping all states and
 * decays, then backwards with the gradient g_t of h_t: g_t = c_t dy_t + decay_t+1 g_t+1. The states are number `first`
 * and so on of `n_states`. */
static void backward_steps(int steps, const int64_t *position, const backward_scratch *w, int i, const float *a,
                           const float *b, const float *c, int64_t row, const float *start, float *carry, float *grad_a,
                           int64_t first, int64_t n_states) {
    vec rate[GROUP], state[GROUP], g[GROUP], ga[GROUP];
    for (int n = 0; n < GROUP; n++) {
        rate[n] = load(a + n * BLOCK);
        state[n] = load(start + n * BLOCK);
        store(w->h + n * LANES, state[n]);
    }
    for (int t = 0; t < steps; t++) {
        vec step = load(w->dt + t * BLOCK + i), in = load(w->drive + t * BLOCK + i);
        const float *bt = b + position[t] * row;
#pragma GCC unroll 8
        for (int n = 0; n < GROUP; n++) {
            vec decay = exp2_vec(step * rate[n]);
            state[n] = decay * state[n] + in * bt[n];
            store(w->decay + (t * GROUP + n) * LANES, decay);
            store(w->h + ((t + 1) * GROUP + n) * LANES, state[n]);
        }
    }
    for (int n = 0; n < GROUP; n++) {
        g[n] = load(carry + n * BLOCK);
        ga[n] = (vec){0};
    }
    for (int t = steps - 1; t >= 0; t--) {
        vec step = load(w->dt + t * BLOCK + i), in = load(w->drive + t * BLOCK + i), dy = load(w->dy + t * BLOCK + i);
        vec grad_drive = load(w->grad_drive + t * BLOCK + i), grad_exponent = load(w->grad_exponent + t * BLOCK + i);
        const float *bt = b + position[t] * row, *ct = c + position[t] * row;
        const float *h = w->h + t * GROUP * LANES, *decay = w->decay + t * GROUP * LANES;
        float *grad_b = w->grad_b + (t * n_states + first) * LANES,
              *grad_c = w->grad_c + (t * n_states + first) * LANES;
#pragma GCC unroll 8
        for (int n = 0; n < GROUP; n++) {
            vec grad_h = g[n] + dy * ct[n];
            store(grad_b + n * LANES, load(grad_b + n * LANES) + grad_h * in);
            store(grad_c + n * LANES, load(grad_c + n * LANES) + load(h + (GROUP + n) * LANES) * dy);
            grad_drive += grad_h * bt[n];
            g[n] = load(decay + n * LANES) * grad_h;
            vec q = g[n] * load(h + n * LANES);
            ga[n] += q * step;
            grad_exponent += q * rate[n];
        }
        store(w->grad_drive + t * BLOCK + i, grad_drive);
        store(w->grad_exponent + t * BLOCK + i, grad_exponent);
    }
    for (int n = 0; n < GROUP; n++) {
        store(carry + n * BLOCK, g[n]);
        store(grad_a + n * BLOCK, load(grad_a + n * BLOCK) + ga[n]);
    }
}

static int scan_backward(const scan_args *s, int64_t item) {
    int64_t blocks = (s->channels + BLOCK - 1) / BLOCK, n = s->states_n;
    int64_t groups = (blocks + s->blocks_per_group - 1) / s->blocks_per_group;
    int64_t group = item % groups, index = item / groups / DIRECTIONS;
    int64_t first = group * s->blocks_per_group, mine = blocks - first;
    int k = (int)(item / groups % DIRECTIONS);
    if (mine > s->blocks_per_group) mine = s->blocks_per_group;
    region r = region_of(s, index);
    int64_t map = s->batch * s->height * s->width * DIRECTIONS * n;
    float *all_grad_b = s->grad_b + group * map, *all_grad_c = s->grad_c + group * map;

    size_t rows = STEPS * BLOCK, kept = mine * n * BLOCK, cube = STEPS * GROUP * LANES, sums = STEPS * n * LANES;
    void *memory;
    float *p = aligned_floats(7 * rows + 2 * kept + 2 * mine * BLOCK + 2 * cube + GROUP * LANES + 2 * sums, &memory);
    if (!p) return 1;
    backward_scratch w;
    w.u = take(&p, rows);
    w.dt = take(&p, rows);
    w.slope = take(&p, rows);
    w.drive = take(&p, rows);
    w.dy = take(&p, rows);
    w.grad_drive = take(&p, rows);
    w.grad_exponent = take(&p, rows);
    w.carry = take(&p, kept);
    w.grad_a = take(&p, kept);
    w.grad_skip = take(&p, mine * BLOCK);
    w.grad_bias = take(&p, mine * BLOCK);
    w.decay = take(&p, cube);
    w.grad_b = take(&p, sums);
    w.grad_c = take(&p, sums);
    w.h = p;
    memset(w.carry, 0, (2 * kept + 2 * mine * BLOCK) * sizeof(float)); /* carry, grad_a, grad_skip, grad_bias */
    int64_t position[STEPS];
    unsigned control = flush_subnormals();

    for (int64_t chunk = r.chunks - 1; chunk >= 0; chunk--) {
        int steps = chunk_positions(s, &r, k, chunk, position);
        memset(w.grad_b, 0, 2 * sums * sizeof(float)); /* grad_b and grad_c */
        for (int64_t m = 0; m < mine; m++) {
            int64_t block = first + m, channel = block * BLOCK;
            int lanes = lanes_of(s, block);
            const float *skip = s->skip + k * blocks * BLOCK + channel, *bias = s->bias + k * blocks * BLOCK + channel;
            for (int t = 0; t < steps; t++) {
                float *dt = w.dt + t * BLOCK;
                read_block(w.u + t * BLOCK, s->u + position[t] * s->channels + channel, lanes);
                read_block(w.dy + t * BLOCK, s->grad_y + position[t] * s->channels + channel, lanes);
                read_block(dt, s->delta + (position[t] * DIRECTIONS + k) * s->channels + channel, lanes);
                for (int i = 0; i < BLOCK; i += LANES) {
                    vec slope, x = softplus(load(dt + i) + load(bias + i), &slope);
                    store(dt + i, x);
                    store(w.slope + t * BLOCK + i, slope);
                    store(w.drive + t * BLOCK + i, x * load(w.u + t * BLOCK + i));
                }
            }
            memset(w.grad_drive, 0, 2 * rows * sizeof(float)); /* grad_drive and grad_exponent */
            const float *a = s->a + (k * blocks + block) * n * BLOCK;
            const float *state =
                s->states + (((index * DIRECTIONS + k) * r.chunks + chunk) * blocks + block) * n * BLOCK;
            for (int i = 0; i < BLOCK; i += LANES)
                for (int64_t j = 0; j < n; j += GROUP) {
                    int64_t at = j * BLOCK + i;
                    backward_steps(steps, position, &w, i, a + at, s->b + k * n + j, s->c + k * n + j, DIRECTIONS * n,
                                   state + at, w.carry + m * n * BLOCK + at, w.grad_a + m * n * BLOCK + at, j, n);
                }
            for (int i = 0; i < BLOCK; i += LANES) {
                vec grad_skip = {0}, grad_bias = {0};
                for (int t = 0; t < steps; t++) {
                    int at = t * BLOCK + i;
                    vec u = load(w.u + at), dy = load(w.dy + at), grad_drive = load(w.grad_drive + at);
                    vec grad_delta = (grad_drive * u + load(w.grad_exponent + at) * LN_2) * load(w.slope + at);
                    store(w.grad_drive + at, grad_drive * load(w.dt + at) + dy * load(skip + i));
                    store(w.grad_exponent + at, grad_delta);
                    grad_bias += grad_delta;
                    grad_skip += dy * u;
                }
                float *to_skip = w.grad_skip + m * BLOCK + i, *to_bias = w.grad_bias + m * BLOCK + i;
                store(to_skip, load(to_skip) + grad_skip);
                store(to_bias, load(to_bias) + grad_bias);
            }
            for (int t = 0; t < steps; t++) {
                int64_t at = (position[t] * DIRECTIONS + k) * s->channels + channel;
                write_block(s->grad_u + at, w.grad_drive + t * BLOCK, lanes);
                write_block(s->grad_delta + at, w.grad_exponent + t * BLOCK, lanes);
            }
        }
        for (int t = 0; t < steps; t++) {
            int64_t at = (position[t] * DIRECTIONS + k) * n;
            for (int64_t j = 0; j < n; j++) {
                all_grad_b[at + j] = sum_lanes(load(w.grad_b + (t * n + j) * LANES));
                all_grad_c[at + j] = sum_lanes(load(w.grad_c + (t * n + j) * LANES));
            }
        }
    }
    int64_t to = (index * DIRECTIONS + k) * blocks + first;
    memcpy(s->grad_a + to * n * BLOCK, w.grad_a, kept * sizeof(float));
    memcpy(s->grad_skip + to * BLOCK, w.grad_skip, mine * BLOCK * sizeof(float));
    memcpy(s->grad_bias + to * BLOCK, w.grad_bias, mine * BLOCK * sizeof(float));
    restore_subnormals(control);
    free(memory);
    return 0;
}
