/* An example backend in C: a device that computes on the host, with a thread for each queue. Put calls to
 * your driver in place of memory, operators and queues. README.md beside this file goes through it. */
#define _GNU_SOURCE
#include <math.h>

#include "ai_hal_host.h"
#include "ai_hal_onnx.h"

enum { ALIGN = AI_HAL_HOST_ALIGNMENT, RANK = AI_HAL_MAX_RANK, TEXT = AI_HAL_REASON_SIZE };
static const uint64_t MEMORY_BYTES = 1ull << 30;
#define FAIL(status, ...) ai_hal_fail(error, AI_HAL_##status, NULL, __VA_ARGS__)

/* ---- Step 1: the device. A real backend looks for it here, /dev/accel/accel0 say. When something is missing
 * return ai_hal_fail(error, AI_HAL_UNAVAILABLE, "install firmware-acme", "the firmware is missing"). */
struct ai_hal_context {
    ai_hal_host_memory memory; /* Step 2: the host's. The functions for it are in ai_hal_host.h. */
};
static const ai_hal_device DEVICE = {sizeof DEVICE, 0, "0", "host processor", "cpu", NULL};
static const ai_hal_device *const LIST[] = {&DEVICE};
static const ai_hal_devices DEVICES = {sizeof DEVICES, 1, LIST};

static ai_hal_status probe(const ai_hal_host *host, const ai_hal_devices **devices, ai_hal_error **error) {
    AI_HAL_CHECK(host, ai_hal_host, next);
    AI_HAL_NEED(devices);
    *devices = &DEVICES;
    return AI_HAL_OK;
}
static void devices_free(const ai_hal_devices *devices) { (void)devices; } /* The list is constant. */
static ai_hal_status open_device(const ai_hal_open_args *args, ai_hal_context **context,
                                 ai_hal_error **error) {
    AI_HAL_CHECK(args, ai_hal_open_args, device);
    AI_HAL_NEED(args->device);
    AI_HAL_NEED(context);
    if (*args->device && strcmp(args->device, DEVICE.id))
        return FAIL(NOT_SUPPORTED, "there is no device '%.40s'", args->device);
    ai_hal_context *made = malloc(sizeof *made);
    if (!made) return FAIL(OUT_OF_MEMORY, "no memory for a context");
    ai_hal_host_memory_init(&made->memory, MEMORY_BYTES);
    *context = made;
    return AI_HAL_OK;
}
static void close_device(ai_hal_context *context) {
    ai_hal_host_memory_end(&context->memory);
    free(context);
}
static ai_hal_status capabilities(ai_hal_context *context, ai_hal_capabilities *found, ai_hal_error **error) {
    static const ai_hal_dtype types[] = {AI_HAL_F32, AI_HAL_I32, AI_HAL_I64};
    const ai_hal_capabilities made = {sizeof made, AI_HAL_HOST_MEMORY, MEMORY_BYTES, ALIGN, 0, 3, 0, types};
    AI_HAL_NEED(context);
    AI_HAL_CHECK(found, ai_hal_capabilities, dtypes);
    ai_hal_fill(found, &made);
    return AI_HAL_OK;
}

/* ---- Step 3: operators, of f32 unless they only move elements. A compiler of your own takes their place.
 * Shapes and attributes were checked by ai_hal_read_op(); inputs that are left out are NULL. */
#if defined __x86_64__ && defined __GLIBC__ && !defined __SANITIZE_ADDRESS__ && !defined __SANITIZE_THREAD__
#define FAST __attribute__((target_clones("arch=haswell", "default"))) /* Chosen when it is loaded. */
#else
#define FAST
#endif
typedef float vec __attribute__((vector_size(32), aligned(4), may_alias)); /* AVX2, or twice SSE or NEON. */
typedef uint32_t bits32 __attribute__((may_alias));
typedef uint64_t bits64 __attribute__((may_alias));

/* One line of elements. Those of an operand lie sa or sb apart, which is 0 for one that is repeated. */
typedef void line(int64_t n, const void *a, int64_t sa, const void *b, int64_t sb, void *y);
#define LINE(name, type, result)                                                                      \
    FAST static void name(int64_t n, const void *a, int64_t sa, const void *b, int64_t sb, void *y) { \
        for (int64_t i = 0; i < n; i++) {                                                             \
            type p = ((const type *)a)[i * sa], q = ((const type *)b)[i * sb];                        \
            (void)q, ((type *)y)[i] = (result);                                                       \
        }                                                                                             \
    }
