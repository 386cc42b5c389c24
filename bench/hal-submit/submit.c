/*
 * What a submit costs through the C interface: submit LIBRARY COUNT.
 *
 * Prints medians in nanoseconds as JSON: `submit`, how long queue_submit() keeps its caller; `start`, from
 * queue_callback() to the function's first instruction; `pingpong`, two threads that wake each other by eventfds, there
 * and back. Those with `rested` come after a millisecond in which nothing was to be done, when all threads sleep.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "ai_hal.h"

#define WAIT_NS 10000000000ll
#define REST_NS 1000000ll

static const ai_hal_api *api;
static int64_t stamp;
static int wake, back;

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ll + time.tv_nsec;
}

static void check(const char *what, ai_hal_status status, ai_hal_error *error)
{
    if (status == AI_HAL_OK)
        return;
    fprintf(stderr, "submit: %s: %d %s\n", what, status, error && error->message ? error->message : "");
    exit(1);
}

static int ascending(const void *one, const void *other)
{
    int64_t a = *(const int64_t *)one, b = *(const int64_t *)other;
    return (a > b) - (a < b);
}

static long long median(int64_t *found, long count)
{
    qsort(found, count, sizeof *found, ascending);
    return found[count / 2];
}

static void rest(int64_t ns)
{
    struct timespec time = {.tv_nsec = ns};
    if (ns)
        nanosleep(&time, NULL);
}

static ai_hal_status stamped(void *user)
{
    (void)user;
    stamp = now();
    return AI_HAL_OK;
}

static void *answer(void *user)
{
    (void)user;
    eventfd_t value;
    while (!eventfd_read(wake, &value) && value == 1)
        eventfd_write(back, 1);
    return NULL;
}

static ai_hal_program *relu(ai_hal_context *context)
{
    static const int64_t dims[] = {4};
    static const int32_t input[] = {0}, output[] = {1};
    static const ai_hal_opset opset = {"", 17};
    ai_hal_value x = {.size = sizeof x, .name = "x", .spec = {AI_HAL_F32, 1, dims}};
    ai_hal_value y = {.size = sizeof y, .name = "y", .spec = {AI_HAL_F32, 1, dims}};
    ai_hal_node node = {.size = sizeof node, .domain = "", .op = "Relu", .version = 14, .name = "relu",
                        .input_count = 1, .output_count = 1, .inputs = input, .outputs = output};
    const ai_hal_value *values[] = {&x, &y};
    const ai_hal_node *nodes[] = {&node};
    ai_hal_graph graph = {.size = sizeof graph, .name = "relu", .values = values, .nodes = nodes, .inputs = input,
                          .outputs = output, .opsets = &opset, .value_count = 2, .node_count = 1, .input_count = 1,
                          .output_count = 1, .opset_count = 1};
    ai_hal_compile_args args = {.size = sizeof args, .graph = &graph};
    ai_hal_program *program = NULL;
    ai_hal_error *error = NULL;
    check("compile", api->compile(context, &args, &program, &error), error);
    return program;
}

static ai_hal_buffer *buffer(ai_hal_context *context)
{
    ai_hal_allocate_args args = {.size = sizeof args, .nbytes = 16};
    ai_hal_buffer *made = NULL;
    ai_hal_error *error = NULL;
    check("allocate", api->allocate(context, &args, &made, &error), error);
    return made;
}

int main(int argc, char **argv)
{
    long count = argc == 3 ? atol(argv[2]) : 0;
    if (count < 1 || count > 10000000) {
        fprintf(stderr, "usage: submit LIBRARY COUNT\n");
        return 2;
    }
    void *library = dlopen(argv[1], RTLD_NOW);
    const ai_hal_api *(*get)(uint32_t) = library ? (const ai_hal_api *(*)(uint32_t))dlsym(library, "ai_hal_get_api") : NULL;
    api = get ? get(AI_HAL_MAJOR) : NULL;
    int64_t *found = malloc(count * sizeof *found);
    if (!api || !found) {
        fprintf(stderr, "submit: %s is no backend: %s\n", argv[1], library ? "no interface" : dlerror());
        return 1;
    }

    ai_hal_error *error = NULL;
    ai_hal_host host = {.size = sizeof host, .minor = AI_HAL_MINOR};
    ai_hal_open_args open = {.size = sizeof open, .host = &host, .device = ""};
    ai_hal_context *context = NULL;
    ai_hal_queue *queue = NULL;
    ai_hal_event *event = NULL;
    check("open", api->open(&open, &context, &error), error);
    check("queue", api->queue_create(context, &queue, &error), error);
    ai_hal_program *program = relu(context);
    ai_hal_tensor input = {.buffer = buffer(context)}, output = {.buffer = buffer(context)};
    const float zeros[4] = {0};
    check("copy", api->copy_in(context, input.buffer, 0, zeros, sizeof zeros, &error), error);
    ai_hal_submit_args args = {.size = sizeof args, .program = program, .inputs = &input, .outputs = &output,
                               .input_count = 1, .output_count = 1};

    wake = eventfd(0, 0);
    back = eventfd(0, 0);
    pthread_t thread;
    if (wake < 0 || back < 0 || pthread_create(&thread, NULL, answer, NULL)) {
        perror("submit");
        return 1;
    }
    long long submit[2], start[2], pingpong[2];
    for (int rested = 0; rested < 2; rested++) {
        long times = rested ? count / 20 + 1 : count;
        int64_t rest_ns = rested ? REST_NS : 0;
        for (long number = 0; number < times; number++) {
            rest(rest_ns);
            int64_t begin = now();
            ai_hal_status status = api->queue_submit(queue, &args, &event, &error);
            found[number] = now() - begin;
            check("submit", status, error);
            check("wait", api->event_wait(event, WAIT_NS, &error), error);
            api->event_destroy(event);
        }
        submit[rested] = median(found, times);
        for (long number = 0; number < times; number++) {
            rest(rest_ns);
            int64_t begin = now();
            check("callback", api->queue_callback(queue, stamped, NULL, &event, &error), error);
            check("wait", api->event_wait(event, WAIT_NS, &error), error);
            found[number] = stamp - begin;
            api->event_destroy(event);
        }
        start[rested] = median(found, times);
        for (long number = 0; number < times; number++) {
            eventfd_t value;
            rest(rest_ns);
            int64_t begin = now();
            eventfd_write(wake, 1);
            eventfd_read(back, &value);
            found[number] = now() - begin;
        }
        pingpong[rested] = median(found, times);
    }
    eventfd_write(wake, 2);
    pthread_join(thread, NULL);

    printf("{\"submit\": %lld, \"start\": %lld, \"pingpong\": %lld,\n"
           " \"submit-rested\": %lld, \"start-rested\": %lld, \"pingpong-rested\": %lld}\n",
           submit[0], start[0], pingpong[0], submit[1], start[1], pingpong[1]);
    api->queue_destroy(queue);
    api->free(context, input.buffer);
    api->free(context, output.buffer);
    api->program_free(program);
    api->close(context);
    free(found);
    return 0;
}
