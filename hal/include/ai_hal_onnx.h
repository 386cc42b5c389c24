/**
 * @file ai_hal_onnx.h
 * @brief What ONNX says of the operators of the mandatory profile: their attributes, and the shapes that they make.
 *
 * No part of the contract, like ai_hal_util.h: whoever computes these operators has to know the same. The host does not
 * check that the specs of a node's outputs are what the node makes; ai_hal_read_op() does. C11 or C++17.
 */
#ifndef AI_HAL_ONNX_H
#define AI_HAL_ONNX_H

#include "ai_hal_util.h"

enum { AI_HAL_OP_INPUTS = 3 /**< Most inputs of these operators. */ };

/** The mandatory profile. Gelu or Erf is enough for it. */
typedef enum ai_hal_op_kind {
    AI_HAL_OP_ADD,
    AI_HAL_OP_CONV,
    AI_HAL_OP_ERF,
    AI_HAL_OP_GATHER,
    AI_HAL_OP_GELU,
    AI_HAL_OP_GEMM,
    AI_HAL_OP_LAYER_NORMALIZATION,
    AI_HAL_OP_MATMUL,
    AI_HAL_OP_MUL,
    AI_HAL_OP_RELU,
    AI_HAL_OP_RESHAPE,
    AI_HAL_OP_SOFTMAX,
    AI_HAL_OP_TRANSPOSE,
    AI_HAL_OP_KINDS, /**< How many there are; operators of your own are numbered from here. */
    AI_HAL_OP_LAST = INT32_MAX /**< So that they may be. */
} ai_hal_op_kind;

/** A node whose shapes are known, without what goes with the graph. Attributes that it lacks have ONNX's defaults. */
typedef struct ai_hal_op {
    ai_hal_op_kind kind;
    const char *name;                   /**< A constant. */
    int32_t inputs[AI_HAL_OP_INPUTS];   /**< Indices of values; ::AI_HAL_NO_VALUE where one is left out. */
    int32_t output;                     /**< The same. */
    ai_hal_shape x[AI_HAL_OP_INPUTS];   /**< Of the inputs that are there. */
    ai_hal_shape y;                     /**< Of the output. */
    int moves;                          /**< Whether elements are only moved: their type does not matter. */
    int64_t axis;                       /**< Gather, LayerNormalization, Softmax: 0 is the first dimension. */
    int64_t transposed[2];              /**< Gemm: whether A and B are. */
    int64_t tanh;                       /**< Gelu: whether it is the approximation. */
    int64_t allow_zero;                 /**< Reshape: whether a size of 0 is one. */
    int64_t group;                      /**< Conv. */
    int64_t strides[AI_HAL_MAX_RANK];   /**< Conv, of each spatial dimension. */
    int64_t dilations[AI_HAL_MAX_RANK]; /**< The same. */
    int64_t pads[2 * AI_HAL_MAX_RANK];  /**< Conv: before each spatial dimension, then after each. */
    int64_t perm[AI_HAL_MAX_RANK];      /**< Transpose: which dimension of the input each of the output is. */
    float alpha, beta;                  /**< Gemm. */
    float epsilon;                      /**< LayerNormalization. */
} ai_hal_op;

/** Leave a function that says why a node is not understood. */
#define AI_HAL_UNLESS(condition, reason) \
    do {                                 \
        if (!(condition)) return reason; \
    } while (0)

static inline const char *ai_hal_read_product(const ai_hal_node *node, ai_hal_op *op) {
    const ai_hal_shape *a = &op->x[0], *b = &op->x[1];
    ai_hal_shape *y = &op->y;
    (void)node;
    AI_HAL_UNLESS(a->rank && b->rank, "MatMul of a number");
    AI_HAL_UNLESS(ai_hal_broadcast(a, b, 2, y), "the batches cannot be broadcast");
    AI_HAL_UNLESS(a->dims[a->rank - 1] == b->dims[b->rank > 1 ? b->rank - 2 : 0], "columns of A are not rows of B");
    if (a->rank > 1) y->dims[y->rank++] = a->dims[a->rank - 2];
    if (b->rank > 1) y->dims[y->rank++] = b->dims[b->rank - 1];
    return NULL;
}

