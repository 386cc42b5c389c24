/* Kernels of the example: f32, row-major, shapes known beforehand. `check` says what an operator makes, or why it cannot
 * be run; `run` computes it. The table at the end names each with its versions. */
#include "operators.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const int64_t MAX_ELEMENTS = (int64_t)1 << 40;

struct operation {
    const char *name, *types; /* Of its inputs: f is f32; d f32, i32 or i64; i i32 or i64; l i64. */
    int64_t since, until;     /* Versions whose meaning is implemented; a later one may mean something else. */
    uint32_t least;           /* Inputs that must be there. */
    const char *(*check)(struct step *s);
    ai_hal_status (*run)(const struct step *s, const void *const *x, void *y);
};
#define FLAG(condition, reason) if (!(condition)) return reason

static size_t item(const struct tensor *t) { return t->dtype == AI_HAL_I64 ? 8 : 4; }
static int64_t product(const struct tensor *t, int from, int to) {
    int64_t n = 1;
    for (int i = from; i < to; i++) n *= t->dims[i];
    return n;
}
static int64_t count(const struct tensor *t) { return product(t, 0, t->rank); }

static const ai_hal_attribute *attribute(const struct step *s, const char *name) {
    for (uint64_t i = 0; i < s->node->attribute_count; i++)
        if (!strcmp(s->node->attributes[i]->name, name)) return s->node->attributes[i];
    return NULL;
}
/* An attribute: left as it is when it is not there, 0 when it is of another type. */
static int integer(const struct step *s, const char *name, int64_t *value) {
    const ai_hal_attribute *a = attribute(s, name);
    if (a && a->type == AI_HAL_ATTRIBUTE_INT) *value = a->ints[0];
    return !a || a->type == AI_HAL_ATTRIBUTE_INT;
}
static int number(const struct step *s, const char *name, float *value) {
    const ai_hal_attribute *a = attribute(s, name);
    if (a && a->type == AI_HAL_ATTRIBUTE_FLOAT) *value = (float)a->floats[0];
    return !a || a->type == AI_HAL_ATTRIBUTE_FLOAT;
}
static int integers(const struct step *s, const char *name, uint64_t length, int64_t *values, int64_t otherwise) {
    const ai_hal_attribute *a = attribute(s, name);
    if (a && (a->type != AI_HAL_ATTRIBUTE_INTS || a->count != length)) return 0;
    for (uint64_t i = 0; i < length; i++) values[i] = a ? a->ints[i] : otherwise;
    return 1;
}
static int text_is(const struct step *s, const char *name, const char *value, const char *otherwise) {
    const ai_hal_attribute *a = attribute(s, name);
    if (!a) return !strcmp(value, otherwise);
    return a->type == AI_HAL_ATTRIBUTE_STRING && a->strings->length == strlen(value) &&
           !memcmp(a->strings->data, value, strlen(value));
}
static int axis_of(struct step *s, int64_t otherwise) {
    s->axis = otherwise;
    if (!integer(s, "axis", &s->axis)) return 0;
    if (s->axis < 0) s->axis += s->x[0].rank;
    return s->axis >= 0 && s->axis < s->x[0].rank;
}

