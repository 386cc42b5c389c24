/* A host in C: versions, arguments that are wrong, a program, callbacks, events across queues, threads, and no leak. */
#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ai_hal.h"

static const ai_hal_api *api;
static ai_hal_context *context;

#define EXPECT(condition) do { if (!(condition)) { fprintf(stderr, "line %d: %s\n", __LINE__, #condition); exit(1); } } while (0)
#define REFUSED(wanted, call) do { \
        ai_hal_error *error = NULL; \
        EXPECT((call) == (wanted)); \
        EXPECT(error && error->size >= sizeof *error && error->code == (wanted) && *error->message); \
        api->error_free(error); \
    } while (0)
#define OK(call) do { ai_hal_error *error = NULL; EXPECT((call) == AI_HAL_OK); EXPECT(!error); } while (0)

static const int64_t DIMS[] = {3, 5};
static const float WEIGHT[15] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
static ai_hal_value values[3] = {
    {sizeof *values, 0, "x", {AI_HAL_F32, 2, DIMS}, NULL, 0},
    {sizeof *values, 0, "w", {AI_HAL_F32, 2, DIMS}, WEIGHT, sizeof WEIGHT},
    {sizeof *values, 0, "y", {AI_HAL_F32, 2, DIMS}, NULL, 0},
};
static const ai_hal_value *const VALUES[] = {&values[0], &values[1], &values[2]};
static const int32_t INS[] = {0, 1}, OUTS[] = {2}, GIVEN[] = {0};
static ai_hal_node node = {sizeof node, 0, "", "Add", 14, "sum", 2, 1, INS, OUTS, 0, NULL};
static const ai_hal_node *const NODES[] = {&node};
static const ai_hal_opset OPSET = {"", 21};
static ai_hal_graph graph = {sizeof graph, 0, NULL, "g", VALUES, NODES, GIVEN, OUTS, &OPSET, 3, 1, 1, 1, 1, 0};
static const ai_hal_compile_args COMPILE = {sizeof COMPILE, 0, NULL, &graph};

static int calls;
static ai_hal_status count(void *user) { return calls += *(int *)user, AI_HAL_OK; }
static ai_hal_status broken(void *user) { return (void)user, AI_HAL_FAILED; }

static void arguments(void) {
    ai_hal_context *none = NULL;
    ai_hal_buffer *buffer = NULL;
    ai_hal_host host = {sizeof host, 99, NULL};
    /* A host of a later minor version: its structures are larger, its extensions unknown. */
    struct { ai_hal_open_args args; uint64_t later[4]; } larger = {{0}, {1, 2, 3, 4}};
    ai_hal_extension unknown = {sizeof unknown, 0x80001234u, NULL};
    larger.args = (ai_hal_open_args){sizeof larger, 0, &unknown, &host, "0"};
    EXPECT(!ai_hal_get_api(0) && !ai_hal_get_api(2) && !ai_hal_get_api(0xffffffffu));
    OK(api->open(&larger.args, &none, &error));
    api->close(none), none = NULL;
    ai_hal_open_args small = {8, 0, NULL, &host, "0"};
    REFUSED(AI_HAL_INVALID_ARGUMENT, api->open(&small, &none, &error));
    REFUSED(AI_HAL_INVALID_ARGUMENT, api->open(NULL, &none, &error));
    EXPECT(api->open(NULL, &none, NULL) == AI_HAL_INVALID_ARGUMENT); /* nobody wants the error */
    ai_hal_open_args other = {sizeof other, 0, NULL, &host, "7"};
    REFUSED(AI_HAL_NOT_SUPPORTED, api->open(&other, &none, &error));
    ai_hal_allocate_args odd = {sizeof odd, 0, NULL, 64, 3}, huge = {sizeof huge, 0, NULL, ~0ull, 0};
    REFUSED(AI_HAL_INVALID_ARGUMENT, api->allocate(context, &odd, &buffer, &error));
    REFUSED(AI_HAL_OUT_OF_MEMORY, api->allocate(context, &huge, &buffer, &error));
    ai_hal_capabilities few = {.size = 12};
    REFUSED(AI_HAL_INVALID_ARGUMENT, api->capabilities(context, &few, &error));
    ai_hal_program *program = NULL;
    REFUSED(AI_HAL_INVALID_ARGUMENT, api->compile(context, NULL, &program, &error));
    node.op = "Sin";
    REFUSED(AI_HAL_NOT_SUPPORTED, api->compile(context, &COMPILE, &program, &error));
    node.op = "Add";
    values[1].nbytes = 7;
    REFUSED(AI_HAL_INVALID_MODEL, api->compile(context, &COMPILE, &program, &error));
    values[1].nbytes = sizeof WEIGHT;
    EXPECT(!none && !buffer && !program);
    ai_hal_support support = {.size = sizeof support};
    OK(api->node_supported(context, &graph, 0, &support, &error));
    EXPECT(support.supported == 1);
    REFUSED(AI_HAL_INVALID_ARGUMENT, api->node_supported(context, &graph, 1, &support, &error));
}

