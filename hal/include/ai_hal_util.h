/**
 * @file ai_hal_util.h
 * @brief What every library that speaks ai_hal.h needs in the same way: errors, checks, attributes, shapes.
 *
 * No part of the contract: a host cannot tell whether a library uses it. Everything is static and needs nothing but the
 * C library; C11 or C++17. Take it as it is, or write your own.
 */
#ifndef AI_HAL_UTIL_H
#define AI_HAL_UTIL_H

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ai_hal.h"

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define AI_HAL_PRINTF(text, first) __attribute__((format(printf, text, first)))
#else
#define AI_HAL_PRINTF(text, first)
#endif

/* ---- Errors */

/** An error with its own message, so that nobody has to keep the message alive. */
typedef struct ai_hal_owned_error {
    ai_hal_error error;
    char message[512];
} ai_hal_owned_error;

/**
 * Leave an error and return its status: `return ai_hal_fail(error, AI_HAL_BUSY, NULL, "%u queues are open", count);`
 *
 * @param error where the host wants it, or NULL.
 * @param hint what helps, or NULL. It is not copied: a constant.
 * @param format of a sentence for a person, at most 511 bytes.
 */
AI_HAL_PRINTF(4, 5)
static inline ai_hal_status ai_hal_fail(ai_hal_error **error, ai_hal_status code, const char *hint, const char *format,
                                        ...) {
    ai_hal_owned_error *made = error ? (ai_hal_owned_error *)malloc(sizeof *made) : NULL;
    if (!made) return code; /* The status alone will do. */
    va_list list;
    va_start(list, format);
    vsnprintf(made->message, sizeof made->message, format, list);
    va_end(list);
    made->error.size = sizeof made->error;
    made->error.code = code;
    made->error.message = made->message;
    made->error.hint = hint;
    *error = &made->error;
    return code;
}

/** For ai_hal_api::error_free, when every error comes from ai_hal_fail(). */
static inline void ai_hal_error_release(ai_hal_error *error) { free(error); }

/* ---- Checks of arguments, in functions that have an `error` */