/* NumPy's broadcasting over the first dimensions of a and b, without their last `skip`. */
static int broadcast(const struct tensor *a, const struct tensor *b, int skip, struct tensor *y) {
    int ra = a->rank > skip ? a->rank - skip : 0, rb = b->rank > skip ? b->rank - skip : 0;
    y->rank = ra > rb ? ra : rb;
    for (int i = 0; i < y->rank; i++) {
        int64_t da = i < y->rank - ra ? 1 : a->dims[i - y->rank + ra], db = i < y->rank - rb ? 1 : b->dims[i - y->rank + rb];
        if (da != db && da != 1 && db != 1) return 0;
        y->dims[i] = da == 1 ? db : da;
    }
    return 1;
}
/* How far apart t's elements lie along y's dimensions: 0 where t is repeated. Elements are blocks of `block`. */
static void spread(const struct tensor *t, int skip, const struct tensor *y, int rank, int64_t block, int64_t *strides) {
    int own = t->rank > skip ? t->rank - skip : 0;
    for (int i = rank - 1, j = own - 1; i >= 0; i--, j--) {
        strides[i] = j < 0 || (t->dims[j] == 1 && y->dims[i] != 1) ? 0 : block;
        if (j >= 0) block *= t->dims[j];
    }
}
static int64_t offset(int rank, const int64_t *at, const int64_t *strides) {
    int64_t sum = 0;
    for (int i = 0; i < rank; i++) sum += at[i] * strides[i];
    return sum;
}
/* Count a position up, the last dimension first; 0 when it is the first one again. */
static int next(int rank, const int64_t *dims, int64_t *at) {
    for (int i = rank - 1; i >= 0; at[i--] = 0)
        if (++at[i] < dims[i]) return 1;
    return 0;
}

/* Eight floats: AVX2 where the processor has it, else pairs of SSE or NEON registers. Memory need not be aligned. */
typedef float vec __attribute__((vector_size(32), aligned(4), may_alias));
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define FAST __attribute__((target_clones("arch=haswell", "default")))
#else
#define FAST
#endif
#define LINE(name, sign) /* One row: an operand lies densely, or is one number that is repeated. */ \
    FAST static void name(int64_t n, const float *a, int64_t sa, const float *b, int64_t sb, float *y) { \
        int64_t i = 0; \
        for (; sa == 1 && sb == 1 && i + 8 <= n; i += 8) *(vec *)(y + i) = *(const vec *)(a + i) sign *(const vec *)(b + i); \
        for (; i < n; i++) y[i] = a[i * sa] sign b[i * sb]; \
    }
LINE(add_line, +)
LINE(mul_line, *)
static const char *check_pair(struct step *s) {
    return broadcast(&s->x[0], &s->x[1], 0, &s->y) ? NULL : "the shapes cannot be broadcast";
}
static void pair(const struct step *s, const float *a, const float *b, float *y, int multiply) {
    int64_t sa[MAX_RANK] = {0}, sb[MAX_RANK] = {0}, at[MAX_RANK] = {0};
    int outer = s->y.rank ? s->y.rank - 1 : 0;
    int64_t n = s->y.rank ? s->y.dims[outer] : 1;
    spread(&s->x[0], 0, &s->y, s->y.rank, 1, sa);
    spread(&s->x[1], 0, &s->y, s->y.rank, 1, sb);
    if (count(&s->y)) do {
        const float *pa = a + offset(outer, at, sa), *pb = b + offset(outer, at, sb);
        (multiply ? mul_line : add_line)(n, pa, n == 1 ? 1 : sa[outer], pb, n == 1 ? 1 : sb[outer], y);
        y += n;
    } while (next(outer, s->y.dims, at));
}
static ai_hal_status add(const struct step *s, const void *const *x, void *y) { pair(s, x[0], x[1], y, 0); return AI_HAL_OK; }
static ai_hal_status mul(const struct step *s, const void *const *x, void *y) { pair(s, x[0], x[1], y, 1); return AI_HAL_OK; }