LINE(add, float, p + q)
LINE(mul, float, p * q)
LINE(relu, float, p < 0 ? 0 : p) /* NaN stays. */
LINE(erf_, float, erff(p))
LINE(gelu, float, 0.5f * p * (1 + erff(p * 0.70710678f)))
LINE(gelu_tanh, float, 0.5f * p * (1 + tanhf(0.7978845608f * (p + 0.044715f * p * p * p))))
LINE(copy32, bits32, p)
LINE(copy64, bits64, p)

static ai_hal_status lines(const ai_hal_op *op, line *line, const void *a, const int64_t *sa, const void *b,
                           const int64_t *sb, char *y) {
    uint32_t last = op->y.rank ? op->y.rank - 1 : 0; /* A number is a line of one. */
    int64_t at[RANK] = {0}, n = op->y.rank ? op->y.dims[last] : 1, size = ai_hal_element_bytes(op->y.dtype);
    for (int more = ai_hal_count(&op->y) > 0; more; more = ai_hal_next(last, op->y.dims, at), y += n * size) {
        const char *pa = (const char *)a + ai_hal_offset(last, at, sa) * size;
        const char *pb = (const char *)b + ai_hal_offset(last, at, sb) * size;
        line(n, pa, sa[last], pb, sb[last], y);
    }
    return AI_HAL_OK;
}
static ai_hal_status elementwise(const ai_hal_op *op, const float *const *x, float *y) {
    static line *const of[] = {[AI_HAL_OP_ADD] = add, [AI_HAL_OP_MUL] = mul, [AI_HAL_OP_RELU] = relu,
                               [AI_HAL_OP_ERF] = erf_, [AI_HAL_OP_GELU] = gelu};
    int64_t strides[2][RANK] = {{0}};
    int second = x[1] != NULL;
    ai_hal_strides(&op->x[0], 0, &op->y, op->y.rank, 1, strides[0]);
    ai_hal_strides(&op->x[second], 0, &op->y, op->y.rank, 1, strides[1]);
    return lines(op, op->tanh ? gelu_tanh : of[op->kind], x[0], strides[0], x[second], strides[1], (char *)y);
}
static ai_hal_status transpose(const ai_hal_op *op, const float *const *x, float *y) {
    int64_t own[RANK], strides[RANK] = {0};
    ai_hal_strides(&op->x[0], 0, &op->x[0], op->y.rank, 1, own);
    for (uint32_t i = 0; i < op->y.rank; i++) strides[i] = own[op->perm[i]];
    line *copy = ai_hal_element_bytes(op->y.dtype) == 8 ? copy64 : copy32;
    return lines(op, copy, x[0], strides, x[0], strides, (char *)y);
}
static ai_hal_status reshape(const ai_hal_op *op, const float *const *x, float *y) {
    if (!ai_hal_reshapes(op, (const int64_t *)x[1])) return AI_HAL_INVALID_ARGUMENT; /* Known only now. */
    if (ai_hal_count(&op->y)) memcpy(y, x[0], ai_hal_shape_bytes(&op->y));
    return AI_HAL_OK;
}
static ai_hal_status gather(const ai_hal_op *op, const float *const *x, float *y) {
    const ai_hal_shape *from = &op->x[0], *indices = &op->x[1];
    uint32_t axis = (uint32_t)op->axis;
    int64_t size = from->dims[axis], many = ai_hal_count(indices), outer = ai_hal_elements(from, 0, axis);
    int64_t block = ai_hal_elements(from, axis + 1, from->rank) * ai_hal_element_bytes(from->dtype);
    const int32_t *narrow = (const int32_t *)x[1];
    const int64_t *wide = (const int64_t *)x[1];
    for (int64_t i = 0; i < outer * many; i++) {
        int64_t at = indices->dtype == AI_HAL_I64 ? wide[i % many] : narrow[i % many];
        if (at < -size || at >= size) return AI_HAL_INVALID_ARGUMENT;
        const char *row = (const char *)x[0] + (i / many * size + (at < 0 ? at + size : at)) * block;
        if (block) memcpy((char *)y + i * block, row, (size_t)block);
    }
    return AI_HAL_OK;
}
/* y[m][n] = Σ a[m][k] b[k][n]; rows lie ra and rb apart, columns ca and cb. Sixteen columns of b are packed,
 * so that the inner loop reads memory in order; four rows by sixteen columns of y stay in registers. */
