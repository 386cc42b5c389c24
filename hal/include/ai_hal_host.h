/**
 * @file ai_hal_host.h
 * @brief Memory of the host, and queues that a thread of the library serves: what hal/host.py is in Python.
 *
 * For devices that share memory with the host, or whose driver blocks until its work has ended. No part of the
 * contract, like ai_hal_util.h. Functions with the signature of one in ::ai_hal_api go into the table as they are; take
 * those that fit, and write the others. C11 and POSIX, with `_GNU_SOURCE` defined.
 *
 * @par Memory
 * A context begins with an ::ai_hal_host_memory. It defines ::ai_hal_buffer.
 *
 * @par Queues
 * They keep the promises of the contract: order, waiting for others, failures that go on to what comes after them,
 * events that outlive their queue. It defines ::ai_hal_queue and ::ai_hal_event. The library adds a thread with this loop:
 * `while ((event = ai_hal_queue_take(queue))) { …; ai_hal_queue_end(queue, event); }`
 */
#ifndef AI_HAL_HOST_H
#define AI_HAL_HOST_H

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "ai_hal_util.h"

/* ---- Memory */

#define AI_HAL_HOST_ALIGNMENT 64u              /**< Of buffers that ask for none, bytes. */
#define AI_HAL_HOST_MAX_ALIGNMENT (1ull << 21) /**< What may be asked for. */

/** What a context begins with. */
typedef struct ai_hal_host_memory {
    uint64_t limit_bytes; /**< What may be in use at once. */
    pthread_mutex_t lock; /**< Of the rest. */
    ai_hal_statistics used;
} ai_hal_host_memory;

struct ai_hal_buffer {
    const ai_hal_context *context;
    char *data;
    uint64_t nbytes;
    int lent; /**< By the host: neither counted nor freed. */
};

static inline void ai_hal_host_memory_init(ai_hal_host_memory *memory, uint64_t limit_bytes) {
    memset(memory, 0, sizeof *memory);
    memory->limit_bytes = limit_bytes;
    memory->used.size = sizeof memory->used;
    pthread_mutex_init(&memory->lock, NULL);
}

static inline void ai_hal_host_memory_end(ai_hal_host_memory *memory) { pthread_mutex_destroy(&memory->lock); }

static inline ai_hal_status ai_hal_host_allocate(ai_hal_context *context, const ai_hal_allocate_args *args,
                                                 ai_hal_buffer **buffer, ai_hal_error **error) {
    AI_HAL_NEED(context);
    AI_HAL_NEED(buffer);
    AI_HAL_CHECK(args, ai_hal_allocate_args, alignment);
    ai_hal_host_memory *memory = (ai_hal_host_memory *)context;
    uint64_t nbytes = args->nbytes;
    uint64_t alignment = args->alignment > AI_HAL_HOST_ALIGNMENT ? args->alignment : AI_HAL_HOST_ALIGNMENT;
    if (alignment > AI_HAL_HOST_MAX_ALIGNMENT || args->alignment & (args->alignment - 1))
        return ai_hal_fail(error, AI_HAL_INVALID_ARGUMENT, NULL, "an alignment is a power of two up to %llu",
                           AI_HAL_HOST_MAX_ALIGNMENT);
    ai_hal_buffer *made = malloc(sizeof *made);
    pthread_mutex_lock(&memory->lock);
    uint64_t left = memory->limit_bytes - memory->used.in_use_bytes;
    char *data = made && nbytes <= left ? aligned_alloc(alignment, (nbytes + alignment) & ~(alignment - 1)) : NULL;
    if (data) {
        memory->used.allocations++;
        memory->used.in_use_bytes += nbytes;
        if (memory->used.in_use_bytes > memory->used.peak_bytes) memory->used.peak_bytes = memory->used.in_use_bytes;
    }
    pthread_mutex_unlock(&memory->lock);
    if (!data) {
        free(made);
        return ai_hal_fail(error, AI_HAL_OUT_OF_MEMORY, NULL, "%llu bytes were asked for, %llu are left",
                           (unsigned long long)nbytes, (unsigned long long)left);
    }
    made->context = context;
    made->data = data;
    made->nbytes = nbytes;
    made->lent = 0;
    *buffer = made;
    return AI_HAL_OK;
}

