/* The operators of the example: how a node is checked and run. Replaced by your compiler, when you have one. */
#ifndef OPERATORS_H
#define OPERATORS_H

#include "ai_hal.h"

enum { MAX_RANK = 8, MAX_INPUTS = 3, TEXT = AI_HAL_REASON_SIZE };

/* A tensor whose shape is known. data: of a constant; only while a graph is read. */
struct tensor { ai_hal_dtype dtype; int rank; int64_t dims[MAX_RANK]; const void *data; };

/* A node made ready: which values it uses, how large they are, and what its attributes say. */
struct step {
    const struct operation *op;
    const ai_hal_node *node; /* Only while a graph is read. */
    int32_t inputs[MAX_INPUTS], output;
    struct tensor x[MAX_INPUTS], y;
    int64_t axis, group, first, second, list[MAX_RANK], strides[MAX_RANK], dilations[MAX_RANK], pads[2 * MAX_RANK];
    float alpha, beta;
};

/* Read a spec. Returns NULL, or why it cannot be used. */
const char *read_spec(const ai_hal_spec *spec, struct tensor *tensor);
/* Bytes of a tensor. */
uint64_t tensor_bytes(const struct tensor *tensor);
/* Make a node ready. Returns 1, or 0 and why it cannot be run, in `reason`. */
int prepare_step(const ai_hal_graph *graph, uint32_t node, struct step *step, char reason[TEXT]);
/* Compute; x holds NULL for inputs that are left out. Returns a status, and says in `reason` what was wrong. */
ai_hal_status run_step(const struct step *step, const void *const *x, void *y, char reason[TEXT]);

#endif