static const char *check_same(struct step *s) { s->y = s->x[0]; return NULL; }
static const char *check_gelu(struct step *s) {
    s->first = text_is(s, "approximate", "tanh", "none");
    FLAG(s->first || text_is(s, "approximate", "none", "none"), "approximate must be none or tanh");
    return check_same(s);
}
FAST static ai_hal_status relu(const struct step *s, const void *const *x, void *y) {
    const float *in = x[0];
    float *out = y;
    for (int64_t i = 0, n = count(&s->y); i < n; i++) out[i] = in[i] < 0 ? 0 : in[i]; /* NaN stays. */
    return AI_HAL_OK;
}
static ai_hal_status erf_(const struct step *s, const void *const *x, void *y) {
    for (int64_t i = 0, n = count(&s->y); i < n; i++) ((float *)y)[i] = erff(((const float *)x[0])[i]);
    return AI_HAL_OK;
}
static ai_hal_status gelu(const struct step *s, const void *const *x, void *y) {
    for (int64_t i = 0, n = count(&s->y); i < n; i++) {
        float v = ((const float *)x[0])[i];
        float part = s->first ? tanhf(0.7978845608f * (v + 0.044715f * v * v * v)) : erff(v * 0.70710678f);
        ((float *)y)[i] = 0.5f * v * (1 + part);
    }
    return AI_HAL_OK;
}