FAST static ai_hal_status multiply(int64_t m, int64_t n, int64_t k, const float *a, int64_t ra, int64_t ca,
                                   const float *b, int64_t rb, int64_t cb, float *y) {
    vec(*panel)[2] = malloc((size_t)(k + 1) * sizeof *panel);
    if (!panel) return AI_HAL_OUT_OF_MEMORY;
    for (int64_t j = 0; j < n; j += 16) {
        int64_t width = n - j < 16 ? n - j : 16;
        for (int64_t p = 0; p < k; p++)
            for (int c = 0; c < 16; c++) panel[p][c / 8][c % 8] = c < width ? b[p * rb + (j + c) * cb] : 0;
        for (int64_t i = 0; i < m; i += 4) {
            vec sum[4][2] = {0};
            const float *row[4]; /* Past the end the last row is computed again, and not stored. */
            for (int64_t r = 0; r < 4; r++) row[r] = a + (i + r < m ? i + r : m - 1) * ra;
            for (int64_t p = 0; p < k; p++)
                for (int r = 0; r < 8; r++) sum[r / 2][r % 2] += row[r / 2][p * ca] * panel[p][r % 2];
            for (int64_t r = 0; r < 4 && i + r < m; r++)
                memcpy(y + (i + r) * n + j, sum[r], (size_t)width * sizeof *y);
        }
    }
    free(panel);
    return AI_HAL_OK;
}
static ai_hal_status product(const ai_hal_op *op, const float *const *x, float *y) {
    const ai_hal_matrices of = ai_hal_matrices_of(op);
    int64_t at[RANK] = {0}, strides[RANK] = {0}, count = ai_hal_count(&op->y), more = count > 0;
    ai_hal_status status = AI_HAL_OK;
    for (float *to = y; more && !status; to += of.m * of.n) {
        const float *a = x[0] + ai_hal_offset(of.batches, at, of.sa);
        const float *b = x[1] + ai_hal_offset(of.batches, at, of.sb);
        status = multiply(of.m, of.n, of.k, a, of.ra, of.ca, b, of.rb, of.cb, to);
        more = ai_hal_next(of.batches, op->y.dims, at);
    }
    if (x[2]) ai_hal_strides(&op->x[2], 0, &op->y, 2, 1, strides);
    for (int64_t i = 0; op->kind == AI_HAL_OP_GEMM && i < count; i++)
        y[i] = op->alpha * y[i] + (x[2] ? op->beta * x[2][i / of.n * strides[0] + i % of.n * strides[1]] : 0);
    return status;
}
/* Each group is one product: W times the input's patches, a column for each place of the output. */
static ai_hal_status conv(const ai_hal_op *op, const float *const *x, float *y) {
    const ai_hal_shape *in = &op->x[0], *w = &op->x[1];
    int64_t depth = ai_hal_elements(w, 1, w->rank), makes = w->dims[0] / op->group, size = w->dims[1];
    int64_t places = ai_hal_elements(&op->y, 2, in->rank), image = size * ai_hal_elements(in, 2, in->rank);
    if (!ai_hal_count(&op->y)) return AI_HAL_OK;
    float *patches = malloc((size_t)(depth * places) * sizeof *patches);
    ai_hal_status status = patches ? AI_HAL_OK : AI_HAL_OUT_OF_MEMORY;
    for (int64_t i = 0; !status && i < in->dims[0] * op->group; i++, y += makes * places) {
        int64_t kernel[RANK] = {0}, at[RANK] = {0}, first = i % op->group * makes, patch = 0;
        do {
            int64_t from = ai_hal_conv_offset(op, kernel, at);
            patches[patch++] = from < 0 ? 0 : x[0][i * image + from];
        } while (ai_hal_next(in->rank - 2, op->y.dims + 2, at) ||
                 ai_hal_next(in->rank - 1, w->dims + 1, kernel));
        status = multiply(makes, places, depth, x[1] + first * depth, depth, 1, patches, places, 1, y);
        for (int64_t j = 0; x[2] && j < makes * places; j++) y[j] += x[2][first + j / places];
    }
    free(patches);
    return status;
}
static ai_hal_status softmax(const ai_hal_op *op, const float *const *x, float *y) {
    uint32_t axis = (uint32_t)op->axis;
    int64_t n = op->y.dims[axis], inner = ai_hal_elements(&op->y, axis + 1, op->y.rank);
    for (int64_t i = 0, count = ai_hal_elements(&op->y, 0, axis) * inner; i < count; i++) {
        const float *in = x[0] + i / inner * n * inner + i % inner;
        float *out = y + (in - x[0]), most = -INFINITY, sum = 0;
        for (int64_t j = 0; j < n; j++) most = fmaxf(most, in[j * inner]);
        for (int64_t j = 0; j < n; j++) sum += out[j * inner] = expf(in[j * inner] - most);
        for (int64_t j = 0; j < n; j++) out[j * inner] /= sum;
    }
    return AI_HAL_OK;
}
static ai_hal_status norm(const ai_hal_op *op, const float *const *x, float *y) {
    int64_t n = ai_hal_elements(&op->y, (uint32_t)op->axis, op->y.rank), count = ai_hal_count(&op->y);
    for (const float *in = x[0], *end = in + count; in < end; in += n, y += n) {
        double mean = 0, square = 0;
        for (int64_t j = 0; j < n; j++) mean += in[j];
        mean /= (double)n;
        for (int64_t j = 0; j < n; j++) square += (in[j] - mean) * (in[j] - mean);
        double root = sqrt(square / (double)n + op->epsilon);
        for (int64_t j = 0; j < n; j++)
            y[j] = (float)((in[j] - mean) / root) * x[1][j] + (x[2] ? x[2][j] : 0);
    }
    return AI_HAL_OK;
}

