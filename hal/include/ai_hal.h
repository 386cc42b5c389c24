/**
 * @file ai_hal.h
 * @brief The contract between AI Assistant OS and the backend of a device, as a C ABI. Version 1.1.
 *
 * A backend is a shared library that exports one function, ai_hal_get_api(). It needs nothing but this header: no
 * library of ours, no protocol buffers. docs/hal-c-abi.md is the specification, examples/vendor-c a whole backend.
 *
 * @par Versions
 * The major version is asked for by name; another one is another contract. A minor version only adds at the end of
 * structures. So every structure begins with its `size` in the eyes of who made it, never less than in 1.0, and both
 * sides use what both know: AI_HAL_HAS() asks whether a field that came after 1.0 is there. Fields that are not there
 * count as zero. Structures said to be *frozen* have no size and never change.
 *
 * @par Memory
 * Handles (::ai_hal_context, ::ai_hal_buffer, …) are opaque; who wants one gives it back with the function named for
 * it. A context is closed last: the host gives back everything that was made of it before. All other handles may go
 * in any order, also while work that uses a program or an event is under way: the library keeps what it still needs.
 * What an argument points to stays until the call returns, no longer; copy what you keep.
 *
 * @par Threads
 * Every function may be called from any thread, several at once, but for a handle that is being given back.
 *
 * @par Strings
 * UTF-8, ending with a zero, at most ::AI_HAL_MAX_STRING bytes. The host reads no further.
 *
 * @par Errors
 * A function returns a status. When that is not ::AI_HAL_OK it may leave an error at `error`, which the host gives
 * back by ai_hal_api::error_free; `error` itself may be NULL. Results are left untouched on failure.
 */
#ifndef AI_HAL_H
#define AI_HAL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define AI_HAL_MAJOR 1u
#define AI_HAL_MINOR 1u
#define AI_HAL_MAX_STRING 4096u   /**< Longest string, bytes, its zero included. */
#define AI_HAL_MAX_RANK 32u       /**< No tensor has more dimensions. */
#define AI_HAL_REASON_SIZE 256u   /**< Room for a reason, bytes, its zero included. */
#define AI_HAL_NO_VALUE (-1)      /**< Index of an optional input or output that is left out. */
#define AI_HAL_UNKNOWN_SIZE (-1)  /**< In dims: known only when the program runs. */
#define AI_HAL_FOREVER (-1)       /**< A timeout that never comes. */

/** Whether whoever made a structure knew that field: `AI_HAL_HAS(args, ai_hal_open_args, device)`. */
#define AI_HAL_HAS(pointer, type, field) \
    ((size_t)(pointer)->size >= offsetof(type, field) + sizeof(((type *)0)->field))

#if defined(_WIN32)
#define AI_HAL_EXPORT __declspec(dllexport)
#else
#define AI_HAL_EXPORT __attribute__((visibility("default")))
#endif

/** How a call ended. A host takes a number that it does not know for ::AI_HAL_FAILED. */
typedef int32_t ai_hal_status;
enum {
    AI_HAL_OK = 0,
    AI_HAL_UNAVAILABLE = 1,      /**< No failure: the device, its driver or its firmware is not there. Say what helps. */
    AI_HAL_NOT_SUPPORTED = 2,    /**< Cannot, ever. */
    AI_HAL_INVALID_ARGUMENT = 3, /**< The caller's mistake; nothing was done. */
    AI_HAL_INVALID_MODEL = 4,    /**< The graph or the kept program contradicts itself. */
    AI_HAL_OUT_OF_MEMORY = 5,    /**< Say how much was asked for and how much is left. */
    AI_HAL_DEVICE_LOST = 6,      /**< The device went away: the host goes on elsewhere. */
    AI_HAL_BUSY = 7,             /**< Held by another; may work later. */
    AI_HAL_NOT_AUTHORIZED = 8,   /**< The process may not use the device. */
    AI_HAL_TIMEOUT = 9,          /**< It has not ended in that time. */
    AI_HAL_FAILED = 10,          /**< A defect of the library, driver or device. */
    AI_HAL_CALLBACK_FAILED = 11  /**< A function of the host failed, and the queue with it. */
};

/** Types of elements: the numbers of ONNX's TensorProto.DataType. A library names those that it takes. */
typedef int32_t ai_hal_dtype;
enum {
    AI_HAL_UNKNOWN = 0, /**< The type, and with it the shape, is not known before the graph runs. */
    AI_HAL_F32 = 1,
    AI_HAL_U8 = 2,
    AI_HAL_I8 = 3,
    AI_HAL_U16 = 4,
    AI_HAL_I16 = 5,
    AI_HAL_I32 = 6,
    AI_HAL_I64 = 7,
    AI_HAL_BOOL = 9, /**< One byte, 0 or 1. */
    AI_HAL_F16 = 10,
    AI_HAL_F64 = 11,
    AI_HAL_U32 = 12,
    AI_HAL_U64 = 13,
    AI_HAL_BF16 = 16
};