/* y[m][n] = Σ a[m][k] b[k][n]. Rows and columns of a lie ra and ca apart. Four rows by sixteen columns in registers. */
FAST static void product_of(int64_t m, int64_t n, int64_t k, const float *a, int64_t ra, int64_t ca, const float *b, float *y) {
    for (int64_t i = 0; i < m; i += 4) {
        int64_t rows = m - i < 4 ? m - i : 4, j = 0;
        const float *row[4]; /* Past the end the last row is computed again, and not stored. */
        for (int r = 0; r < 4; r++) row[r] = a + (i + (r < rows ? r : rows - 1)) * ra;
        for (; j + 16 <= n; j += 16) {
            vec sum[4][2] = {0};
            for (int64_t p = 0; p < k; p++) {
                vec low = *(const vec *)(b + p * n + j), high = *(const vec *)(b + p * n + j + 8);
                for (int r = 0; r < 4; r++) sum[r][0] += row[r][p * ca] * low, sum[r][1] += row[r][p * ca] * high;
            }
            for (int64_t r = 0; r < rows; r++) memcpy(y + (i + r) * n + j, sum[r], sizeof sum[r]);
        }
        for (; j < n; j++)
            for (int64_t r = 0; r < rows; r++) {
                float sum = 0;
                for (int64_t p = 0; p < k; p++) sum += row[r][p * ca] * b[p * n + j];
                y[(i + r) * n + j] = sum;
            }
    }
}
static const char *check_matmul(struct step *s) {
    struct tensor *a = &s->x[0], *b = &s->x[1];
    FLAG(a->rank && b->rank, "MatMul of a number");
    FLAG(broadcast(a, b, 2, &s->y), "the batches cannot be broadcast");
    FLAG(s->y.rank <= MAX_RANK - 2, "more than 8 dimensions");
    FLAG(a->dims[a->rank - 1] == b->dims[b->rank > 1 ? b->rank - 2 : 0], "columns of A are not rows of B");
    if (a->rank > 1) s->y.dims[s->y.rank++] = a->dims[a->rank - 2];
    if (b->rank > 1) s->y.dims[s->y.rank++] = b->dims[b->rank - 1];
    return NULL;
}
static ai_hal_status matmul(const struct step *s, const void *const *x, void *y) {
    const struct tensor *a = &s->x[0], *b = &s->x[1];
    int64_t m = a->rank > 1 ? a->dims[a->rank - 2] : 1, n = b->rank > 1 ? b->dims[b->rank - 1] : 1, k = a->dims[a->rank - 1];
    int64_t sa[MAX_RANK], sb[MAX_RANK], at[MAX_RANK] = {0};
    int batches = s->y.rank - (a->rank > 1) - (b->rank > 1);
    spread(a, 2, &s->y, batches, m * k, sa);
    spread(b, 2, &s->y, batches, k * n, sb);
    float *out = y;
    if (count(&s->y)) do {
        const float *pa = x[0], *pb = x[1];
        product_of(m, n, k, pa + offset(batches, at, sa), k, 1, pb + offset(batches, at, sb), out);
        out += m * n;
    } while (next(batches, s->y.dims, at));
    return AI_HAL_OK;
}
static const char *check_gemm(struct step *s) {
    const struct tensor *a = &s->x[0], *b = &s->x[1];
    s->alpha = s->beta = 1;
    FLAG(number(s, "alpha", &s->alpha) && number(s, "beta", &s->beta), "alpha and beta must be numbers");
    FLAG(integer(s, "transA", &s->first) && integer(s, "transB", &s->second), "transA and transB must be integers");
    FLAG(a->rank == 2 && b->rank == 2, "A and B must be matrices");
    FLAG(a->dims[!s->first] == b->dims[!!s->second], "columns of A are not rows of B");
    s->y.rank = 2;
    s->y.dims[0] = a->dims[!!s->first], s->y.dims[1] = b->dims[!s->second];
    if (s->inputs[2] == AI_HAL_NO_VALUE) return NULL;
    struct tensor with;
    FLAG(broadcast(&s->y, &s->x[2], 0, &with) && with.rank == 2 && with.dims[0] == s->y.dims[0] &&
         with.dims[1] == s->y.dims[1], "C cannot be broadcast to the product");
    return NULL;
}
static ai_hal_status gemm(const struct step *s, const void *const *x, void *y) {
    int64_t m = s->y.dims[0], n = s->y.dims[1], k = s->x[0].dims[!s->first], sc[2] = {0};
    const float *b = x[1];
    float *turned = s->second ? malloc((size_t)(n * k + 1) * sizeof *turned) : NULL, *out = y;
    if (s->second && !turned) return AI_HAL_OUT_OF_MEMORY;
    for (int64_t i = 0; turned && i < n * k; i++) turned[i % k * n + i / k] = b[i];
    product_of(m, n, k, x[0], s->first ? 1 : k, s->first ? m : 1, turned ? turned : b, out);
    free(turned);
    if (x[2]) spread(&s->x[2], 0, &s->y, 2, 1, sc);
    for (int64_t i = 0; i < m * n; i++)
        out[i] = s->alpha * out[i] + (x[2] ? s->beta * ((const float *)x[2])[i / n * sc[0] + i % n * sc[1]] : 0);
    return AI_HAL_OK;
}
static const char *check_softmax(struct step *s) {
    FLAG(axis_of(s, -1), "axis is no dimension of the input");
    return check_same(s);
}
static ai_hal_status softmax(const struct step *s, const void *const *x, void *y) {
    int64_t n = s->y.dims[s->axis], inner = product(&s->y, (int)s->axis + 1, s->y.rank), outer = product(&s->y, 0, (int)s->axis);
    for (int64_t line = 0; line < outer * inner; line++) {
        const float *in = (const float *)x[0] + line / inner * n * inner + line % inner;
        float *out = (float *)y + (in - (const float *)x[0]), most = -INFINITY, sum = 0;
        for (int64_t i = 0; i < n; i++) most = fmaxf(most, in[i * inner]);
        for (int64_t i = 0; i < n; i++) sum += out[i * inner] = expf(in[i * inner] - most);
        for (int64_t i = 0; i < n; i++) out[i * inner] /= sum;
    }
    return AI_HAL_OK;
}
static const char *check_norm(struct step *s) {
    int64_t type = 1;
    s->alpha = 1e-5f;
    FLAG(axis_of(s, -1), "axis is no dimension of the input");
    FLAG(number(s, "epsilon", &s->alpha), "epsilon must be a number");
    FLAG(integer(s, "stash_type", &type) && type == 1, "stash_type must be 1, that is f32");
    for (int k = 1; k < 3 && s->inputs[k] != AI_HAL_NO_VALUE; k++)
        FLAG(s->x[k].rank == s->x[0].rank - s->axis &&
             !memcmp(s->x[k].dims, s->x[0].dims + s->axis, (size_t)s->x[k].rank * sizeof *s->x[k].dims),
             "scale and bias must have the shape of what is normalized");
    return check_same(s);
}
static ai_hal_status norm(const struct step *s, const void *const *x, void *y) {
    int64_t n = product(&s->y, (int)s->axis, s->y.rank), outer = product(&s->y, 0, (int)s->axis);
    const float *in = x[0], *scale = x[1], *bias = x[2];
    for (float *out = y; outer--; in += n, out += n) {
        double mean = 0, square = 0;
        for (int64_t i = 0; i < n; i++) mean += in[i];
        mean /= (double)n;
        for (int64_t i = 0; i < n; i++) square += (in[i] - mean) * (in[i] - mean);
        float factor = (float)(1 / sqrt(square / (double)n + s->alpha));
        for (int64_t i = 0; i < n; i++) out[i] = (float)(in[i] - mean) * factor * scale[i] + (bias ? bias[i] : 0);
    }
    return AI_HAL_OK;
}
static const char *check_conv(struct step *s) {
    const struct tensor *x = &s->x[0], *w = &s->x[1];
    int spatial = x->rank - 2;
    s->group = 1;
    FLAG(spatial >= 1 && spatial <= 3 && w->rank == x->rank, "only 1 to 3 spatial dimensions");
    FLAG(text_is(s, "auto_pad", "NOTSET", "NOTSET"), "auto_pad is not supported: give the pads");
    FLAG(integer(s, "group", &s->group) && s->group > 0 && w->dims[0] % s->group == 0 && x->dims[1] > 0 &&
         x->dims[1] % s->group == 0 && w->dims[1] == x->dims[1] / s->group, "the groups do not divide the channels");
    FLAG(integers(s, "strides", (uint64_t)spatial, s->strides, 1) && integers(s, "dilations", (uint64_t)spatial, s->dilations, 1) &&
         integers(s, "pads", 2 * (uint64_t)spatial, s->pads, 0), "strides, dilations or pads are not as many as dimensions");
    FLAG(!attribute(s, "kernel_shape") || (integers(s, "kernel_shape", (uint64_t)spatial, s->list, 0) &&
         !memcmp(s->list, w->dims + 2, (size_t)spatial * sizeof *s->list)), "kernel_shape is not that of W");
    FLAG(s->inputs[2] == AI_HAL_NO_VALUE || (s->x[2].rank == 1 && s->x[2].dims[0] == w->dims[0]), "the bias does not fit W");
    s->y.rank = x->rank;
    s->y.dims[0] = x->dims[0], s->y.dims[1] = w->dims[0];
    for (int i = 0; i < spatial; i++) {
        const int64_t large = 1 << 20, k = w->dims[2 + i], *p = s->pads;
        FLAG(k > 0 && k < large && s->strides[i] > 0 && s->strides[i] < large && s->dilations[i] > 0 && s->dilations[i] < large &&
             p[i] >= 0 && p[i] < large && p[i + spatial] >= 0 && p[i + spatial] < large, "a stride, dilation or pad is out of range");
        int64_t room = x->dims[2 + i] + p[i] + p[i + spatial] - s->dilations[i] * (k - 1) - 1;
        FLAG(x->dims[2 + i] > 0 && room >= 0, "the kernel is larger than the input");
        s->y.dims[2 + i] = room / s->strides[i] + 1;
    }
    return NULL;
}
/* Each group is one product: W times the input's patches, a column for each place of the output. */
static ai_hal_status conv(const struct step *s, const void *const *x, void *y) {
    const struct tensor *in = &s->x[0], *w = &s->x[1];
    int spatial = in->rank - 2;
    int64_t channels = w->dims[1], rows = product(w, 1, w->rank), makes = w->dims[0] / s->group;
    int64_t area = product(in, 2, in->rank), places = product(&s->y, 2, s->y.rank);
    float *patches = malloc((size_t)(rows * places + 1) * sizeof *patches), *out = y;
    if (!patches) return AI_HAL_OUT_OF_MEMORY;
    for (int64_t each = 0; each < in->dims[0] * s->group; each++, out += makes * places) {
        const float *image = (const float *)x[0] + each * channels * area;
        int64_t group = each % s->group, kernel[MAX_RANK] = {0}; /* channel, then place in the kernel */
        float *column = patches;
        do {
            int64_t at[MAX_RANK] = {0};
            do {
                int64_t from = kernel[0], inside = 1;
                for (int i = 0; i < spatial; i++) {
                    int64_t place = at[i] * s->strides[i] - s->pads[i] + kernel[1 + i] * s->dilations[i];
                    inside &= place >= 0 && place < in->dims[2 + i];
                    from = from * in->dims[2 + i] + place;
                }
                *column++ = inside ? image[from] : 0;
            } while (next(spatial, s->y.dims + 2, at));
        } while (next(1 + spatial, w->dims + 1, kernel));
        product_of(makes, places, rows, (const float *)x[1] + group * makes * rows, rows, 1, patches, out);
        for (int64_t i = 0; x[2] && i < makes * places; i++) out[i] += ((const float *)x[2])[group * makes + i / places];
    }
    free(patches);
    return AI_HAL_OK;
}