static inline const char *ai_hal_read_gemm(const ai_hal_node *node, ai_hal_op *op) {
    const ai_hal_shape *a = &op->x[0], *b = &op->x[1];
    ai_hal_shape with;
    AI_HAL_UNLESS(ai_hal_get_float(node, "alpha", &op->alpha) && ai_hal_get_float(node, "beta", &op->beta),
                  "alpha and beta must be numbers");
    AI_HAL_UNLESS(ai_hal_get_int(node, "transA", &op->transposed[0]) &&
                      ai_hal_get_int(node, "transB", &op->transposed[1]),
                  "transA and transB must be integers");
    AI_HAL_UNLESS(a->rank == 2 && b->rank == 2, "A and B must be matrices");
    AI_HAL_UNLESS(a->dims[!op->transposed[0]] == b->dims[!!op->transposed[1]], "columns of A are not rows of B");
    op->y.rank = 2;
    op->y.dims[0] = a->dims[!!op->transposed[0]];
    op->y.dims[1] = b->dims[!op->transposed[1]];
    AI_HAL_UNLESS(op->inputs[2] == AI_HAL_NO_VALUE ||
                      (ai_hal_broadcast(&op->y, &op->x[2], 0, &with) && ai_hal_same_dims(&with, &op->y)),
                  "C cannot be broadcast to the product");
    return NULL;
}

static inline const char *ai_hal_read_norm(const ai_hal_node *node, ai_hal_op *op) {
    int64_t type = 1;
    AI_HAL_UNLESS(ai_hal_get_float(node, "epsilon", &op->epsilon), "epsilon must be a number");
    AI_HAL_UNLESS(ai_hal_get_int(node, "stash_type", &type) && type == 1, "stash_type must be 1, that is f32");
    for (int k = 1; k < 3 && op->inputs[k] != AI_HAL_NO_VALUE; k++)
        AI_HAL_UNLESS(op->x[k].rank == op->x[0].rank - op->axis &&
                          !memcmp(op->x[k].dims, op->x[0].dims + op->axis, op->x[k].rank * sizeof *op->x[k].dims),
                      "scale and bias must have the shape of what is normalized");
    op->y = op->x[0];
    return NULL;
}

static inline const char *ai_hal_read_conv(const ai_hal_node *node, ai_hal_op *op) {
    const ai_hal_shape *x = &op->x[0], *w = &op->x[1];
    const int64_t large = 1 << 20; /* Beyond which sizes overflow. */
    int64_t kernel[AI_HAL_MAX_RANK];
    AI_HAL_UNLESS(x->rank > 2 && w->rank == x->rank, "X and W must have the same spatial dimensions, one at least");
    uint32_t spatial = x->rank - 2;
    AI_HAL_UNLESS(ai_hal_text_is(node, "auto_pad", "NOTSET", "NOTSET"), "auto_pad is not supported: give the pads");
    AI_HAL_UNLESS(ai_hal_get_int(node, "group", &op->group) && op->group > 0 && w->dims[0] % op->group == 0 &&
                      x->dims[1] > 0 && x->dims[1] % op->group == 0 && w->dims[1] == x->dims[1] / op->group,
                  "the groups do not divide the channels");
    memcpy(kernel, w->dims + 2, spatial * sizeof *kernel);
    for (uint32_t i = 0; i < spatial; i++) op->strides[i] = op->dilations[i] = 1;
    AI_HAL_UNLESS(ai_hal_get_ints(node, "strides", spatial, op->strides) &&
                      ai_hal_get_ints(node, "dilations", spatial, op->dilations) &&
                      ai_hal_get_ints(node, "pads", 2 * spatial, op->pads),
                  "strides, dilations or pads are not as many as dimensions");
    AI_HAL_UNLESS(ai_hal_get_ints(node, "kernel_shape", spatial, kernel) &&
                      !memcmp(kernel, w->dims + 2, spatial * sizeof *kernel),
                  "kernel_shape is not that of W");
    AI_HAL_UNLESS(op->inputs[2] == AI_HAL_NO_VALUE || (op->x[2].rank == 1 && op->x[2].dims[0] == w->dims[0]),
                  "the bias does not fit W");
    op->y.rank = x->rank;
    op->y.dims[0] = x->dims[0];
    op->y.dims[1] = w->dims[0];
    for (uint32_t i = 0; i < spatial; i++) {
        int64_t size = x->dims[2 + i], k = kernel[i], step = op->strides[i], apart = op->dilations[i];
        int64_t before = op->pads[i], after = op->pads[spatial + i], room = size + before + after - apart * (k - 1) - 1;
        AI_HAL_UNLESS(k > 0 && k < large && step > 0 && step < large && apart > 0 && apart < large && before >= 0 &&
                          before < large && after >= 0 && after < large,
                      "a stride, dilation or pad is out of range");
        AI_HAL_UNLESS(size > 0 && room >= 0, "the kernel is larger than the input");
        op->y.dims[2 + i] = room / step + 1;
    }
    return NULL;
}