typedef struct ai_hal_context ai_hal_context; /**< An open device. */
typedef struct ai_hal_buffer ai_hal_buffer;   /**< Memory of a device. */
typedef struct ai_hal_program ai_hal_program; /**< A compiled graph. */
typedef struct ai_hal_queue ai_hal_queue;     /**< Work in order. */
typedef struct ai_hal_event ai_hal_event;     /**< The end of something that was submitted. */

/**
 * A link in the chain at `next` of an argument: something that only some hosts and libraries know. Unknown types are
 * passed over. Types below 0x80000000 are given out by this header (there are none yet), the others are the vendors' own.
 */
typedef struct ai_hal_extension {
    uint32_t size;
    uint32_t type;
    const struct ai_hal_extension *next;
} ai_hal_extension;

/** What went wrong. Made and freed by the library; a constant one will do where there is no memory. */
typedef struct ai_hal_error {
    uint32_t size;
    ai_hal_status code;  /**< The status that was returned. */
    const char *message; /**< One sentence for a person. */
    const char *hint;    /**< What to do about it: a package, a setting. NULL: nothing is known to help. */
} ai_hal_error;

/** Who asks. */
typedef struct ai_hal_host {
    uint32_t size;
    uint32_t minor; /**< Minor version of the host. */
    const ai_hal_extension *next;
} ai_hal_host;

/** A device that was found. */
typedef struct ai_hal_device {
    uint32_t size;
    uint32_t flags;     /**< 0. */
    const char *id;     /**< What ai_hal_api::open takes; unique in the library, the same after a restart. */
    const char *name;   /**< For people. */
    const char *kind;   /**< "cpu", "gpu", "npu", … */
    const char *hal_id; /**< Id of the detected device that this is, as `ai-assistant devices` prints it; may be NULL. */
} ai_hal_device;

/** The devices that were found. Made and freed by the library. */
typedef struct ai_hal_devices {
    uint32_t size;
    uint32_t count;
    const ai_hal_device *const *devices;
} ai_hal_devices;

typedef struct ai_hal_open_args {
    uint32_t size;
    uint32_t flags; /**< 0. */
    const ai_hal_extension *next;
    const ai_hal_host *host;
    const char *device; /**< Its id; "" means the first one. */
} ai_hal_open_args;

/** Bits of ai_hal_capabilities::features. */
enum {
    AI_HAL_DYNAMIC_SHAPES = 1,  /**< Programs take inputs of any size where their spec says ::AI_HAL_UNKNOWN_SIZE. */
    AI_HAL_HOST_MEMORY = 2,     /**< map() works, for every buffer. */
    AI_HAL_CACHES_PROGRAMS = 4, /**< program_serialize() and program_load() work. */
    AI_HAL_READS_POWER = 8      /**< power() measures. */
};

/** What a device can. Filled by the library. */
typedef struct ai_hal_capabilities {
    uint32_t size;
    uint32_t features;          /**< Bits as above. */
    uint64_t memory_bytes;      /**< What allocate() can give in all; 0: not known. */
    uint32_t alignment;         /**< Of buffers, bytes, a power of two. */
    uint32_t max_queues;        /**< How many queues work beside each other; 0: any number. */
    uint32_t dtype_count;       /**< Of dtypes. */
    uint32_t reserved;          /**< 0. */
    const ai_hal_dtype *dtypes; /**< What the device computes with. Stays as long as the context. */
} ai_hal_capabilities;

typedef struct ai_hal_allocate_args {
    uint32_t size;
    uint32_t flags; /**< 0. */
    const ai_hal_extension *next;
    uint64_t nbytes;    /**< May be 0. */
    uint64_t alignment; /**< A power of two; 0: the device's own. */
} ai_hal_allocate_args;

/** Bytes in use and at most in use, and how often memory was taken and given back. Filled by the library. */
typedef struct ai_hal_statistics {
    uint32_t size;
    uint32_t reserved;
    uint64_t in_use_bytes;
    uint64_t peak_bytes;
    uint64_t allocations;
    uint64_t frees;
} ai_hal_statistics;