static ai_hal_status move(const struct step *s, const void *const *x, void *y) {
    if (count(&s->y)) memcpy(y, x[0], (size_t)count(&s->y) * item(&s->y));
    return AI_HAL_OK;
}
/* Whether ONNX's Reshape makes y of these sizes: 0 copies a size (unless allowzero), -1 is what is left. */
static int reshapes(const struct step *s, const int64_t *sizes) {
    for (int i = 0; i < s->y.rank; i++) {
        int64_t size = sizes[i] == 0 && !s->first ? (i < s->x[0].rank ? s->x[0].dims[i] : -2) : sizes[i];
        if (size != s->y.dims[i] && size != -1) return 0;
    }
    return 1;
}
static const char *check_reshape(struct step *s) {
    FLAG(integer(s, "allowzero", &s->first), "allowzero must be an integer");
    FLAG(s->x[1].rank == 1 && s->x[1].dims[0] == s->y.rank, "the shape has not as many sizes as the output");
    FLAG(count(&s->x[0]) == count(&s->y), "the output has not as many elements as the input");
    FLAG(!s->x[1].data || reshapes(s, s->x[1].data), "the shape does not give the output's sizes");
    return NULL;
}
static ai_hal_status reshape(const struct step *s, const void *const *x, void *y) {
    /* A shape that comes at run time must be the one that the program was compiled for. */
    return reshapes(s, x[1]) ? move(s, x, y) : AI_HAL_INVALID_ARGUMENT;
}
static const char *check_transpose(struct step *s) {
    const struct tensor *x = &s->x[0];
    int64_t seen = 0, stride[MAX_RANK], block = 1;
    FLAG(integers(s, "perm", (uint64_t)x->rank, s->list, -1), "perm has not as many numbers as there are dimensions");
    for (int i = x->rank - 1; i >= 0; block *= x->dims[i--]) stride[i] = block;
    for (int i = 0; i < x->rank; i++) {
        int64_t from = attribute(s, "perm") ? s->list[i] : x->rank - 1 - i;
        FLAG(from >= 0 && from < x->rank && !(seen >> from & 1), "perm is no permutation");
        seen |= (int64_t)1 << from;
        s->y.dims[i] = x->dims[from];
        s->strides[i] = stride[from];
    }
    s->y.rank = x->rank;
    return NULL;
}
static ai_hal_status transpose(const struct step *s, const void *const *x, void *y) {
    int64_t at[MAX_RANK] = {0}, n = s->y.rank ? s->y.dims[s->y.rank - 1] : 1, step = s->y.rank ? s->strides[s->y.rank - 1] : 1;
    int outer = s->y.rank ? s->y.rank - 1 : 0;
    size_t size = item(&s->y);
    char *out = y;
    if (count(&s->y)) do {
        const char *in = (const char *)x[0] + (size_t)offset(outer, at, s->strides) * size;
        for (int64_t i = 0; i < n; i++, in += (size_t)step * size, out += size) memcpy(out, in, size);
    } while (next(outer, s->y.dims, at));
    return AI_HAL_OK;
}
static const char *check_gather(struct step *s) {
    const struct tensor *x = &s->x[0], *indices = &s->x[1];
    FLAG(axis_of(s, 0), "axis is no dimension of the input");
    FLAG(x->rank + indices->rank - 1 <= MAX_RANK, "more than 8 dimensions");
    s->y.rank = 0;
    for (int i = 0; i < (int)s->axis; i++) s->y.dims[s->y.rank++] = x->dims[i];
    for (int i = 0; i < indices->rank; i++) s->y.dims[s->y.rank++] = indices->dims[i];
    for (int i = (int)s->axis + 1; i < x->rank; i++) s->y.dims[s->y.rank++] = x->dims[i];
    return NULL;
}
static ai_hal_status gather(const struct step *s, const void *const *x, void *y) {
    int64_t size = s->x[0].dims[s->axis], many = count(&s->x[1]), outer = product(&s->x[0], 0, (int)s->axis);
    size_t block = (size_t)product(&s->x[0], (int)s->axis + 1, s->x[0].rank) * item(&s->y);
    char *out = y;
    for (int64_t o = 0; o < outer; o++)
        for (int64_t i = 0; i < many; i++, out += block) {
            int64_t from = s->x[1].dtype == AI_HAL_I64 ? ((const int64_t *)x[1])[i] : ((const int32_t *)x[1])[i];
            if (from < -size || from >= size) return AI_HAL_INVALID_ARGUMENT;
            if (block) memcpy(out, (const char *)x[0] + (size_t)(o * size + (from < 0 ? from + size : from)) * block, block);
        }
    return AI_HAL_OK;
}