/** Whether these sizes, which may come only at run time, make the output that was declared. */
static inline int ai_hal_reshapes(const ai_hal_op *op, const int64_t *sizes) {
    for (uint32_t i = 0; i < op->y.rank; i++) {
        int64_t size = sizes[i];
        if (size == 0 && !op->allow_zero) size = i < op->x[0].rank ? op->x[0].dims[i] : -2;
        if (size != op->y.dims[i] && size != -1) return 0;
    }
    return 1;
}

static inline const char *ai_hal_read_reshape(const ai_hal_node *node, const int64_t *sizes, ai_hal_op *op) {
    AI_HAL_UNLESS(ai_hal_get_int(node, "allowzero", &op->allow_zero), "allowzero must be an integer");
    AI_HAL_UNLESS(op->x[1].rank == 1 && op->x[1].dims[0] == op->y.rank,
                  "the shape has not as many sizes as the output");
    AI_HAL_UNLESS(ai_hal_count(&op->x[0]) == ai_hal_count(&op->y), "the output has not as many elements as the input");
    AI_HAL_UNLESS(!sizes || ai_hal_reshapes(op, sizes), "the shape does not give the output's sizes");
    return NULL;
}

static inline const char *ai_hal_read_transpose(const ai_hal_node *node, ai_hal_op *op) {
    uint32_t rank = op->x[0].rank, seen = 0;
    for (uint32_t i = 0; i < rank; i++) op->perm[i] = rank - 1 - i;
    AI_HAL_UNLESS(ai_hal_get_ints(node, "perm", rank, op->perm),
                  "perm has not as many numbers as there are dimensions");
    for (uint32_t i = 0; i < rank; i++) {
        int64_t from = op->perm[i];
        AI_HAL_UNLESS(from >= 0 && from < (int64_t)rank && !(seen >> from & 1), "perm is no permutation");
        seen |= 1u << from;
        op->y.dims[i] = op->x[0].dims[from];
    }
    op->y.rank = rank;
    return NULL;
}

static inline const char *ai_hal_read_gather(ai_hal_op *op) {
    const ai_hal_shape *x = &op->x[0], *indices = &op->x[1];
    uint32_t axis = (uint32_t)op->axis;
    AI_HAL_UNLESS(x->rank + indices->rank <= AI_HAL_MAX_RANK, "the output has too many dimensions");
    op->y.rank = x->rank + indices->rank - 1;
    memcpy(op->y.dims, x->dims, axis * sizeof *x->dims);
    memcpy(op->y.dims + axis, indices->dims, indices->rank * sizeof *x->dims);
    memcpy(op->y.dims + axis + indices->rank, x->dims + axis + 1, (x->rank - axis - 1) * sizeof *x->dims);
    return NULL;
}

/** An operator's name, the versions whose meaning is read here, and how many inputs it has. */
typedef struct ai_hal_op_versions {
    const char *name;
    int64_t since, until;
    uint32_t least, most;
} ai_hal_op_versions;

static inline int ai_hal_is(const ai_hal_node *node, const ai_hal_op_versions *known) {
    return !*node->domain && !strcmp(node->op, known->name);
}

/**
 * Read what a node of any operator has in common with the others: its version, its operands and their shapes.
 *
 * Types are checked only as far as all devices need them: indices are i32 or i64, sizes i64, and everything else has
 * the type of the first input. Only the first output may be wanted. The output's shape is read as it is declared.
 *
 * @param kind  What `op->kind` is to be. Operators of your own have numbers from ::AI_HAL_OP_KINDS.
 * @return NULL, or why not: then `op` holds nothing.
 */