static ai_hal_buffer *take(uint64_t nbytes) {
    ai_hal_buffer *buffer = NULL;
    ai_hal_allocate_args args = {sizeof args, 0, NULL, nbytes, 0};
    OK(api->allocate(context, &args, &buffer, &error));
    return buffer;
}

static void work(void) {
    ai_hal_program *program = NULL;
    ai_hal_queue *first = NULL, *second = NULL;
    ai_hal_event *event = NULL, *after = NULL;
    OK(api->compile(context, &COMPILE, &program, &error));
    OK(api->queue_create(context, &first, &error));
    OK(api->queue_create(context, &second, &error));
    ai_hal_buffer *x = take(sizeof WEIGHT), *y = take(sizeof WEIGHT), *z = take(sizeof WEIGHT), *short_ = take(8);
    OK(api->copy_in(context, x, 0, WEIGHT, sizeof WEIGHT, &error));
    REFUSED(AI_HAL_INVALID_ARGUMENT, api->copy_in(context, x, 8, WEIGHT, sizeof WEIGHT, &error));
    REFUSED(AI_HAL_INVALID_ARGUMENT, api->copy_in(context, x, ~0ull - 3, WEIGHT, 8, &error));
    ai_hal_tensor in = {x, 0, NULL}, middle = {y, 0, NULL}, out = {z, 0, NULL}, small = {short_, 0, NULL}, none = {NULL, 0, NULL};
    ai_hal_tensor crooked = {x, 2, NULL};
    ai_hal_submit_args one = {sizeof one, 0, NULL, program, &in, &middle, 1, 1}, two = one, bad = one;
    two.inputs = &middle, two.outputs = &out;
    bad.outputs = &small;
    REFUSED(AI_HAL_INVALID_ARGUMENT, api->queue_submit(first, &bad, &event, &error));
    bad.outputs = &none;
    REFUSED(AI_HAL_INVALID_ARGUMENT, api->queue_submit(first, &bad, &event, &error));
    bad.outputs = &middle, bad.inputs = &crooked;
    REFUSED(AI_HAL_INVALID_ARGUMENT, api->queue_submit(first, &bad, &event, &error));
    bad.inputs = NULL;
    REFUSED(AI_HAL_INVALID_ARGUMENT, api->queue_submit(first, &bad, &event, &error));
    bad.inputs = &in, bad.input_count = 0;
    REFUSED(AI_HAL_INVALID_ARGUMENT, api->queue_submit(first, &bad, &event, &error));
    EXPECT(!event);
    for (int round = 0; round < 200; round++) {
        int step = 1;
        OK(api->queue_submit(first, &one, &event, &error));
        OK(api->queue_wait(second, event, &error));
        api->event_destroy(event); /* before it has ended, perhaps */
        OK(api->queue_submit(second, &two, &after, &error));
        OK(api->queue_callback(second, count, &step, NULL, &error)); /* nobody wants its event */
        OK(api->event_wait(after, AI_HAL_FOREVER, &error));
        EXPECT(api->event_query(after) == 1);
        api->event_destroy(after);
        OK(api->queue_synchronize(second, AI_HAL_FOREVER, &error));
        EXPECT(calls == round + 1);
    }
    float made[15];
    OK(api->copy_out(context, z, 0, made, sizeof made, &error));
    for (int i = 0; i < 15; i++) EXPECT(made[i] == 3 * WEIGHT[i]);
    /* A failure fails what comes after it, also on a queue that waits for it, until it was told. */
    OK(api->queue_callback(first, broken, NULL, &event, &error));
    OK(api->queue_wait(second, event, &error));
    OK(api->queue_submit(first, &one, &after, &error));
    REFUSED(AI_HAL_CALLBACK_FAILED, api->event_wait(after, AI_HAL_FOREVER, &error));
    REFUSED(AI_HAL_CALLBACK_FAILED, api->queue_synchronize(first, AI_HAL_FOREVER, &error));
    REFUSED(AI_HAL_CALLBACK_FAILED, api->queue_synchronize(second, AI_HAL_FOREVER, &error));
    OK(api->queue_synchronize(first, AI_HAL_FOREVER, &error));
    OK(api->queue_synchronize(second, AI_HAL_FOREVER, &error));
    api->event_destroy(event);
    api->event_destroy(after);
    /* A program, a queue and its events may go in any order. */
    OK(api->queue_submit(first, &one, &event, &error));
    api->program_free(program);
    api->queue_destroy(first);
    OK(api->event_wait(event, 0, &error));
    api->event_destroy(event);
    api->queue_destroy(second);
    api->free(context, x), api->free(context, y), api->free(context, z), api->free(context, short_);
}

