/* The kit's headers by themselves: what a library that is newer or older than its host fills, shapes that are hostile,
 * operators that are none, a queue whose events outlive it, and threads that wait for one event. */
#define _GNU_SOURCE
#include "ai_hal_host.h"
#include "ai_hal_onnx.h"

#include <poll.h>

#define EXPECT(condition) do { if (!(condition)) { fprintf(stderr, "line %d: %s\n", __LINE__, #condition); exit(1); } } while (0)

struct ai_hal_context { ai_hal_host_memory memory; };
struct ai_hal_program { atomic_int references; };

static void filled(void) {
    ai_hal_statistics mine = {sizeof mine, 0, 1, 2, 3, 4};
    struct { ai_hal_statistics known; uint64_t later; } newer_host = {{.size = sizeof newer_host}, 7};
    struct { ai_hal_statistics known; uint64_t later; } newer_library = {{sizeof newer_library, 0, 1, 2, 3, 4}, 9};
    struct { ai_hal_statistics known; uint64_t canary; } host = {{.size = sizeof host.known}, 7};
    ai_hal_fill(&newer_host, &mine);
    EXPECT(newer_host.known.size == sizeof mine && newer_host.known.frees == 4 && newer_host.later == 7);
    ai_hal_fill(&host, &newer_library);
    EXPECT(host.known.size == sizeof host.known && host.known.frees == 4 && host.canary == 7);
}

static const char *shape_of(uint32_t rank, const int64_t *dims, ai_hal_dtype dtype, ai_hal_shape *shape) {
    ai_hal_spec spec = {dtype, rank, dims};
    return ai_hal_read_shape(&spec, shape);
}

static void shapes(void) {
    const int64_t most = (int64_t)1 << 40, plain[] = {2, 3, 4}, open[] = {2, -1}, large[] = {most, most, most, most};
    const int64_t hidden[] = {0, most, most, most}, huge[] = {INT64_MAX};
    ai_hal_shape a, b = {AI_HAL_F32, 2, {3, 1}}, y = {AI_HAL_F32, 0, {0}};
    int64_t strides[3] = {0}, at[3] = {0};
    EXPECT(!shape_of(3, plain, AI_HAL_I64, &a) && ai_hal_count(&a) == 24 && ai_hal_shape_bytes(&a) == 192);
    EXPECT(!shape_of(0, NULL, AI_HAL_F32, &y) && ai_hal_count(&y) == 1);
    EXPECT(shape_of(2, open, AI_HAL_F32, &y) && shape_of(4, large, AI_HAL_F32, &y) && shape_of(1, huge, AI_HAL_U8, &y));
    EXPECT(shape_of(4, hidden, AI_HAL_F32, &y)); /* A size of 0 does not excuse the others. */
    EXPECT(shape_of(33, large, AI_HAL_F32, &y) && shape_of(3, plain, AI_HAL_UNKNOWN, &y));
    EXPECT(shape_of(3, plain, 8, &y) && shape_of(3, plain, -1, &y) && shape_of(3, plain, 1 << 30, &y));
    EXPECT(ai_hal_broadcast(&a, &b, 0, &y) && y.rank == 3 && y.dims[0] == 2 && y.dims[1] == 3 && y.dims[2] == 4);
    ai_hal_strides(&b, 0, &y, 3, 1, strides);
    EXPECT(strides[0] == 0 && strides[1] == 1 && strides[2] == 0);
    ai_hal_strides(&a, 0, &y, 3, 1, strides);
    int64_t sum = 0, count = 0;
    do sum += ai_hal_offset(3, at, strides), count++;
    while (ai_hal_next(3, y.dims, at));
    EXPECT(count == 24 && sum == 23 * 24 / 2);
    b.dims[0] = 5;
    EXPECT(!ai_hal_broadcast(&a, &b, 0, &y));
    EXPECT(ai_hal_padded(0, 64) == 0 && ai_hal_padded(1, 64) == 64 && ai_hal_padded(64, 64) == 64);
}