static inline const char *ai_hal_read_operands(const ai_hal_graph *graph, const ai_hal_node *node,
                                               const ai_hal_op_versions *known, int kind, ai_hal_op *op) {
    const char *wrong;
    AI_HAL_UNLESS(node->version >= known->since && node->version <= known->until, "this version is not implemented");
    AI_HAL_UNLESS(node->input_count >= known->least && node->input_count <= known->most && known->most <= AI_HAL_OP_INPUTS,
                  "wrong number of inputs");
    memset(op, 0, sizeof *op);
    op->kind = (ai_hal_op_kind)kind;
    op->name = known->name;
    op->moves = kind == AI_HAL_OP_GATHER || kind == AI_HAL_OP_RESHAPE || kind == AI_HAL_OP_TRANSPOSE;
    op->output = node->output_count ? node->outputs[0] : AI_HAL_NO_VALUE;
    op->group = 1;
    op->alpha = op->beta = 1;
    op->epsilon = 1e-5f;
    for (uint32_t i = 0; i < AI_HAL_OP_INPUTS; i++) {
        op->inputs[i] = i < node->input_count ? node->inputs[i] : AI_HAL_NO_VALUE;
        AI_HAL_UNLESS(op->inputs[i] != AI_HAL_NO_VALUE || i >= known->least, "an input is missing");
        if (op->inputs[i] == AI_HAL_NO_VALUE) continue;
        wrong = ai_hal_read_shape(&graph->values[op->inputs[i]]->spec, &op->x[i]);
        if (wrong) return wrong;
        ai_hal_dtype type = op->x[i].dtype;
        if (i == 1 && kind == AI_HAL_OP_GATHER)
            AI_HAL_UNLESS(type == AI_HAL_I32 || type == AI_HAL_I64, "indices must be i32 or i64");
        else if (i == 1 && kind == AI_HAL_OP_RESHAPE)
            AI_HAL_UNLESS(type == AI_HAL_I64, "sizes must be i64");
        else
            AI_HAL_UNLESS(type == op->x[0].dtype, "the inputs are of different types");
    }
    AI_HAL_UNLESS(op->output != AI_HAL_NO_VALUE, "the first output must be wanted");
    for (uint32_t i = 1; i < node->output_count; i++)
        AI_HAL_UNLESS(node->outputs[i] == AI_HAL_NO_VALUE, "only the first output is implemented");
    wrong = ai_hal_read_shape(&graph->values[op->output]->spec, &op->y);
    if (wrong) return wrong;
    AI_HAL_UNLESS(op->y.dtype == op->x[0].dtype, "the output's declared type is not that of the input");
    return NULL;
}

/** Read a node of an operator of your own whose output is like its first input. Parameters as above. */
static inline const char *ai_hal_read_like(const ai_hal_graph *graph, const ai_hal_node *node,
                                           const ai_hal_op_versions *known, int kind, ai_hal_op *op) {
    const char *wrong = ai_hal_read_operands(graph, node, known, kind, op);
    if (wrong) return wrong;
    AI_HAL_UNLESS(ai_hal_same_dims(&op->x[0], &op->y), "the output's declared shape is not that of the input");
    return NULL;
}

/**
 * Read a node of the mandatory profile, and check that its output is declared as what the operator makes.
 *
 * @return NULL, or why not: then `op` holds nothing.
 */