static inline ai_hal_status ai_hal_host_import(ai_hal_context *context, void *address, uint64_t nbytes,
                                               ai_hal_buffer **buffer, ai_hal_error **error) {
    AI_HAL_NEED(context);
    AI_HAL_NEED(address);
    AI_HAL_NEED(buffer);
    ai_hal_buffer *made = malloc(sizeof *made);
    if (!made) return ai_hal_fail(error, AI_HAL_OUT_OF_MEMORY, NULL, "no memory for a buffer");
    made->context = context;
    made->data = address;
    made->nbytes = nbytes;
    made->lent = 1;
    *buffer = made;
    return AI_HAL_OK;
}

static inline void ai_hal_host_free(ai_hal_context *context, ai_hal_buffer *buffer) {
    ai_hal_host_memory *memory = (ai_hal_host_memory *)context;
    if (!buffer->lent) {
        free(buffer->data);
        pthread_mutex_lock(&memory->lock);
        memory->used.in_use_bytes -= buffer->nbytes;
        memory->used.frees++;
        pthread_mutex_unlock(&memory->lock);
    }
    free(buffer);
}

/** Whether so many bytes at that offset lie in a buffer of that context; sums that overflow do not. */
static inline ai_hal_status ai_hal_host_check(const ai_hal_context *context, const ai_hal_buffer *buffer,
                                              uint64_t offset, uint64_t nbytes, ai_hal_error **error) {
    if (!context || !buffer || buffer->context != context)
        return ai_hal_fail(error, AI_HAL_INVALID_ARGUMENT, NULL, "the buffer is missing, or of another context");
    if (offset > buffer->nbytes || nbytes > buffer->nbytes - offset)
        return ai_hal_fail(error, AI_HAL_INVALID_ARGUMENT, NULL, "%llu bytes at %llu lie outside a buffer of %llu",
                           (unsigned long long)nbytes, (unsigned long long)offset, (unsigned long long)buffer->nbytes);
    return AI_HAL_OK;
}

/** Where a tensor of that shape is; NULL: not in memory of that context, or not at a multiple of its elements' size. */
static inline char *ai_hal_host_tensor(const ai_hal_context *context, const ai_hal_tensor *tensor,
                                       const ai_hal_shape *shape, ai_hal_error **error) {
    if (ai_hal_host_check(context, tensor->buffer, tensor->offset, ai_hal_shape_bytes(shape), error)) return NULL;
    char *data = tensor->buffer->data + tensor->offset;
    if ((uintptr_t)data % ai_hal_element_bytes(shape->dtype) == 0) return data;
    ai_hal_fail(error, AI_HAL_INVALID_ARGUMENT, NULL, "a tensor does not lie at a multiple of its elements' size");
    return NULL;
}

static inline ai_hal_status ai_hal_host_copy_in(ai_hal_context *context, ai_hal_buffer *buffer, uint64_t offset,
                                                const void *data, uint64_t nbytes, ai_hal_error **error) {
    ai_hal_status status = ai_hal_host_check(context, buffer, offset, nbytes, error);
    if (status || !nbytes) return status;
    AI_HAL_NEED(data);
    memcpy(buffer->data + offset, data, (size_t)nbytes);
    return status;
}

static inline ai_hal_status ai_hal_host_copy_out(ai_hal_context *context, ai_hal_buffer *buffer, uint64_t offset,
                                                 void *data, uint64_t nbytes, ai_hal_error **error) {
    ai_hal_status status = ai_hal_host_check(context, buffer, offset, nbytes, error);
    if (status || !nbytes) return status;
    AI_HAL_NEED(data);
    memcpy(data, buffer->data + offset, (size_t)nbytes);
    return status;
}

static inline ai_hal_status ai_hal_host_map(ai_hal_context *context, ai_hal_buffer *buffer, void **address,
                                            ai_hal_error **error) {
    AI_HAL_NEED(address);
    ai_hal_status status = ai_hal_host_check(context, buffer, 0, 0, error);
    if (!status) *address = buffer->data;
    return status;
}