static void attributes(void) {
    const int64_t ints[] = {4, 5};
    const double real = 0.5;
    ai_hal_attribute one = {sizeof one, AI_HAL_ATTRIBUTE_INT, "axis", 1, ints, NULL, NULL, NULL};
    ai_hal_attribute many = {sizeof many, AI_HAL_ATTRIBUTE_INTS, "pads", 2, ints, NULL, NULL, NULL};
    ai_hal_attribute other = {sizeof other, AI_HAL_ATTRIBUTE_FLOAT, "alpha", 1, NULL, &real, NULL, NULL};
    const ai_hal_attribute *all[] = {&one, &many, &other};
    ai_hal_node node = {.size = sizeof node, .domain = "", .op = "Op", .attribute_count = 3, .attributes = all};
    int64_t value = -2, list[2] = {0};
    float number = 1;
    EXPECT(ai_hal_get_int(&node, "axis", &value) && value == 4 && !ai_hal_get_int(&node, "alpha", &value));
    EXPECT(ai_hal_get_float(&node, "alpha", &number) && number == 0.5f && !ai_hal_get_float(&node, "axis", &number));
    EXPECT(ai_hal_get_float(&node, "none", &number) && number == 0.5f && ai_hal_get_int(&node, "none", &value) && value == 4);
    EXPECT(ai_hal_get_ints(&node, "pads", 2, list) && list[1] == 5 && !ai_hal_get_ints(&node, "pads", 3, list));
    EXPECT(!ai_hal_get_ints(&node, "axis", 1, list) && !ai_hal_text_is(&node, "axis", "4", "4"));
    EXPECT(ai_hal_text_is(&node, "none", "a", "a") && !ai_hal_text_is(&node, "none", "a", "b"));
    EXPECT(!ai_hal_get_axis(&node, 4, &value) && ai_hal_get_axis(&node, 5, &value) && value == 4);
}

static void released(ai_hal_program *program) { atomic_fetch_sub(&program->references, 1); }

static void *serve(void *argument) {
    ai_hal_event *event;
    while ((event = ai_hal_queue_take(argument))) ai_hal_queue_end(argument, event);
    return NULL;
}

static void *wait_for(void *event) {
    EXPECT(ai_hal_host_event_wait(event, AI_HAL_FOREVER, NULL) == AI_HAL_OK);
    return NULL;
}

static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
static ai_hal_status held(void *user) {
    (void)user;
    pthread_mutex_lock(&gate);
    pthread_mutex_unlock(&gate);
    return AI_HAL_OK;
}

static int readable(int fd, int timeout_ms) {
    struct pollfd waited = {fd, POLLIN, 0};
    return poll(&waited, 1, timeout_ms) == 1 && waited.revents == POLLIN;
}

static void queues(void) {
    struct ai_hal_context context;
    struct ai_hal_program program = {100};
    ai_hal_queue *queue = NULL;
    ai_hal_event *event = NULL;
    pthread_t threads[4];
    EXPECT(ai_hal_queue_start(&context, serve, NULL, NULL) == AI_HAL_INVALID_ARGUMENT);
    EXPECT(ai_hal_queue_start(&context, serve, &queue, NULL) == AI_HAL_OK);
    for (int i = 0; i < 100; i++) {
        ai_hal_event *work = ai_hal_event_new(1);
        work->program = &program, work->release = released;
        ai_hal_queue_push(queue, work, NULL);
    }
    pthread_mutex_lock(&gate);
    EXPECT(ai_hal_host_callback(queue, held, NULL, &event, NULL) == AI_HAL_OK);
    EXPECT(ai_hal_host_event_wait(event, 0, NULL) == AI_HAL_TIMEOUT);
    EXPECT(ai_hal_host_event_wait(event, 50000, NULL) == AI_HAL_TIMEOUT); /* Longer than a thread looks for it. */
    for (int i = 0; i < 4; i++) pthread_create(&threads[i], NULL, wait_for, event);
    int32_t fds[3];
    EXPECT(ai_hal_host_event_fd(event, &fds[0], NULL) == AI_HAL_OK && ai_hal_host_event_fd(event, &fds[1], NULL) == AI_HAL_OK);
    EXPECT(!readable(fds[0], 0) && !readable(fds[1], 0) && fds[0] != fds[1]);
    pthread_mutex_unlock(&gate);
    EXPECT(readable(fds[0], 10000) && readable(fds[1], 10000));
    for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);
    ai_hal_host_queue_destroy(queue);
    EXPECT(ai_hal_host_event_fd(event, &fds[2], NULL) == AI_HAL_OK && readable(fds[2], 0));
    EXPECT(ai_hal_host_event_fd(NULL, fds, NULL) == AI_HAL_INVALID_ARGUMENT);
    EXPECT(ai_hal_host_event_query(event) == 1 && ai_hal_host_event_wait(event, 0, NULL) == AI_HAL_OK);
    ai_hal_host_event_destroy(event);
    for (int i = 0; i < 3; i++) EXPECT(readable(fds[i], 0) && !close(fds[i])); /* They are the host's. */
    EXPECT(atomic_load(&program.references) == 0);
}

int main(void) {
    filled();
    shapes();
    attributes();
    queues();
    puts("all is well");
    return 0;
}