static inline const char *ai_hal_read_op(const ai_hal_graph *graph, const ai_hal_node *node, ai_hal_op *op) {
    static const ai_hal_op_versions known[AI_HAL_OP_KINDS] = {
        {"Add", 7, 14, 2, 2},
        {"Conv", 1, 22, 2, 3},
        {"Erf", 9, 13, 1, 1},
        {"Gather", 1, 13, 2, 2},
        {"Gelu", 20, 20, 1, 1},
        {"Gemm", 7, 13, 2, 3},
        {"LayerNormalization", 17, 17, 2, 3},
        {"MatMul", 1, 13, 2, 2},
        {"Mul", 7, 14, 2, 2},
        {"Relu", 6, 14, 1, 1},
        {"Reshape", 5, 21, 2, 2},
        {"Softmax", 13, 13, 1, 1},
        {"Transpose", 1, 21, 1, 1},
    };
    const int64_t *sizes = NULL;
    const char *wrong;
    int kind = 0;
    while (kind < AI_HAL_OP_KINDS && !ai_hal_is(node, &known[kind])) kind++;
    AI_HAL_UNLESS(kind < AI_HAL_OP_KINDS, "the operator is not implemented");
    wrong = ai_hal_read_operands(graph, node, &known[kind], kind, op);
    if (wrong) return wrong;
    const ai_hal_shape declared = op->y; /* Reshape makes what is declared; the others say what they make. */
    if (kind == AI_HAL_OP_GATHER || kind == AI_HAL_OP_LAYER_NORMALIZATION || kind == AI_HAL_OP_SOFTMAX) {
        op->axis = kind == AI_HAL_OP_GATHER ? 0 : -1;
        AI_HAL_UNLESS(ai_hal_get_axis(node, op->x[0].rank, &op->axis), "axis is no dimension of the input");
    }
    switch (op->kind) {
    case AI_HAL_OP_ADD:
    case AI_HAL_OP_MUL:
        wrong = ai_hal_broadcast(&op->x[0], &op->x[1], 0, &op->y) ? NULL : "the shapes cannot be broadcast";
        break;
    case AI_HAL_OP_CONV: wrong = ai_hal_read_conv(node, op); break;
    case AI_HAL_OP_GATHER: wrong = ai_hal_read_gather(op); break;
    case AI_HAL_OP_GEMM: wrong = ai_hal_read_gemm(node, op); break;
    case AI_HAL_OP_LAYER_NORMALIZATION: wrong = ai_hal_read_norm(node, op); break;
    case AI_HAL_OP_MATMUL: wrong = ai_hal_read_product(node, op); break;
    case AI_HAL_OP_RESHAPE:
        if (graph->values[op->inputs[1]]->nbytes == ai_hal_shape_bytes(&op->x[1]))
            sizes = (const int64_t *)graph->values[op->inputs[1]]->data;
        wrong = ai_hal_read_reshape(node, sizes, op);
        break;
    case AI_HAL_OP_TRANSPOSE: wrong = ai_hal_read_transpose(node, op); break;
    case AI_HAL_OP_GELU:
        op->tanh = ai_hal_text_is(node, "approximate", "tanh", "none");
        AI_HAL_UNLESS(op->tanh || ai_hal_text_is(node, "approximate", "none", "none"),
                      "approximate must be none or tanh");
        op->y = op->x[0];
        break;
    default: op->y = op->x[0];
    }
    if (wrong) return wrong;
    AI_HAL_UNLESS(ai_hal_same_dims(&declared, &op->y), "the output's declared shape is not what the operator makes");
    return NULL;
}

/** MatMul and Gemm as products of matrices: y[m][n] = Σ a[m][k] b[k][n]. Distances are in elements. */
typedef struct ai_hal_matrices {
    int64_t m, n, k;
    int64_t ra, ca, rb, cb;      /**< How far apart rows and columns of a and b lie. */
    uint32_t batches;            /**< Dimensions of y before its matrices. */
    int64_t sa[AI_HAL_MAX_RANK]; /**< How far apart the matrices of a lie along these; 0: one is used again. */
    int64_t sb[AI_HAL_MAX_RANK]; /**< The same of b. */
} ai_hal_matrices;

static inline ai_hal_matrices ai_hal_matrices_of(const ai_hal_op *op) {
    const ai_hal_shape *a = &op->x[0], *b = &op->x[1];
    ai_hal_matrices found;
    int ta = !!op->transposed[0], tb = !!op->transposed[1];
    memset(&found, 0, sizeof found);
    found.m = a->rank > 1 ? a->dims[a->rank - 2 + (uint32_t)ta] : 1;
    found.k = a->rank > 1 ? a->dims[a->rank - 1 - (uint32_t)ta] : a->dims[0];
    found.n = b->rank > 1 ? b->dims[b->rank - 1 - (uint32_t)tb] : 1;
    found.ra = ta ? 1 : found.k;
    found.ca = ta ? found.m : 1;
    found.rb = tb ? 1 : found.n;
    found.cb = tb ? found.k : 1;
    found.batches = op->y.rank - (a->rank > 1) - (b->rank > 1);
    ai_hal_strides(a, 2, &op->y, found.batches, found.m * found.k, found.sa);
    ai_hal_strides(b, 2, &op->y, found.batches, found.k * found.n, found.sb);
    return found;
}

/**
 * Conv: where the kernel at `kernel` (channel of the group, then a position in each spatial dimension) meets the input
 * for the output at `at`, in elements from the group's first; -1: in the padding.
 */
static inline int64_t ai_hal_conv_offset(const ai_hal_op *op, const int64_t *kernel, const int64_t *at) {
    int64_t offset = kernel[0];
    for (uint32_t i = 0; i < op->x[0].rank - 2; i++) {
        int64_t size = op->x[0].dims[2 + i];
        int64_t place = at[i] * op->strides[i] - op->pads[i] + kernel[1 + i] * op->dilations[i];
        if (place < 0 || place >= size) return -1;
        offset = offset * size + place;
    }
    return offset;
}

#endif /* AI_HAL_ONNX_H */