/** Type and shape of a tensor: row-major, without gaps. Frozen. */
typedef struct ai_hal_spec {
    ai_hal_dtype dtype;
    uint32_t rank;
    const int64_t *dims; /**< Sizes, or ::AI_HAL_UNKNOWN_SIZE. NULL when rank is 0. */
} ai_hal_spec;

/** Some bytes; no zero at the end. Frozen. */
typedef struct ai_hal_bytes {
    const char *data;
    uint64_t length;
} ai_hal_bytes;

/** A tensor of a graph. */
typedef struct ai_hal_value {
    uint32_t size;
    uint32_t flags; /**< 0. */
    const char *name;
    ai_hal_spec spec;
    const void *data; /**< Of a constant; never NULL for one, not even when it has 0 bytes. NULL: no constant. */
    uint64_t nbytes;  /**< Of data. */
} ai_hal_value;

/** What an attribute is of. */
enum {
    AI_HAL_ATTRIBUTE_INT = 1,
    AI_HAL_ATTRIBUTE_FLOAT = 2,
    AI_HAL_ATTRIBUTE_STRING = 3,
    AI_HAL_ATTRIBUTE_INTS = 4,
    AI_HAL_ATTRIBUTE_FLOATS = 5,
    AI_HAL_ATTRIBUTE_STRINGS = 6,
    AI_HAL_ATTRIBUTE_TENSOR = 7
};

/** What ONNX lets an operator be configured with. One pointer is set, as the type says; the others are NULL. */
typedef struct ai_hal_attribute {
    uint32_t size;
    uint32_t type;
    const char *name;
    uint64_t count;              /**< 1 for those that are no list. */
    const int64_t *ints;         /**< INT, INTS. */
    const double *floats;        /**< FLOAT, FLOATS. */
    const ai_hal_bytes *strings; /**< STRING, STRINGS. */
    const ai_hal_value *tensor;  /**< TENSOR: a constant. */
} ai_hal_attribute;

/** One operator. Operators have names, not numbers: a new one needs no new version of this header. */
typedef struct ai_hal_node {
    uint32_t size;
    uint32_t flags;     /**< 0. */
    const char *domain; /**< "" for the standard one of ONNX. */
    const char *op;     /**< ONNX's name, as in "MatMul". */
    int64_t version;    /**< The operator set in which this meaning came in: Softmax of 11 is not that of 13. */
    const char *name;   /**< For messages; may be "". */
    uint32_t input_count;
    uint32_t output_count;
    const int32_t *inputs;  /**< Indices of values; ::AI_HAL_NO_VALUE where an optional one is left out. */
    const int32_t *outputs; /**< The same; ::AI_HAL_NO_VALUE where nobody wants it. */
    uint64_t attribute_count;
    const ai_hal_attribute *const *attributes;
} ai_hal_node;

/** Version of a domain's operator set. Frozen. */
typedef struct ai_hal_opset {
    const char *domain;
    int64_t version;
} ai_hal_opset;

/**
 * Nodes in an order in which they can run. The host has checked that indices point to values, that each value is made
 * once and before it is used, that constants have the bytes that their spec says, and that specs hold no negative
 * size but ::AI_HAL_UNKNOWN_SIZE. It has not checked that the specs of a node's outputs are what the node makes.
 */
typedef struct ai_hal_graph {
    uint32_t size;
    uint32_t flags; /**< 0. */
    const ai_hal_extension *next;
    const char *name;
    const ai_hal_value *const *values;
    const ai_hal_node *const *nodes;
    const int32_t *inputs;  /**< Indices of values, in the order in which submit is given tensors. */
    const int32_t *outputs; /**< The same. */
    const ai_hal_opset *opsets;
    uint32_t value_count;
    uint32_t node_count;
    uint32_t input_count;
    uint32_t output_count;
    uint32_t opset_count;
    uint32_t reserved; /**< 0. */
} ai_hal_graph;

/** Whether a node can be run. Filled by the library. */
typedef struct ai_hal_support {
    uint32_t size;
    uint32_t supported;              /**< 1 or 0. */
    char reason[AI_HAL_REASON_SIZE]; /**< Why not: one sentence, with the limit and what was found. */
} ai_hal_support;

typedef struct ai_hal_compile_args {
    uint32_t size;
    uint32_t flags; /**< 0. */
    const ai_hal_extension *next;
    const ai_hal_graph *graph;
} ai_hal_compile_args;

/** What a program takes and makes. Filled by the library; the arrays stay as long as the program. */
typedef struct ai_hal_program_info {
    uint32_t size;
    uint32_t reserved;
    uint32_t input_count;
    uint32_t output_count;
    const ai_hal_spec *inputs;
    const ai_hal_spec *outputs;
} ai_hal_program_info;