static ai_hal_status (*const KERNELS[])(const ai_hal_op *op, const float *const *x, float *y) = {
    [AI_HAL_OP_ADD] = elementwise,  [AI_HAL_OP_CONV] = conv,       [AI_HAL_OP_ERF] = elementwise,
    [AI_HAL_OP_GATHER] = gather,    [AI_HAL_OP_GELU] = elementwise, [AI_HAL_OP_GEMM] = product,
    [AI_HAL_OP_MATMUL] = product,   [AI_HAL_OP_MUL] = elementwise, [AI_HAL_OP_LAYER_NORMALIZATION] = norm,
    [AI_HAL_OP_RELU] = elementwise, [AI_HAL_OP_RESHAPE] = reshape, [AI_HAL_OP_SOFTMAX] = softmax,
    [AI_HAL_OP_TRANSPOSE] = transpose,
};

/* Why a node cannot be run, or NULL. Both what is declared and what is compiled come through here. */
static const char *read_node(const ai_hal_graph *graph, const ai_hal_node *node, ai_hal_op *op) {
    const char *wrong = ai_hal_read_op(graph, node, op);
    if (wrong || op->x[0].dtype == AI_HAL_F32) return wrong;
    if (op->moves && (op->x[0].dtype == AI_HAL_I32 || op->x[0].dtype == AI_HAL_I64)) return NULL;
    return "only implemented for f32, and for i32 and i64 where elements only move";
}

/* ---- Step 4: programs. A graph goes when compile() returns: what is needed of it is copied. */
struct value {
    ai_hal_shape shape;
    void *constant; /* Its bytes; or NULL, and it is made */
    uint64_t place; /* so far into the memory of a run. */
};
struct ai_hal_program {
    atomic_int references; /* The host's, and one for each submission under way. */
    const ai_hal_context *context;
    uint32_t value_count, op_count, input_count, end_count;
    uint64_t scratch_bytes;
    struct value *values;
    ai_hal_op *ops;
    int32_t *ends; /* Indices of the values that are inputs, then of the outputs. */
    ai_hal_spec *specs;
};