/* Only what is written here is declared: another operator, version or type is refused with the reason. */
static const struct operation OPERATORS[] = {
    {"Add", "ff", 7, 14, 2, check_pair, add},
    {"Conv", "fff", 1, 22, 2, check_conv, conv},
    {"Erf", "f", 9, 13, 1, check_same, erf_},
    {"Gather", "di", 1, 13, 2, check_gather, gather},
    {"Gelu", "f", 20, 20, 1, check_gelu, gelu},
    {"Gemm", "fff", 7, 13, 2, check_gemm, gemm},
    {"LayerNormalization", "fff", 17, 17, 2, check_norm, norm},
    {"MatMul", "ff", 1, 13, 2, check_matmul, matmul},
    {"Mul", "ff", 7, 14, 2, check_pair, mul},
    {"Relu", "f", 6, 14, 1, check_same, relu},
    {"Reshape", "dl", 5, 21, 2, check_reshape, reshape},
    {"Softmax", "f", 13, 13, 1, check_softmax, softmax},
    {"Transpose", "d", 1, 21, 1, check_transpose, transpose},
};

const char *read_spec(const ai_hal_spec *spec, struct tensor *tensor) {
    int64_t elements = 1;
    if (spec->dtype != AI_HAL_F32 && spec->dtype != AI_HAL_I32 && spec->dtype != AI_HAL_I64)
        return spec->dtype == AI_HAL_UNKNOWN ? "a type is not known beforehand" : "only f32, i32 and i64 are supported";
    if (spec->rank > MAX_RANK) return "more than 8 dimensions";
    *tensor = (struct tensor){.dtype = spec->dtype, .rank = (int)spec->rank};
    for (uint32_t i = 0; i < spec->rank; i++) {
        if (spec->dims[i] < 0) return "the device needs fixed shapes";
        if (spec->dims[i] && elements > MAX_ELEMENTS / spec->dims[i]) return "a tensor is too large";
        elements *= spec->dims[i] ? spec->dims[i] : 1;
        tensor->dims[i] = spec->dims[i];
    }
    return NULL;
}
uint64_t tensor_bytes(const struct tensor *tensor) { return (uint64_t)count(tensor) * item(tensor); }