static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
static ai_hal_status hold(void *user) {
    (void)user;
    pthread_mutex_lock(&gate);
    pthread_mutex_unlock(&gate);
    return AI_HAL_OK;
}
static void timeouts(void) {
    ai_hal_queue *queue = NULL;
    ai_hal_event *event = NULL;
    OK(api->queue_create(context, &queue, &error));
    pthread_mutex_lock(&gate);
    OK(api->queue_callback(queue, hold, NULL, &event, &error));
    EXPECT(api->event_query(event) == 0);
    REFUSED(AI_HAL_TIMEOUT, api->event_wait(event, 0, &error));
    REFUSED(AI_HAL_TIMEOUT, api->event_wait(event, 1000000, &error));
    REFUSED(AI_HAL_TIMEOUT, api->queue_synchronize(queue, 1000000, &error));
    pthread_mutex_unlock(&gate);
    OK(api->queue_synchronize(queue, AI_HAL_FOREVER, &error));
    OK(api->event_wait(event, 0, &error));
    api->event_destroy(event);
    api->queue_destroy(queue);
}

int main(void) {
    const ai_hal_devices *devices = NULL;
    ai_hal_host host = {sizeof host, AI_HAL_MINOR, NULL};
    ai_hal_open_args args = {sizeof args, 0, NULL, &host, ""};
    api = ai_hal_get_api(AI_HAL_MAJOR);
    EXPECT(api && api->size == sizeof *api && api->major == AI_HAL_MAJOR && api->minor == AI_HAL_MINOR);
    OK(api->probe(&host, &devices, &error));
    EXPECT(devices->count == 1 && !strcmp(devices->devices[0]->id, "0"));
    api->devices_free(devices);
    OK(api->open(&args, &context, &error));
    arguments();
    work();
    timeouts();
    ai_hal_statistics found = {.size = sizeof found};
    OK(api->statistics(context, &found, &error));
    EXPECT(!found.in_use_bytes && found.peak_bytes == 3 * sizeof WEIGHT + 8 && found.allocations == 4 && found.frees == 4);
    api->close(context);
    puts("all is well");
    return 0;
}