static void program_free(ai_hal_program *p) {
    if (atomic_fetch_sub(&p->references, 1) > 1) return;
    for (uint32_t i = 0; p->values && i < p->value_count; i++) free(p->values[i].constant);
    free(p->values), free(p->ops), free(p->ends), free(p->specs), free(p);
}
static ai_hal_status node_supported(ai_hal_context *context, const ai_hal_graph *graph, uint32_t node,
                                    ai_hal_support *support, ai_hal_error **error) {
    ai_hal_op op;
    AI_HAL_NEED(context);
    AI_HAL_CHECK(graph, ai_hal_graph, reserved);
    AI_HAL_CHECK(support, ai_hal_support, reason);
    if (node >= graph->node_count) return FAIL(INVALID_ARGUMENT, "there is no node %u", node);
    ai_hal_answer(support, graph->nodes[node], read_node(graph, graph->nodes[node], &op));
    return AI_HAL_OK;
}
static ai_hal_status fill(ai_hal_program *p, const ai_hal_graph *graph, ai_hal_error **error) {
    for (uint32_t i = 0; i < p->value_count; i++) {
        struct value *value = &p->values[i];
        ai_hal_status status = ai_hal_read_value(graph->values[i], &value->shape, error);
        if (status) return status;
        uint64_t nbytes = ai_hal_shape_bytes(&value->shape);
        value->place = p->scratch_bytes;
        if (!graph->values[i]->data) {
            p->scratch_bytes += ai_hal_padded(nbytes, ALIGN);
            continue;
        }
        value->constant = malloc(nbytes + 1);
        if (!value->constant) return FAIL(OUT_OF_MEMORY, "no memory for the constants");
        memcpy(value->constant, graph->values[i]->data, nbytes);
    }
    for (uint32_t i = 0; i < p->op_count; i++) {
        const char *wrong = read_node(graph, graph->nodes[i], &p->ops[i]);
        if (wrong) return FAIL(NOT_SUPPORTED, "%.60s: %s", graph->nodes[i]->op, wrong);
    }
    for (uint32_t i = 0; i < p->end_count; i++) {
        p->ends[i] = i < p->input_count ? graph->inputs[i] : graph->outputs[i - p->input_count];
        p->specs[i] = ai_hal_spec_of(&p->values[p->ends[i]].shape);
    }
    return AI_HAL_OK;
}
static ai_hal_status compile(ai_hal_context *context, const ai_hal_compile_args *args,
                             ai_hal_program **program, ai_hal_error **error) {
    AI_HAL_NEED(context);
    AI_HAL_NEED(program);
    AI_HAL_CHECK(args, ai_hal_compile_args, graph);
    const ai_hal_graph *graph = args->graph;
    AI_HAL_CHECK(graph, ai_hal_graph, reserved);
    ai_hal_program *p = calloc(1, sizeof *p);
    if (!p) return FAIL(OUT_OF_MEMORY, "no memory for a program");
    *p = (ai_hal_program){1, context, graph->value_count, graph->node_count, graph->input_count,
                          graph->input_count + graph->output_count, 0, NULL, NULL, NULL, NULL};
    p->values = calloc(p->value_count + 1u, sizeof *p->values);
    p->ops = calloc(p->op_count + 1u, sizeof *p->ops);
    p->ends = calloc(p->end_count + 1u, sizeof *p->ends);
    p->specs = calloc(p->end_count + 1u, sizeof *p->specs);
    int enough = p->values && p->ops && p->ends && p->specs;
    ai_hal_status status = enough ? fill(p, graph, error) : FAIL(OUT_OF_MEMORY, "no memory for a program");
    if (status) program_free(p);
    else *program = p;
    return status;
}
static ai_hal_status program_info(ai_hal_program *p, ai_hal_program_info *info, ai_hal_error **error) {
    AI_HAL_NEED(p);
    return ai_hal_describe(info, p->input_count, p->end_count - p->input_count, p->specs, error);
}
/* Memory in between is of the run, since a program may run on many queues at once. */
static ai_hal_status run(const ai_hal_program *p, char *const *ends, char message[TEXT]) {
    char *scratch = malloc(p->scratch_bytes + 1), **at = calloc(p->value_count + 1u, sizeof *at);
    ai_hal_status status = scratch && at ? AI_HAL_OK : AI_HAL_OUT_OF_MEMORY;
    snprintf(message, TEXT, "no memory for %llu bytes in between", (unsigned long long)p->scratch_bytes);
    for (uint32_t i = 0; !status && i < p->value_count; i++)
        at[i] = p->values[i].constant ? p->values[i].constant : scratch + p->values[i].place;
    for (uint32_t i = p->end_count; !status && i--;) /* Inputs last: one may be an output as well. */
        if (!p->values[p->ends[i]].constant) at[p->ends[i]] = ends[i];
    for (uint32_t i = 0; !status && i < p->op_count; i++) {
        const ai_hal_op *op = &p->ops[i];
        const float *x[AI_HAL_OP_INPUTS];
        for (int k = 0; k < AI_HAL_OP_INPUTS; k++)
            x[k] = op->inputs[k] == AI_HAL_NO_VALUE ? NULL : (const float *)at[op->inputs[k]];
        status = KERNELS[op->kind](op, x, (float *)at[op->output]);
        const char *why = status == AI_HAL_OUT_OF_MEMORY ? "no memory" : "an index or a size is out of range";
        if (status) snprintf(message, TEXT, "%s: %s", op->name, why);
    }
    for (uint32_t i = p->input_count; !status && i < p->end_count; i++) {
        const char *from = at[p->ends[i]]; /* Elsewhere: an input or constant, or one value twice. */
        if (from != ends[i]) memmove(ends[i], from, ai_hal_shape_bytes(&p->values[p->ends[i]].shape));
    }
    free(scratch), free(at);
    return status;
}