static const char *check_step(const ai_hal_graph *graph, const ai_hal_node *node, struct step *s) {
    const struct operation *known = NULL;
    const char *wrong;
    for (size_t i = 0; i < sizeof OPERATORS / sizeof *OPERATORS; i++)
        if (!*node->domain && !strcmp(node->op, OPERATORS[i].name)) known = &OPERATORS[i];
    FLAG(known, "the operator is not implemented");
    FLAG(node->version >= known->since && node->version <= known->until, "this version is not implemented");
    FLAG(node->input_count >= known->least && node->input_count <= strlen(known->types), "wrong number of inputs");
    *s = (struct step){.op = known, .node = node, .inputs = {-1, -1, -1}, .output = node->output_count ? node->outputs[0] : -1};
    for (uint32_t i = 0; i < node->input_count; i++) {
        s->inputs[i] = node->inputs[i];
        FLAG(s->inputs[i] != AI_HAL_NO_VALUE || i >= known->least, "an input is missing");
        if (s->inputs[i] == AI_HAL_NO_VALUE) continue;
        const ai_hal_value *value = graph->values[s->inputs[i]];
        if ((wrong = read_spec(&value->spec, &s->x[i]))) return wrong;
        s->x[i].data = value->data;
        ai_hal_dtype type = s->x[i].dtype;
        FLAG(known->types[i] != 'f' || type == AI_HAL_F32, "only implemented for f32");
        FLAG(known->types[i] != 'i' || type != AI_HAL_F32, "indices must be i32 or i64");
        FLAG(known->types[i] != 'l' || type == AI_HAL_I64, "sizes must be i64");
    }
    FLAG(s->output != AI_HAL_NO_VALUE, "the first output must be wanted");
    for (uint32_t i = 1; i < node->output_count; i++)
        FLAG(node->outputs[i] == AI_HAL_NO_VALUE, "only the first output is implemented");
    struct tensor declared;
    if ((wrong = read_spec(&graph->values[s->output]->spec, &declared))) return wrong;
    s->y = declared; /* Reshape makes what is declared; the others say what they make. */
    if ((wrong = known->check(s))) return wrong;
    FLAG(declared.dtype == s->x[0].dtype && declared.rank == s->y.rank &&
         !memcmp(declared.dims, s->y.dims, (size_t)declared.rank * sizeof *declared.dims),
         "the output's declared shape or type is not what the operator makes");
    s->y = declared;
    return NULL;
}
int prepare_step(const ai_hal_graph *graph, uint32_t number, struct step *step, char reason[TEXT]) {
    const ai_hal_node *node = graph->nodes[number];
    const char *wrong = check_step(graph, node, step);
    snprintf(reason, TEXT, "%.60s-%lld: %s", node->op, (long long)node->version, wrong ? wrong : "");
    step->node = NULL; /* What it points to goes with the call. */
    for (int i = 0; i < MAX_INPUTS; i++) step->x[i].data = NULL;
    return !wrong;
}
ai_hal_status run_step(const struct step *step, const void *const *x, void *y, char reason[TEXT]) {
    ai_hal_status status = step->op->run(step, x, y);
    if (status == AI_HAL_INVALID_ARGUMENT) snprintf(reason, TEXT, "%s: an index or a size is out of range", step->op->name);
    if (status == AI_HAL_OUT_OF_MEMORY) snprintf(reason, TEXT, "%s: no memory for intermediate results", step->op->name);
    return status;
}