static inline ai_hal_status ai_hal_host_statistics(ai_hal_context *context, ai_hal_statistics *found,
                                                   ai_hal_error **error) {
    AI_HAL_NEED(context);
    AI_HAL_CHECK(found, ai_hal_statistics, frees);
    ai_hal_host_memory *memory = (ai_hal_host_memory *)context;
    pthread_mutex_lock(&memory->lock);
    ai_hal_fill(found, &memory->used);
    pthread_mutex_unlock(&memory->lock);
    return AI_HAL_OK;
}

/* ---- Queues */

#define AI_HAL_HOST_SPIN_NS 20000 /**< How long a thread looks for what it waits for before it sleeps, at most. */

/** How work ended. */
typedef struct ai_hal_outcome {
    ai_hal_status status;
    char message[AI_HAL_REASON_SIZE];
} ai_hal_outcome;

/** The end of some work, and the work itself, so that a submission takes one allocation. */
struct ai_hal_event {
    atomic_uint references; /**< Of the host, its queue, and events that wait for it. */
    atomic_uint done;
    atomic_int processor; /**< On which its queue was last seen. */
    atomic_int fd;        /**< Readable once it is done; -1: nobody asked for it. */
    sem_t ended;
    ai_hal_outcome outcome; /**< Once it is done. */
    ai_hal_event *next;     /**< In its queue. */
    void (*release)(ai_hal_program *program);
    ai_hal_program *program;  /**< To run, on `tensors`; or */
    ai_hal_event *after;      /**< to wait for; or */
    ai_hal_callback function; /**< to call; or there is nothing to do. */
    void *user;
    char *tensors[]; /**< Where the program's inputs, then its outputs, are. */
};

struct ai_hal_queue {
    const ai_hal_context *context;
    pthread_t thread;
    atomic_int processor; /**< On which it was last submitted to. */
    atomic_int server;    /**< On which its thread was last seen. */
    sem_t work;           /**< Counts what is in the list, and the end of the queue. */
    pthread_mutex_t lock; /**< Of the rest. */
    ai_hal_event *first, **last;
    ai_hal_outcome failure; /**< The first one since the last ai_hal_host_synchronize(). */
};

/**
 * Take one from a semaphore within so many nanoseconds; 0 when there was none. Having the kernel wake a thread takes
 * longer than much of the work on a queue, so the thread looks for a moment before it sleeps; but not when whom it waits
 * for was last seen on its own `processor`, and cannot go on before it sleeps.
 */
static inline int ai_hal_await(sem_t *semaphore, int64_t timeout_ns, int processor) {
    const int64_t second = 1000000000, spin_ns = timeout_ns < 0 ? AI_HAL_HOST_SPIN_NS : timeout_ns;
    struct timespec begin, now, end;
    int failed;
    if (!sem_trywait(semaphore)) return 1;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    int64_t spent_ns = 0;
    while (spent_ns < spin_ns && spent_ns < AI_HAL_HOST_SPIN_NS && processor != sched_getcpu()) {
        if (!sem_trywait(semaphore)) return 1;
        clock_gettime(CLOCK_MONOTONIC, &now);
        spent_ns = (now.tv_sec - begin.tv_sec) * second + now.tv_nsec - begin.tv_nsec;
    }
    end.tv_sec = begin.tv_sec + (timeout_ns < 0 ? 0 : timeout_ns / second);
    end.tv_nsec = begin.tv_nsec + (timeout_ns < 0 ? 0 : timeout_ns % second);
    if (end.tv_nsec >= second) end.tv_sec++, end.tv_nsec -= second;
    do failed = timeout_ns < 0 ? sem_wait(semaphore) : sem_clockwait(semaphore, CLOCK_MONOTONIC, &end);
    while (failed && errno == EINTR);
    return !failed;
}

/** New work, without anything to do, and room for so many tensors; NULL: there is no memory. */
static inline ai_hal_event *ai_hal_event_new(size_t tensors) {
    ai_hal_event *event = calloc(1, sizeof *event + tensors * sizeof *event->tensors);
    if (!event) return NULL;
    atomic_init(&event->references, 1);
    atomic_init(&event->fd, -1);
    sem_init(&event->ended, 0, 0);
    return event;
}

static inline void ai_hal_host_event_destroy(ai_hal_event *event) {
    while (event && atomic_fetch_sub(&event->references, 1) == 1) {
        ai_hal_event *after = event->after;
        if (event->program) event->release(event->program);
        if (atomic_load(&event->fd) >= 0) close(atomic_load(&event->fd));
        sem_destroy(&event->ended);
        free(event);
        event = after;
    }
}