/* ---- Step 5: queues. Each has a thread of its own. Order, failures and events are kept by ai_hal_host.h. */
static void *serve(void *argument) {
    ai_hal_queue *queue = argument;
    ai_hal_event *event;
    while ((event = ai_hal_queue_take(queue))) {
        event->outcome.status = run(event->program, event->tensors, event->outcome.message);
        ai_hal_queue_end(queue, event);
    }
    return NULL;
}
static ai_hal_status queue_create(ai_hal_context *context, ai_hal_queue **queue, ai_hal_error **error) {
    return ai_hal_queue_start(context, serve, queue, error);
}
static ai_hal_status queue_submit(ai_hal_queue *queue, const ai_hal_submit_args *args, ai_hal_event **event,
                                  ai_hal_error **error) {
    AI_HAL_NEED(queue);
    AI_HAL_CHECK(args, ai_hal_submit_args, output_count);
    AI_HAL_NEED(args->program);
    ai_hal_program *p = args->program;
    uint32_t inputs = p->input_count, outputs = p->end_count - inputs;
    if (args->input_count != inputs || args->output_count != outputs || p->context != queue->context ||
        (inputs && !args->inputs) || (outputs && !args->outputs))
        return FAIL(INVALID_ARGUMENT, "the program has %u inputs, %u outputs, one context", inputs, outputs);
    ai_hal_event *made = ai_hal_event_new(p->end_count);
    if (!made) return FAIL(OUT_OF_MEMORY, "no memory for a submission");
    for (uint32_t i = 0; i < p->end_count; i++) {
        const ai_hal_tensor *tensor = i < inputs ? &args->inputs[i] : &args->outputs[i - inputs];
        made->tensors[i] = ai_hal_host_tensor(queue->context, tensor, &p->values[p->ends[i]].shape, error);
        if (made->tensors[i]) continue;
        ai_hal_host_event_destroy(made);
        return AI_HAL_INVALID_ARGUMENT;
    }
    atomic_fetch_add(&p->references, 1);
    made->program = p, made->release = program_free;
    return ai_hal_queue_push(queue, made, event);
}

/* ---- Step 6: the table. What is left out at the end is NULL: no programs are kept, no power is measured. */
static const ai_hal_api API = {
    .size = sizeof API, .major = AI_HAL_MAJOR, .minor = AI_HAL_MINOR, .name = "example-c", .version = "1.0",
    .error_free = ai_hal_error_release, .probe = probe, .devices_free = devices_free, .open = open_device,
    .close = close_device, .capabilities = capabilities, .allocate = ai_hal_host_allocate,
    .free = ai_hal_host_free, .copy_in = ai_hal_host_copy_in, .copy_out = ai_hal_host_copy_out,
    .statistics = ai_hal_host_statistics, .node_supported = node_supported, .compile = compile,
    .program_info = program_info, .program_free = program_free, .queue_create = queue_create,
    .queue_submit = queue_submit, .queue_record = ai_hal_host_record, .queue_wait = ai_hal_host_wait,
    .queue_callback = ai_hal_host_callback, .queue_synchronize = ai_hal_host_synchronize,
    .queue_destroy = ai_hal_host_queue_destroy, .event_query = ai_hal_host_event_query,
    .event_wait = ai_hal_host_event_wait, .event_destroy = ai_hal_host_event_destroy, .map = ai_hal_host_map,
    .import_memory = ai_hal_host_import, .event_fd = ai_hal_host_event_fd,
};

const ai_hal_api *ai_hal_get_api(uint32_t major) { return major == AI_HAL_MAJOR ? &API : NULL; }