/** A place in a buffer. Frozen. */
typedef struct ai_hal_tensor {
    ai_hal_buffer *buffer;
    uint64_t offset;     /**< Bytes. */
    const int64_t *dims; /**< Where the program's spec has unknown sizes: the sizes. Otherwise NULL. */
} ai_hal_tensor;

typedef struct ai_hal_submit_args {
    uint32_t size;
    uint32_t flags; /**< 0. */
    const ai_hal_extension *next;
    ai_hal_program *program;
    const ai_hal_tensor *inputs;
    const ai_hal_tensor *outputs;
    uint32_t input_count;
    uint32_t output_count;
} ai_hal_submit_args;

/** A function of the host, called on a thread of the library; another result than ::AI_HAL_OK fails the queue. */
typedef ai_hal_status (*ai_hal_callback)(void *user);

/**
 * What a library does. Those marked *optional* may be NULL, and those at the end may be missing by `size`; everything
 * else must be there.
 */
typedef struct ai_hal_api {
    uint32_t size;
    uint32_t major;      /**< As asked for. */
    uint32_t minor;      /**< Of the header that the library was compiled with. */
    uint32_t reserved;   /**< 0. */
    const char *name;    /**< Of the backend: lower-case letters, digits and hyphens. */
    const char *version; /**< Of the backend, for people and for kept programs. */

    /** Give an error back. */
    void (*error_free)(ai_hal_error *error);

    /**
     * Look which devices are here. Opens none, and takes little time.
     * @return ::AI_HAL_UNAVAILABLE, with message and hint, when there is none.
     */
    ai_hal_status (*probe)(const ai_hal_host *host, const ai_hal_devices **devices, ai_hal_error **error);
    /** Give the list back. */
    void (*devices_free)(const ai_hal_devices *devices);

    /** Open a device. The same one may be opened more than once; memory belongs to the context that gave it.
     * @return ::AI_HAL_NOT_SUPPORTED: there is none of that id; ::AI_HAL_UNAVAILABLE, _BUSY, _NOT_AUTHORIZED. */
    ai_hal_status (*open)(const ai_hal_open_args *args, ai_hal_context **context, ai_hal_error **error);
    /** Close it; everything made of it was given back before. */
    void (*close)(ai_hal_context *context);
    /** What it can. */
    ai_hal_status (*capabilities)(ai_hal_context *context, ai_hal_capabilities *found, ai_hal_error **error);

    /** Take memory; its contents are undefined.
     * @return ::AI_HAL_OUT_OF_MEMORY; ::AI_HAL_INVALID_ARGUMENT: that is no alignment. */
    ai_hal_status (*allocate)(ai_hal_context *context, const ai_hal_allocate_args *args, ai_hal_buffer **buffer,
                              ai_hal_error **error);
    /** Give memory back. The host does so only when no work that uses it is left. */
    void (*free)(ai_hal_context *context, ai_hal_buffer *buffer);
    /** Write to a buffer. @return ::AI_HAL_INVALID_ARGUMENT: it does not fit; nothing was written. */
    ai_hal_status (*copy_in)(ai_hal_context *context, ai_hal_buffer *buffer, uint64_t offset, const void *data,
                             uint64_t nbytes, ai_hal_error **error);
    /** Read from a buffer. */
    ai_hal_status (*copy_out)(ai_hal_context *context, ai_hal_buffer *buffer, uint64_t offset, void *data,
                              uint64_t nbytes, ai_hal_error **error);
    /** How much memory is in use. */
    ai_hal_status (*statistics)(ai_hal_context *context, ai_hal_statistics *found, ai_hal_error **error);

    /** Whether node number `node` can be run as part of that graph. Unknown operators are no error. */
    ai_hal_status (*node_supported)(ai_hal_context *context, const ai_hal_graph *graph, uint32_t node,
                                    ai_hal_support *support, ai_hal_error **error);
    /** Make a graph ready to run; may take long.
     * @return ::AI_HAL_NOT_SUPPORTED: a node cannot be run: which, and why; ::AI_HAL_INVALID_MODEL. */
    ai_hal_status (*compile)(ai_hal_context *context, const ai_hal_compile_args *args, ai_hal_program **program,
                             ai_hal_error **error);
    /** What a program takes and makes. */
    ai_hal_status (*program_info)(ai_hal_program *program, ai_hal_program_info *info, ai_hal_error **error);
    /** Give a program back. Work that was submitted goes on to its end. */
    void (*program_free)(ai_hal_program *program);

    /** A new queue. @return ::AI_HAL_NOT_SUPPORTED: there are as many as the device has. */
    ai_hal_status (*queue_create)(ai_hal_context *context, ai_hal_queue **queue, ai_hal_error **error);
    /** Run a program after what was submitted before. Returns at once.
     * @param event where the event is left; NULL: none is wanted. */
    ai_hal_status (*queue_submit)(ai_hal_queue *queue, const ai_hal_submit_args *args, ai_hal_event **event,
                                  ai_hal_error **error);
    /** An event that is done when everything before it is. */
    ai_hal_status (*queue_record)(ai_hal_queue *queue, ai_hal_event **event, ai_hal_error **error);
    /** What is submitted from now on waits for an event, also one of another queue; if that failed, it fails.
     * Returns at once. */
    ai_hal_status (*queue_wait)(ai_hal_queue *queue, ai_hal_event *event, ai_hal_error **error);
    /** Call a function in its turn; not at all when something before it failed. */
    ai_hal_status (*queue_callback)(ai_hal_queue *queue, ai_hal_callback function, void *user, ai_hal_event **event,
                                    ai_hal_error **error);
    /** Block until everything submitted has ended, at most so many nanoseconds.
     * @return ::AI_HAL_TIMEOUT, or the first failure since the last call: after that the queue works again. */
    ai_hal_status (*queue_synchronize)(ai_hal_queue *queue, int64_t timeout_ns, ai_hal_error **error);
    /** End after what was submitted, and give the queue back. Its events stay. */
    void (*queue_destroy)(ai_hal_queue *queue);

    /** Whether it has ended, well or not: 1 or 0. Never blocks. */
    int32_t (*event_query)(ai_hal_event *event);
    /** Block until it has ended, at most so many nanoseconds. @return ::AI_HAL_TIMEOUT, or what it failed of. */
    ai_hal_status (*event_wait)(ai_hal_event *event, int64_t timeout_ns, ai_hal_error **error);
    /** Give an event back. What it stands for goes on. */
    void (*event_destroy)(ai_hal_event *event);

    /** Optional. Where a buffer's bytes are for the host, until the buffer is given back. */
    ai_hal_status (*map)(ai_hal_context *context, ai_hal_buffer *buffer, void **address, ai_hal_error **error);
    /** Optional. Use the host's memory as a buffer, without a copy; it stays until the buffer is given back. It counts
     * in no statistics. This is how tensors come in by DLPack.
     * @return ::AI_HAL_NOT_SUPPORTED: this memory cannot be used, for its alignment, say. */
    ai_hal_status (*import_memory)(ai_hal_context *context, void *address, uint64_t nbytes, ai_hal_buffer **buffer,
                                   ai_hal_error **error);
    /** Optional, for ::AI_HAL_DYNAMIC_SHAPES. The sizes of an output when the inputs are these.
     * @param dims room for ::AI_HAL_MAX_RANK sizes; as many are filled as the output's rank. */
    ai_hal_status (*program_output_dims)(ai_hal_program *program, const ai_hal_spec *inputs, uint32_t input_count,
                                         uint32_t output, int64_t *dims, ai_hal_error **error);
    /** Optional. A program as bytes.
     * @param data room for `*nbytes`, or NULL to ask how much is needed. @param nbytes is set to how many there are. */
    ai_hal_status (*program_serialize)(ai_hal_program *program, void *data, uint64_t *nbytes, ai_hal_error **error);
    /** Optional. A program from such bytes. The host has checked that they are whole, and were made by a library and
     * device of the same name and version; the library checks what else they depend on.
     * @return ::AI_HAL_NOT_SUPPORTED: compile again; ::AI_HAL_INVALID_MODEL: damaged. */
    ai_hal_status (*program_load)(ai_hal_context *context, const void *data, uint64_t nbytes, ai_hal_program **program,
                                  ai_hal_error **error);
    /** Optional. What the device draws now, in watts. */
    ai_hal_status (*power)(ai_hal_context *context, double *watts, ai_hal_error **error);

    /** Optional, since 1.1. A descriptor for poll(), epoll or io_uring that is readable once the event has ended, well or
     * not, and stays so. The host closes it, reads nothing from it, and may give the event back before. */
    ai_hal_status (*event_fd)(ai_hal_event *event, int32_t *fd, ai_hal_error **error);
} ai_hal_api;

/**
 * The one function that a library exports.
 * @param major the contract's major version that the host speaks.
 * @return the table, which stays as long as the library is loaded; NULL: the library does not speak that version.
 */
AI_HAL_EXPORT const ai_hal_api *ai_hal_get_api(uint32_t major);

#ifdef __cplusplus
}
#endif

#endif /* AI_HAL_H */