static inline int32_t ai_hal_host_event_query(ai_hal_event *event) { return (int32_t)atomic_load(&event->done); }

static inline ai_hal_status ai_hal_host_event_wait(ai_hal_event *event, int64_t timeout_ns, ai_hal_error **error) {
    AI_HAL_NEED(event);
    if (!atomic_load(&event->done)) {
        if (!ai_hal_await(&event->ended, timeout_ns, atomic_load_explicit(&event->processor, memory_order_relaxed)))
            return ai_hal_fail(error, AI_HAL_TIMEOUT, NULL, "it has not ended in time");
        sem_post(&event->ended); /* For the others who wait. */
    }
    if (!event->outcome.status) return AI_HAL_OK;
    return ai_hal_fail(error, event->outcome.status, NULL, "%s", event->outcome.message);
}

static inline ai_hal_status ai_hal_host_event_fd(ai_hal_event *event, int32_t *fd, ai_hal_error **error) {
    AI_HAL_NEED(event);
    AI_HAL_NEED(fd);
    int none = -1, made = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (made >= 0 && !atomic_compare_exchange_strong(&event->fd, &none, made)) close(made); /* There is one already. */
    /* Perhaps it ended before there was one; that both say so does no harm. */
    if (made >= 0 && atomic_load(&event->done)) eventfd_write(atomic_load(&event->fd), 1);
    int copy = made >= 0 ? fcntl(atomic_load(&event->fd), F_DUPFD_CLOEXEC, 0) : -1;
    if (copy < 0) return ai_hal_fail(error, AI_HAL_BUSY, NULL, "no descriptor can be had: %s", strerror(errno));
    *fd = copy;
    return AI_HAL_OK;
}

/** A queue with a thread that runs `serve(queue)`. */
static inline ai_hal_status ai_hal_queue_start(const ai_hal_context *context, void *(*serve)(void *queue),
                                               ai_hal_queue **queue, ai_hal_error **error) {
    AI_HAL_NEED(context);
    AI_HAL_NEED(queue);
    ai_hal_queue *made = calloc(1, sizeof *made);
    if (!made) return ai_hal_fail(error, AI_HAL_OUT_OF_MEMORY, NULL, "no memory for a queue");
    made->context = context;
    made->last = &made->first;
    sem_init(&made->work, 0, 0);
    pthread_mutex_init(&made->lock, NULL);
    if (pthread_create(&made->thread, NULL, serve, made)) {
        free(made);
        return ai_hal_fail(error, AI_HAL_BUSY, NULL, "no thread can be started");
    }
    /* A thread that is woken takes the processor from whoever submits, where there is no other one: not this thread. */
    struct sched_param priority;
    int policy;
    if (!pthread_getschedparam(made->thread, &policy, &priority) && policy == SCHED_OTHER)
        pthread_setschedparam(made->thread, SCHED_BATCH, &priority);
    *queue = made;
    return AI_HAL_OK;
}

static inline void ai_hal_host_queue_destroy(ai_hal_queue *queue) {
    sem_post(&queue->work); /* Its end, after everything that was submitted. */
    pthread_join(queue->thread, NULL);
    pthread_mutex_destroy(&queue->lock);
    sem_destroy(&queue->work);
    free(queue);
}

/** Give an event to its queue. Its work is done in its turn; `wanted` is where the host wants it, or NULL. */
static inline ai_hal_status ai_hal_queue_push(ai_hal_queue *queue, ai_hal_event *event, ai_hal_event **wanted) {
    if (wanted) {
        atomic_fetch_add(&event->references, 1);
        *wanted = event;
    }
    int server = atomic_load_explicit(&queue->server, memory_order_relaxed);
    atomic_store_explicit(&event->processor, server, memory_order_relaxed);
    atomic_store_explicit(&queue->processor, sched_getcpu(), memory_order_relaxed);
    pthread_mutex_lock(&queue->lock);
    *queue->last = event;
    queue->last = &event->next;
    pthread_mutex_unlock(&queue->lock);
    sem_post(&queue->work);
    return AI_HAL_OK;
}