/** Return AI_HAL_INVALID_ARGUMENT unless the structure was filled in up to its last field of version 1.0. */
#define AI_HAL_CHECK(pointer, type, last)                                                               \
    do {                                                                                                \
        if (!(pointer) || !AI_HAL_HAS(pointer, type, last))                                             \
            return ai_hal_fail(error, AI_HAL_INVALID_ARGUMENT, NULL, #type " is missing or too small"); \
    } while (0)

/** Return AI_HAL_INVALID_ARGUMENT when that is NULL. */
#define AI_HAL_NEED(pointer)                                                                              \
    do {                                                                                                  \
        if (!(pointer)) return ai_hal_fail(error, AI_HAL_INVALID_ARGUMENT, NULL, #pointer " is missing"); \
    } while (0)

/**
 * Fill a structure of the host, no further than the host knows it: `ai_hal_fill(found, &mine)`. Both begin with their
 * size; afterwards that of `found` is what was filled in.
 */
static inline void ai_hal_fill(void *found, const void *made) {
    uint32_t room, size;
    memcpy(&room, found, sizeof room);
    memcpy(&size, made, sizeof size);
    if (size > room) size = room;
    memcpy(found, made, size);
    memcpy(found, &size, sizeof size);
}

/** Answer ai_hal_api::node_supported(): `wrong` is NULL, or why the node cannot be run. */
static inline void ai_hal_answer(ai_hal_support *support, const ai_hal_node *node, const char *wrong) {
    ai_hal_support made;
    made.size = sizeof made;
    made.supported = !wrong;
    snprintf(made.reason, sizeof made.reason, "%.60s-%lld: %s", node->op, (long long)node->version, wrong ? wrong : "");
    ai_hal_fill(support, &made);
}

/** Answer ai_hal_api::program_info(). The specs are those of the inputs, then of the outputs; they stay. */
static inline ai_hal_status ai_hal_describe(ai_hal_program_info *info, uint32_t inputs, uint32_t outputs,
                                            const ai_hal_spec *specs, ai_hal_error **error) {
    ai_hal_program_info made;
    AI_HAL_CHECK(info, ai_hal_program_info, outputs);
    made.size = sizeof made;
    made.reserved = 0;
    made.input_count = inputs;
    made.output_count = outputs;
    made.inputs = specs;
    made.outputs = specs + inputs;
    ai_hal_fill(info, &made);
    return AI_HAL_OK;
}

/* ---- Attributes of a node: left as they are when the node has none of that name; 0 when it is of another type */

/** The attribute of that name, or NULL. */
static inline const ai_hal_attribute *ai_hal_find(const ai_hal_node *node, const char *name) {
    for (uint64_t i = 0; i < node->attribute_count; i++)
        if (!strcmp(node->attributes[i]->name, name)) return node->attributes[i];
    return NULL;
}

static inline int ai_hal_get_int(const ai_hal_node *node, const char *name, int64_t *value) {
    const ai_hal_attribute *found = ai_hal_find(node, name);
    if (found && found->type == AI_HAL_ATTRIBUTE_INT) *value = found->ints[0];
    return !found || found->type == AI_HAL_ATTRIBUTE_INT;
}

static inline int ai_hal_get_float(const ai_hal_node *node, const char *name, float *value) {
    const ai_hal_attribute *found = ai_hal_find(node, name);
    if (found && found->type == AI_HAL_ATTRIBUTE_FLOAT) *value = (float)found->floats[0];
    return !found || found->type == AI_HAL_ATTRIBUTE_FLOAT;
}

/** A list of exactly so many integers. An empty list of any type is a list of integers. */
static inline int ai_hal_get_ints(const ai_hal_node *node, const char *name, uint64_t count, int64_t *values) {
    const ai_hal_attribute *found = ai_hal_find(node, name);
    if (!found) return 1;
    if (found->type != AI_HAL_ATTRIBUTE_INTS || found->count != count) return 0;
    if (count) memcpy(values, found->ints, (size_t)count * sizeof *values);
    return 1;
}

/** Whether a text is that one; `otherwise` is what it is when the node does not say. */
static inline int ai_hal_text_is(const ai_hal_node *node, const char *name, const char *wanted, const char *otherwise) {
    const ai_hal_attribute *found = ai_hal_find(node, name);
    if (!found) return !strcmp(wanted, otherwise);
    return found->type == AI_HAL_ATTRIBUTE_STRING && found->strings->length == strlen(wanted) &&
           !memcmp(found->strings->data, wanted, strlen(wanted));
}

/** `axis` of a tensor of that rank, counted from its first dimension; 0 when it is none of them. */
static inline int ai_hal_get_axis(const ai_hal_node *node, uint32_t rank, int64_t *axis) {
    if (!ai_hal_get_int(node, "axis", axis)) return 0;
    if (*axis < 0) *axis += rank;
    return *axis >= 0 && *axis < (int64_t)rank;
}

/* ---- Shapes that are known before the graph runs */

/** Type and sizes of a tensor; a copy, where ::ai_hal_spec goes with the graph. */
typedef struct ai_hal_shape {
    ai_hal_dtype dtype;
    uint32_t rank;
    int64_t dims[AI_HAL_MAX_RANK];
} ai_hal_shape;

/** Bytes of an element, 0 for a type that this header does not know. */
static inline uint32_t ai_hal_element_bytes(ai_hal_dtype dtype) {
    static const uint8_t bytes[] = {0, 4, 1, 1, 2, 2, 4, 8, 0, 1, 2, 8, 4, 8, 0, 0, 2};
    return dtype >= 0 && (size_t)dtype < sizeof bytes ? bytes[dtype] : 0;
}

/** Elements in the dimensions from `first` to before `last`; 1 when these are none. */
static inline int64_t ai_hal_elements(const ai_hal_shape *shape, uint32_t first, uint32_t last) {
    int64_t count = 1;
    for (uint32_t i = first; i < last; i++) count *= shape->dims[i];
    return count;
}

static inline int64_t ai_hal_count(const ai_hal_shape *shape) { return ai_hal_elements(shape, 0, shape->rank); }

static inline uint64_t ai_hal_shape_bytes(const ai_hal_shape *shape) {
    return (uint64_t)ai_hal_count(shape) * ai_hal_element_bytes(shape->dtype);
}

/** Bytes up to the next multiple of an alignment, which is a power of two. */
static inline uint64_t ai_hal_padded(uint64_t nbytes, uint64_t alignment) {
    return (nbytes + alignment - 1) & ~(alignment - 1);
}

/** Copy a spec. Returns NULL, or why a device that needs fixed shapes cannot use it. Later products cannot overflow. */
static inline const char *ai_hal_read_shape(const ai_hal_spec *spec, ai_hal_shape *shape) {
    const int64_t most = (int64_t)1 << 40;
    int64_t elements = 1;
    if (!ai_hal_element_bytes(spec->dtype)) return "a type is not known beforehand";
    if (spec->rank > AI_HAL_MAX_RANK) return "a tensor has too many dimensions";
    shape->dtype = spec->dtype;
    shape->rank = spec->rank;
    for (uint32_t i = 0; i < spec->rank; i++) {
        int64_t size = shape->dims[i] = spec->dims[i];
        if (size < 0) return "the device needs fixed shapes";
        if (size > most || (size && elements > most / size)) return "a tensor is too large";
        elements *= size ? size : 1; /* A size of 0 does not excuse the others. */
    }
    return NULL;
}

/** The other way round; `shape` must stay as long as the spec. */
static inline ai_hal_spec ai_hal_spec_of(const ai_hal_shape *shape) {
    ai_hal_spec spec;
    spec.dtype = shape->dtype;
    spec.rank = shape->rank;
    spec.dims = shape->dims;
    return spec;
}

/** Read the shape of a value, and check that a constant has the bytes of its shape. */
static inline ai_hal_status ai_hal_read_value(const ai_hal_value *value, ai_hal_shape *shape, ai_hal_error **error) {
    const char *wrong = ai_hal_read_shape(&value->spec, shape);
    if (wrong) return ai_hal_fail(error, AI_HAL_NOT_SUPPORTED, NULL, "value '%.60s': %s", value->name, wrong);
    if (!value->data || value->nbytes == ai_hal_shape_bytes(shape)) return AI_HAL_OK;
    return ai_hal_fail(error, AI_HAL_INVALID_MODEL, NULL, "constant '%.60s' has not the bytes of its shape",
                       value->name);
}

/** Whether the sizes are the same; types may differ. */
static inline int ai_hal_same_dims(const ai_hal_shape *a, const ai_hal_shape *b) {
    return a->rank == b->rank && !memcmp(a->dims, b->dims, a->rank * sizeof *a->dims);
}

/**
 * The sizes of both without their last `skip` dimensions, broadcast as in NumPy and ONNX. `y` keeps its type.
 * @return 0 when they do not fit.
 */
static inline int ai_hal_broadcast(const ai_hal_shape *a, const ai_hal_shape *b, uint32_t skip, ai_hal_shape *y) {
    uint32_t ra = a->rank > skip ? a->rank - skip : 0, rb = b->rank > skip ? b->rank - skip : 0;
    uint32_t rank = ra > rb ? ra : rb;
    for (uint32_t i = 0; i < rank; i++) {
        int64_t da = i + ra < rank ? 1 : a->dims[i + ra - rank];
        int64_t db = i + rb < rank ? 1 : b->dims[i + rb - rank];
        if (da != db && da != 1 && db != 1) return 0;
        y->dims[i] = da == 1 ? db : da;
    }
    y->rank = rank;
    return 1;
}

/**
 * How far apart the elements of `x`, without its last `skip` dimensions, lie along the first `rank` dimensions of `y`,
 * to which it is broadcast: 0 where it is repeated. What is skipped is one element, `block` long.
 */
static inline void ai_hal_strides(const ai_hal_shape *x, uint32_t skip, const ai_hal_shape *y, uint32_t rank,
                                  int64_t block, int64_t *strides) {
    uint32_t own = x->rank > skip ? x->rank - skip : 0;
    for (uint32_t i = rank; i--;) {
        int64_t size = own ? x->dims[--own] : 1;
        strides[i] = size == 1 && y->dims[i] != 1 ? 0 : block;
        block *= size;
    }
}

/** Where the element at that position lies. */
static inline int64_t ai_hal_offset(uint32_t rank, const int64_t *at, const int64_t *strides) {
    int64_t sum = 0;
    for (uint32_t i = 0; i < rank; i++) sum += at[i] * strides[i];
    return sum;
}

/** Count a position up, the last dimension first. Returns 0 when it is back at the first one. */
static inline int ai_hal_next(uint32_t rank, const int64_t *dims, int64_t *at) {
    for (uint32_t i = rank; i--; at[i] = 0)
        if (++at[i] < dims[i]) return 1;
    return 0;
}

#ifdef __cplusplus
}
#endif

#endif /* AI_HAL_UTIL_H */
