/* An example vendor backend in C: a device that computes on the host, with a thread for each queue.
 * Replace memory, compiler and queues by calls to your driver. README.md beside this file goes through it step by step.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "ai_hal.h"
#include "operators.h"

enum { ALIGNMENT = 64, MAX_ALIGNMENT = 1 << 21 };
static const uint64_t MEMORY_BYTES = 1ull << 30;

/* ---- Step 1: errors. Whatever fails says so in a sentence that a person can act on. */
struct error { ai_hal_error public; char message[TEXT]; };

__attribute__((format(printf, 4, 5)))
static ai_hal_status fail(ai_hal_error **error, ai_hal_status code, const char *hint, const char *format, ...) {
    struct error *made = error ? calloc(1, sizeof *made) : NULL;
    if (!made) return code; /* The code alone will do. */
    va_list list;
    va_start(list, format);
    vsnprintf(made->message, sizeof made->message, format, list);
    va_end(list);
    made->public = (ai_hal_error){sizeof made->public, code, made->message, hint};
    *error = &made->public;
    return code;
}
static void error_free(ai_hal_error *error) { free(error); }

/* A structure smaller than in version 1.0 was never filled in. Ask AI_HAL_HAS in the same way for what came later. */
#define CHECK(args, type, last) \
    if (!(args) || !AI_HAL_HAS(args, type, last)) return fail(error, AI_HAL_INVALID_ARGUMENT, NULL, #type " is too small")
#define NEED(what) \
    if (!(what)) return fail(error, AI_HAL_INVALID_ARGUMENT, NULL, #what " is missing")

/* ---- Step 2: devices. A real backend looks for its device here, /dev/accel/accel0 say, and returns
 * fail(error, AI_HAL_UNAVAILABLE, "install firmware-acme", "the NPU's firmware is missing") when something is missing. */
struct ai_hal_context {
    pthread_mutex_t lock; /* Of what follows. */
    uint64_t in_use, peak, allocations, frees;
};
static const ai_hal_device DEVICE = {sizeof DEVICE, 0, "0", "host processor", "cpu", NULL};
static const ai_hal_device *const LIST[] = {&DEVICE};
static const ai_hal_devices DEVICES = {sizeof DEVICES, 1, LIST};

static ai_hal_status probe(const ai_hal_host *host, const ai_hal_devices **devices, ai_hal_error **error) {
    CHECK(host, ai_hal_host, next);
    NEED(devices);
    *devices = &DEVICES;
    return AI_HAL_OK;
}
static void devices_free(const ai_hal_devices *devices) { (void)devices; } /* The list is constant. */

static ai_hal_status open_device(const ai_hal_open_args *args, ai_hal_context **context, ai_hal_error **error) {
    CHECK(args, ai_hal_open_args, device);
    NEED(args->device);
    NEED(context);
    if (*args->device && strcmp(args->device, DEVICE.id))
        return fail(error, AI_HAL_NOT_SUPPORTED, "its only device is 0", "there is no device '%.40s'", args->device);
    ai_hal_context *made = calloc(1, sizeof *made);
    if (!made) return fail(error, AI_HAL_OUT_OF_MEMORY, NULL, "no memory for a context");
    pthread_mutex_init(&made->lock, NULL);
    *context = made;
    return AI_HAL_OK;
}
static void close_device(ai_hal_context *context) {
    pthread_mutex_destroy(&context->lock);
    free(context);
}
static ai_hal_status capabilities(ai_hal_context *context, ai_hal_capabilities *found, ai_hal_error **error) {
    static const ai_hal_dtype dtypes[] = {AI_HAL_F32, AI_HAL_I32, AI_HAL_I64};
    NEED(context);
    CHECK(found, ai_hal_capabilities, dtypes);
    found->size = sizeof *found; /* What is filled in. */
    found->features = AI_HAL_HOST_MEMORY;
    found->memory_bytes = MEMORY_BYTES;
    found->alignment = ALIGNMENT;
    found->max_queues = 0;
    found->dtype_count = sizeof dtypes / sizeof *dtypes;
    found->dtypes = dtypes;
    return AI_HAL_OK;
}

/* ---- Step 3: memory. */
struct ai_hal_buffer { const ai_hal_context *context; char *data; uint64_t nbytes; int lent; };

static ai_hal_status allocate(ai_hal_context *context, const ai_hal_allocate_args *args, ai_hal_buffer **buffer,
                              ai_hal_error **error) {
    NEED(context);
    NEED(buffer);
    CHECK(args, ai_hal_allocate_args, alignment);
    uint64_t alignment = args->alignment ? args->alignment : ALIGNMENT, nbytes = args->nbytes;
    if (alignment > MAX_ALIGNMENT || alignment & (alignment - 1))
        return fail(error, AI_HAL_INVALID_ARGUMENT, NULL, "an alignment is a power of two up to %d", MAX_ALIGNMENT);
    if (alignment < ALIGNMENT) alignment = ALIGNMENT;
    pthread_mutex_lock(&context->lock);
    uint64_t left = MEMORY_BYTES - context->in_use;
    if (nbytes <= left) context->in_use += nbytes;
    pthread_mutex_unlock(&context->lock);
    if (nbytes > left)
        return fail(error, AI_HAL_OUT_OF_MEMORY, NULL, "%llu bytes were asked for, %llu are left",
                    (unsigned long long)nbytes, (unsigned long long)left);
    ai_hal_buffer *made = malloc(sizeof *made);
    char *data = made ? aligned_alloc(alignment, (nbytes + alignment) & ~(alignment - 1)) : NULL;
    pthread_mutex_lock(&context->lock);
    if (!data) context->in_use -= nbytes;
    else context->allocations++;
    if (context->in_use > context->peak) context->peak = context->in_use;
    pthread_mutex_unlock(&context->lock);
    if (!data) {
        free(made);
        return fail(error, AI_HAL_OUT_OF_MEMORY, NULL, "%llu bytes cannot be had", (unsigned long long)nbytes);
    }
    *made = (ai_hal_buffer){context, data, nbytes, 0};
    *buffer = made;
    return AI_HAL_OK;
}
static void free_buffer(ai_hal_context *context, ai_hal_buffer *buffer) {
    if (!buffer->lent) {
        free(buffer->data);
        pthread_mutex_lock(&context->lock);
        context->in_use -= buffer->nbytes;
        context->frees++;
        pthread_mutex_unlock(&context->lock);
    }
    free(buffer);
}
static ai_hal_status place(const ai_hal_context *context, const ai_hal_buffer *buffer, uint64_t offset, uint64_t nbytes,
                           ai_hal_error **error) {
    if (!context || !buffer || buffer->context != context)
        return fail(error, AI_HAL_INVALID_ARGUMENT, NULL, "the buffer is missing, or of another context");
    if (offset > buffer->nbytes || nbytes > buffer->nbytes - offset)
        return fail(error, AI_HAL_INVALID_ARGUMENT, NULL, "%llu bytes at %llu lie outside a buffer of %llu",
                    (unsigned long long)nbytes, (unsigned long long)offset, (unsigned long long)buffer->nbytes);
    return AI_HAL_OK;
}
static ai_hal_status copy_in(ai_hal_context *context, ai_hal_buffer *buffer, uint64_t offset, const void *data,
                             uint64_t nbytes, ai_hal_error **error) {
    ai_hal_status status = place(context, buffer, offset, nbytes, error);
    if (status || !nbytes) return status;
    NEED(data);
    memcpy(buffer->data + offset, data, nbytes);
    return status;
}
static ai_hal_status copy_out(ai_hal_context *context, ai_hal_buffer *buffer, uint64_t offset, void *data,
                              uint64_t nbytes, ai_hal_error **error) {
    ai_hal_status status = place(context, buffer, offset, nbytes, error);
    if (status || !nbytes) return status;
    NEED(data);
    memcpy(data, buffer->data + offset, nbytes);
    return status;
}
static ai_hal_status map(ai_hal_context *context, ai_hal_buffer *buffer, void **address, ai_hal_error **error) {
    ai_hal_status status = place(context, buffer, 0, 0, error);
    if (!status) *address = buffer->data;
    return status;
}
static ai_hal_status import_memory(ai_hal_context *context, void *address, uint64_t nbytes, ai_hal_buffer **buffer,
                                   ai_hal_error **error) {
    NEED(context);
    NEED(address);
    ai_hal_buffer *made = malloc(sizeof *made);
    if (!made) return fail(error, AI_HAL_OUT_OF_MEMORY, NULL, "no memory for a buffer");
    *made = (ai_hal_buffer){context, address, nbytes, 1};
    *buffer = made;
    return AI_HAL_OK;
}
static ai_hal_status statistics(ai_hal_context *context, ai_hal_statistics *found, ai_hal_error **error) {
    NEED(context);
    CHECK(found, ai_hal_statistics, frees);
    pthread_mutex_lock(&context->lock);
    *found = (ai_hal_statistics){sizeof *found, 0, context->in_use, context->peak, context->allocations, context->frees};
    pthread_mutex_unlock(&context->lock);
    return AI_HAL_OK;
}

/* ---- Step 4: programs. A graph's nodes made ready, a copy of its constants, and a place for each value in between. */
enum kind { SCRATCH, CONSTANT, INPUT, OUTPUT };
struct value { struct tensor tensor; enum kind kind; uint64_t at; }; /* Offset, or number of the input or output. */
struct ai_hal_program {
    atomic_int references; /* The host's, and one for each submission under way. */
    const ai_hal_context *context;
    uint32_t step_count, input_count, output_count;
    uint64_t scratch_bytes;
    struct value *values;
    struct step *steps;
    int32_t *inputs, *outputs; /* Indices of values; outputs after inputs in one block. */
    ai_hal_spec *specs;        /* Of inputs, then of outputs. */
    char *constants;
};
static uint64_t padded(uint64_t nbytes) { return (nbytes + ALIGNMENT - 1) & ~(uint64_t)(ALIGNMENT - 1); }

static void program_free(ai_hal_program *program) {
    if (atomic_fetch_sub(&program->references, 1) > 1) return;
    free(program->values), free(program->steps), free(program->inputs), free(program->specs), free(program->constants);
    free(program);
}
static ai_hal_status node_supported(ai_hal_context *context, const ai_hal_graph *graph, uint32_t node,
                                    ai_hal_support *support, ai_hal_error **error) {
    struct step step;
    NEED(context);
    CHECK(graph, ai_hal_graph, reserved);
    CHECK(support, ai_hal_support, reason);
    if (node >= graph->node_count) return fail(error, AI_HAL_INVALID_ARGUMENT, NULL, "there is no node %u", node);
    support->size = sizeof *support;
    support->supported = (uint32_t)prepare_step(graph, node, &step, support->reason);
    return AI_HAL_OK;
}
/* Give each value its place: constants are copied, what a node makes goes to an output or to the scratch memory. */
static ai_hal_status lay_out(ai_hal_program *p, const ai_hal_graph *graph, ai_hal_error **error) {
    uint64_t constant_bytes = 0;
    for (uint32_t i = 0; i < graph->value_count; i++) constant_bytes += graph->values[i]->data ? padded(graph->values[i]->nbytes) : 0;
    if (!(p->constants = aligned_alloc(ALIGNMENT, constant_bytes + ALIGNMENT)))
        return fail(error, AI_HAL_OUT_OF_MEMORY, NULL, "no memory for %llu bytes of constants", (unsigned long long)constant_bytes);
    constant_bytes = 0;
    for (uint32_t i = 0; i < graph->value_count; i++) {
        const ai_hal_value *value = graph->values[i];
        const char *wrong = read_spec(&value->spec, &p->values[i].tensor);
        if (wrong) return fail(error, AI_HAL_NOT_SUPPORTED, NULL, "value '%.60s': %s", value->name, wrong);
        if (!value->data) continue;
        if (value->nbytes != tensor_bytes(&p->values[i].tensor))
            return fail(error, AI_HAL_INVALID_MODEL, NULL, "constant '%.60s' has not the bytes of its shape", value->name);
        p->values[i].kind = CONSTANT, p->values[i].at = constant_bytes;
        if (value->nbytes) memcpy(p->constants + constant_bytes, value->data, value->nbytes);
        constant_bytes += padded(value->nbytes);
    }
    for (uint32_t i = 0; i < p->input_count; i++) p->values[p->inputs[i]].kind = INPUT, p->values[p->inputs[i]].at = i;
    for (uint32_t i = 0; i < p->output_count; i++)
        if (p->values[p->outputs[i]].kind == SCRATCH) p->values[p->outputs[i]].kind = OUTPUT, p->values[p->outputs[i]].at = i;
    for (uint32_t i = 0; i < p->step_count; i++) {
        struct value *made = &p->values[p->steps[i].output];
        if (made->kind == SCRATCH) made->at = p->scratch_bytes, p->scratch_bytes += padded(tensor_bytes(&made->tensor));
    }
    for (uint32_t i = 0; i < p->input_count + p->output_count; i++) {
        const struct tensor *tensor = &p->values[p->inputs[i]].tensor;
        p->specs[i] = (ai_hal_spec){tensor->dtype, (uint32_t)tensor->rank, tensor->dims};
    }
    return AI_HAL_OK;
}
static ai_hal_status compile(ai_hal_context *context, const ai_hal_compile_args *args, ai_hal_program **program,
                             ai_hal_error **error) {
    char reason[TEXT];
    NEED(context);
    NEED(program);
    CHECK(args, ai_hal_compile_args, graph);
    const ai_hal_graph *graph = args->graph;
    CHECK(graph, ai_hal_graph, reserved);
    size_t ends = (size_t)graph->input_count + graph->output_count;
    ai_hal_program *p = calloc(1, sizeof *p);
    if (!p) return fail(error, AI_HAL_OUT_OF_MEMORY, NULL, "no memory for a program");
    *p = (ai_hal_program){.references = 1, .context = context, .step_count = graph->node_count,
                          .input_count = graph->input_count, .output_count = graph->output_count};
    p->values = calloc(graph->value_count + 1u, sizeof *p->values);
    p->steps = calloc(graph->node_count + 1u, sizeof *p->steps);
    p->inputs = calloc(ends + 1, sizeof *p->inputs);
    p->specs = calloc(ends + 1, sizeof *p->specs);
    ai_hal_status status = AI_HAL_OK;
    if (!p->values || !p->steps || !p->inputs || !p->specs)
        status = fail(error, AI_HAL_OUT_OF_MEMORY, NULL, "no memory for a program");
    for (uint32_t i = 0; !status && i < graph->node_count; i++)
        if (!prepare_step(graph, i, &p->steps[i], reason)) status = fail(error, AI_HAL_NOT_SUPPORTED, NULL, "%s", reason);
    if (!status) {
        p->outputs = p->inputs + p->input_count;
        if (p->input_count) memcpy(p->inputs, graph->inputs, p->input_count * sizeof *p->inputs);
        if (p->output_count) memcpy(p->outputs, graph->outputs, p->output_count * sizeof *p->outputs);
        status = lay_out(p, graph, error);
    }
    if (status) program_free(p);
    else *program = p;
    return status;
}
static ai_hal_status program_info(ai_hal_program *program, ai_hal_program_info *info, ai_hal_error **error) {
    NEED(program);
    CHECK(info, ai_hal_program_info, outputs);
    *info = (ai_hal_program_info){sizeof *info, 0, program->input_count, program->output_count, program->specs,
                                  program->specs + program->input_count};
    return AI_HAL_OK;
}
/* `ends` are the tensors: inputs, then outputs. Scratch memory is of the run, since a program may run on many queues. */
static ai_hal_status run(const ai_hal_program *p, char *const *ends, char message[TEXT]) {
    ai_hal_status status = AI_HAL_OK;
    char *scratch = p->scratch_bytes ? aligned_alloc(ALIGNMENT, p->scratch_bytes) : NULL;
    snprintf(message, TEXT, "no memory for %llu bytes of intermediate results", (unsigned long long)p->scratch_bytes);
    if (p->scratch_bytes && !scratch) return AI_HAL_OUT_OF_MEMORY;
#define AT(index) (p->values[index].kind == CONSTANT ? p->constants + p->values[index].at : \
                   p->values[index].kind == INPUT ? ends[p->values[index].at] : \
                   p->values[index].kind == OUTPUT ? ends[p->input_count + p->values[index].at] : scratch + p->values[index].at)
    for (uint32_t i = 0; !status && i < p->step_count; i++) {
        const struct step *step = &p->steps[i];
        const void *x[MAX_INPUTS] = {NULL};
        for (int k = 0; k < MAX_INPUTS; k++) x[k] = step->inputs[k] == AI_HAL_NO_VALUE ? NULL : AT(step->inputs[k]);
        status = run_step(step, x, AT(step->output), message);
    }
    for (uint32_t i = 0; !status && i < p->output_count; i++) { /* An input or constant as output, or one value twice. */
        char *from = AT(p->outputs[i]), *to = ends[p->input_count + i];
        if (from != to) memmove(to, from, tensor_bytes(&p->values[p->outputs[i]].tensor));
    }
    free(scratch);
    return status;
}

/* ---- Step 5: queues. An event is also the work that it stands for, so a submission takes one allocation. */
struct ai_hal_event {
    atomic_int references, done;
    pthread_mutex_t lock; /* Of status and message until it is done. */
    pthread_cond_t changed;
    ai_hal_status status;
    char message[TEXT];
    struct ai_hal_event *next; /* In its queue. */
    ai_hal_program *program;   /* What is to be done: run it, wait for another event, or call a function. */
    ai_hal_event *after;
    ai_hal_callback function;
    void *user;
    char *ends[];
};
struct ai_hal_queue {
    const ai_hal_context *context;
    pthread_t thread;
    pthread_mutex_t lock; /* Of what follows. */
    pthread_cond_t changed;
    ai_hal_event *first, **last;
    int closing;
    ai_hal_status status; /* Of the first failure since the last synchronize, and its message. */
    char message[TEXT];
};
static void event_destroy(ai_hal_event *event) {
    if (atomic_fetch_sub(&event->references, 1) > 1) return;
    if (event->program) program_free(event->program);
    if (event->after) event_destroy(event->after);
    pthread_mutex_destroy(&event->lock);
    pthread_cond_destroy(&event->changed);
    free(event);
}
static int32_t event_query(ai_hal_event *event) { return atomic_load(&event->done); }

static ai_hal_status event_wait(ai_hal_event *event, int64_t timeout_ns, ai_hal_error **error) {
    struct timespec end;
    int late = 0;
    NEED(event);
    clock_gettime(CLOCK_MONOTONIC, &end);
    if (timeout_ns > 0) end.tv_sec += timeout_ns / 1000000000, end.tv_nsec += timeout_ns % 1000000000;
    if (end.tv_nsec >= 1000000000) end.tv_sec++, end.tv_nsec -= 1000000000;
    pthread_mutex_lock(&event->lock);
    while (!event->done && !late)
        late = timeout_ns < 0 ? pthread_cond_wait(&event->changed, &event->lock)
                              : pthread_cond_clockwait(&event->changed, &event->lock, CLOCK_MONOTONIC, &end);
    late = !event->done;
    pthread_mutex_unlock(&event->lock);
    if (late) return fail(error, AI_HAL_TIMEOUT, NULL, "it has not ended in time");
    return event->status ? fail(error, event->status, NULL, "%s", event->message) : AI_HAL_OK;
}
static ai_hal_status perform(ai_hal_event *event, char message[TEXT]) {
    if (event->program) return run(event->program, event->ends, message);
    snprintf(message, TEXT, "a function of the host failed");
    if (event->function) return event->function(event->user) ? AI_HAL_CALLBACK_FAILED : AI_HAL_OK;
    if (event->after && event_wait(event->after, AI_HAL_FOREVER, NULL)) {
        memcpy(message, event->after->message, TEXT);
        return event->after->status;
    }
    return AI_HAL_OK;
}
static void *serve(void *argument) {
    ai_hal_queue *queue = argument;
    pthread_mutex_lock(&queue->lock);
    for (;;) {
        while (!queue->first && !queue->closing) pthread_cond_wait(&queue->changed, &queue->lock);
        ai_hal_event *event = queue->first;
        if (!event) break;
        if (!(queue->first = event->next)) queue->last = &queue->first;
        ai_hal_status status = queue->status;
        if (!status) { /* What failed fails everything after it. */
            pthread_mutex_unlock(&queue->lock);
            status = perform(event, event->message);
            pthread_mutex_lock(&queue->lock);
            if (status) queue->status = status, memcpy(queue->message, event->message, TEXT);
        } else memcpy(event->message, queue->message, TEXT);
        pthread_mutex_unlock(&queue->lock);
        pthread_mutex_lock(&event->lock);
        event->status = status;
        atomic_store(&event->done, 1);
        pthread_cond_broadcast(&event->changed);
        pthread_mutex_unlock(&event->lock);
        event_destroy(event);
        pthread_mutex_lock(&queue->lock);
    }
    pthread_mutex_unlock(&queue->lock);
    return NULL;
}
static ai_hal_event *new_event(size_t ends) {
    ai_hal_event *event = malloc(sizeof *event + ends * sizeof *event->ends);
    if (event)
        *event = (ai_hal_event){.references = 1, .lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};
    return event;
}
static ai_hal_status push(ai_hal_queue *queue, ai_hal_event *event, ai_hal_event **wanted) {
    if (wanted) atomic_fetch_add(&event->references, 1), *wanted = event;
    pthread_mutex_lock(&queue->lock);
    *queue->last = event;
    queue->last = &event->next;
    pthread_cond_signal(&queue->changed);
    pthread_mutex_unlock(&queue->lock);
    return AI_HAL_OK;
}
static ai_hal_status queue_create(ai_hal_context *context, ai_hal_queue **queue, ai_hal_error **error) {
    NEED(context);
    NEED(queue);
    ai_hal_queue *made = calloc(1, sizeof *made);
    if (!made) return fail(error, AI_HAL_OUT_OF_MEMORY, NULL, "no memory for a queue");
    made->context = context;
    made->last = &made->first;
    pthread_mutex_init(&made->lock, NULL);
    pthread_cond_init(&made->changed, NULL);
    if (pthread_create(&made->thread, NULL, serve, made)) {
        free(made);
        return fail(error, AI_HAL_BUSY, NULL, "no thread can be started");
    }
    *queue = made;
    return AI_HAL_OK;
}
static ai_hal_status queue_submit(ai_hal_queue *queue, const ai_hal_submit_args *args, ai_hal_event **event, ai_hal_error **error) {
    NEED(queue);
    CHECK(args, ai_hal_submit_args, output_count);
    NEED(args->program);
    ai_hal_program *program = args->program;
    uint32_t inputs = program->input_count, ends = inputs + program->output_count;
    if (args->input_count != inputs || args->output_count != program->output_count || program->context != queue->context)
        return fail(error, AI_HAL_INVALID_ARGUMENT, NULL, "the program has %u inputs and %u outputs, and belongs to one context",
                    inputs, program->output_count);
    ai_hal_event *made = new_event(ends);
    if (!made) return fail(error, AI_HAL_OUT_OF_MEMORY, NULL, "no memory for a submission");
    for (uint32_t i = 0; i < ends; i++) {
        const ai_hal_tensor *tensor = i < inputs ? &args->inputs[i] : &args->outputs[i - inputs];
        const struct tensor *wanted = &program->values[program->inputs[i]].tensor;
        ai_hal_status status = place(queue->context, tensor->buffer, tensor->offset, tensor_bytes(wanted), error);
        if (!status && (uintptr_t)(tensor->buffer->data + tensor->offset) % (wanted->dtype == AI_HAL_I64 ? 8 : 4))
            status = fail(error, AI_HAL_INVALID_ARGUMENT, NULL, "tensor %u does not lie at a multiple of its elements' size", i);
        if (status) return event_destroy(made), status;
        made->ends[i] = tensor->buffer->data + tensor->offset;
    }
    atomic_fetch_add(&program->references, 1);
    made->program = program;
    return push(queue, made, event);
}
static ai_hal_status queue_callback(ai_hal_queue *queue, ai_hal_callback function, void *user, ai_hal_event **event,
                                    ai_hal_error **error) {
    NEED(queue);
    ai_hal_event *made = new_event(0);
    if (!made) return fail(error, AI_HAL_OUT_OF_MEMORY, NULL, "no memory for an event");
    made->function = function;
    made->user = user;
    return push(queue, made, event);
}
static ai_hal_status queue_record(ai_hal_queue *queue, ai_hal_event **event, ai_hal_error **error) {
    NEED(event);
    return queue_callback(queue, NULL, NULL, event, error); /* Nothing to do: done in its turn. */
}
static ai_hal_status queue_wait(ai_hal_queue *queue, ai_hal_event *event, ai_hal_error **error) {
    NEED(queue);
    NEED(event);
    ai_hal_event *made = new_event(0);
    if (!made) return fail(error, AI_HAL_OUT_OF_MEMORY, NULL, "no memory for an event");
    atomic_fetch_add(&event->references, 1);
    made->after = event;
    return push(queue, made, NULL);
}
static ai_hal_status queue_synchronize(ai_hal_queue *queue, int64_t timeout_ns, ai_hal_error **error) {
    ai_hal_event *last = NULL;
    ai_hal_status status = queue_record(queue, &last, error);
    if (status) return status;
    status = event_wait(last, timeout_ns, error);
    if (status && event_query(last)) { /* Told: the queue works again. */
        pthread_mutex_lock(&queue->lock);
        queue->status = AI_HAL_OK;
        pthread_mutex_unlock(&queue->lock);
    }
    event_destroy(last);
    return status;
}
static void queue_destroy(ai_hal_queue *queue) {
    pthread_mutex_lock(&queue->lock);
    queue->closing = 1;
    pthread_cond_signal(&queue->changed);
    pthread_mutex_unlock(&queue->lock);
    pthread_join(queue->thread, NULL);
    pthread_mutex_destroy(&queue->lock);
    pthread_cond_destroy(&queue->changed);
    free(queue);
}

/* ---- Step 6: the table. What is left out at the end is NULL: programs are not kept, power is not measured. */
static const ai_hal_api API = {
    .size = sizeof API, .major = AI_HAL_MAJOR, .minor = AI_HAL_MINOR, .name = "example-c", .version = "1.0",
    .error_free = error_free, .probe = probe, .devices_free = devices_free, .open = open_device, .close = close_device,
    .capabilities = capabilities, .allocate = allocate, .free = free_buffer, .copy_in = copy_in, .copy_out = copy_out,
    .statistics = statistics, .node_supported = node_supported, .compile = compile, .program_info = program_info,
    .program_free = program_free, .queue_create = queue_create, .queue_submit = queue_submit, .queue_record = queue_record,
    .queue_wait = queue_wait, .queue_callback = queue_callback, .queue_synchronize = queue_synchronize,
    .queue_destroy = queue_destroy, .event_query = event_query, .event_wait = event_wait, .event_destroy = event_destroy,
    .map = map, .import_memory = import_memory,
};
const ai_hal_api *ai_hal_get_api(uint32_t major) { return major == AI_HAL_MAJOR ? &API : NULL; }