static inline void ai_hal_event_end(ai_hal_event *event) {
    atomic_store(&event->done, 1);
    sem_post(&event->ended);
    if (atomic_load(&event->fd) >= 0) eventfd_write(atomic_load(&event->fd), 1);
    ai_hal_host_event_destroy(event); /* The queue's reference. */
}

/** What ai_hal_queue_take() returned has ended; `event->outcome` says how. What failed fails everything after it. */
static inline void ai_hal_queue_end(ai_hal_queue *queue, ai_hal_event *event) {
    if (event->outcome.status) {
        pthread_mutex_lock(&queue->lock);
        queue->failure = event->outcome;
        pthread_mutex_unlock(&queue->lock);
    }
    ai_hal_event_end(event);
}

/** The next program to run; NULL: the queue was closed. Callbacks are called, and other events waited for, in here. */
static inline ai_hal_event *ai_hal_queue_take(ai_hal_queue *queue) {
    for (;;) {
        ai_hal_await(&queue->work, AI_HAL_FOREVER, atomic_load_explicit(&queue->processor, memory_order_relaxed));
        int processor = sched_getcpu();
        atomic_store_explicit(&queue->server, processor, memory_order_relaxed);
        pthread_mutex_lock(&queue->lock);
        ai_hal_event *event = queue->first;
        if (event) {
            queue->first = event->next;
            if (!queue->first) queue->last = &queue->first;
            event->outcome = queue->failure;
            atomic_store_explicit(&event->processor, processor, memory_order_relaxed);
        }
        pthread_mutex_unlock(&queue->lock);
        if (!event) return NULL;
        if (event->outcome.status) {
            ai_hal_event_end(event);
            continue;
        }
        if (event->program) return event;
        if (event->function && event->function(event->user)) {
            event->outcome.status = AI_HAL_CALLBACK_FAILED;
            snprintf(event->outcome.message, AI_HAL_REASON_SIZE, "a function of the host failed");
        }
        if (event->after) {
            ai_hal_host_event_wait(event->after, AI_HAL_FOREVER, NULL);
            event->outcome = event->after->outcome;
        }
        ai_hal_queue_end(queue, event);
    }
}

static inline ai_hal_status ai_hal_host_callback(ai_hal_queue *queue, ai_hal_callback function, void *user,
                                                 ai_hal_event **event, ai_hal_error **error) {
    AI_HAL_NEED(queue);
    ai_hal_event *made = ai_hal_event_new(0);
    if (!made) return ai_hal_fail(error, AI_HAL_OUT_OF_MEMORY, NULL, "no memory for an event");
    made->function = function;
    made->user = user;
    return ai_hal_queue_push(queue, made, event);
}

static inline ai_hal_status ai_hal_host_record(ai_hal_queue *queue, ai_hal_event **event, ai_hal_error **error) {
    AI_HAL_NEED(event);
    return ai_hal_host_callback(queue, NULL, NULL, event, error);
}

static inline ai_hal_status ai_hal_host_wait(ai_hal_queue *queue, ai_hal_event *event, ai_hal_error **error) {
    AI_HAL_NEED(queue);
    AI_HAL_NEED(event);
    ai_hal_event *made = ai_hal_event_new(0);
    if (!made) return ai_hal_fail(error, AI_HAL_OUT_OF_MEMORY, NULL, "no memory for an event");
    atomic_fetch_add(&event->references, 1);
    made->after = event;
    return ai_hal_queue_push(queue, made, NULL);
}

static inline ai_hal_status ai_hal_host_synchronize(ai_hal_queue *queue, int64_t timeout_ns, ai_hal_error **error) {
    AI_HAL_NEED(queue);
    ai_hal_event *last = ai_hal_event_new(0), *wanted;
    if (!last) return ai_hal_fail(error, AI_HAL_OUT_OF_MEMORY, NULL, "no memory for an event");
    ai_hal_queue_push(queue, last, &wanted);
    ai_hal_status status = ai_hal_host_event_wait(last, timeout_ns, error);
    if (status && atomic_load(&last->done) && status == last->outcome.status) { /* It was told: work goes on. */
        pthread_mutex_lock(&queue->lock);
        queue->failure.status = AI_HAL_OK;
        pthread_mutex_unlock(&queue->lock);
    }
    ai_hal_host_event_destroy(last);
    return status;
}

#endif /* AI_HAL_HOST_H */
