/* The example backend with one thing wrong, or added; which, says the environment's HAL_FAULT. */
#define ai_hal_get_api get_good_api
#include "example.c"
#undef ai_hal_get_api

#include <stddef.h>

static const char *fault = "";
static int is(const char *name) { return !strcmp(fault, name); }

static char long_text[1 << 20];
static ai_hal_error odd_error = {sizeof odd_error, AI_HAL_FAILED, NULL, NULL};
static void never_free(ai_hal_error *error) { if (error != &odd_error) ai_hal_error_release(error); }

static ai_hal_status bad_probe(const ai_hal_host *host, const ai_hal_devices **devices, ai_hal_error **error) {
    static ai_hal_devices list;
    static ai_hal_device small = {8, 0, NULL, NULL, NULL, NULL};
    static ai_hal_device nameless = {sizeof nameless, 0, NULL, NULL, NULL, NULL};
    static const ai_hal_device *twice[2] = {&DEVICE, &DEVICE}, *null[1] = {NULL}, *smalls[1] = {&small}, *less[1] = {&nameless};
    ai_hal_status status = probe(host, devices, error);
    list = DEVICES;
    if (is("no_devices")) *devices = NULL;
    else if (is("many_devices")) list.count = 0xffffffffu, *devices = &list;
    else if (is("same_devices")) list.count = 2, list.devices = twice, *devices = &list;
    else if (is("null_device")) list.devices = null, *devices = &list;
    else if (is("small_device")) list.devices = smalls, *devices = &list;
    else if (is("nameless_device")) list.devices = less, *devices = &list;
    else if (is("zero_devices")) list.count = 0, list.devices = NULL, *devices = &list;
    else if (is("unavailable")) return ai_hal_fail(error, AI_HAL_UNAVAILABLE, "install firmware-acme", "the firmware is missing");
    return status;
}
static ai_hal_status bad_open(const ai_hal_open_args *args, ai_hal_context **context, ai_hal_error **error) {
    if (is("null_error")) return AI_HAL_FAILED;
    if (is("unknown_status")) return 12345;
    if (is("negative_status")) return -1;
    if (is("no_context")) return AI_HAL_OK;
    if (is("lost")) return ai_hal_fail(error, AI_HAL_DEVICE_LOST, "plug it in again", "the device went away");
    if (is("odd_error")) return *error = &odd_error, AI_HAL_FAILED;
    if (is("small_error")) return odd_error.size = 4, *error = &odd_error, AI_HAL_FAILED;
    if (is("wild_error")) return *error = (ai_hal_error *)(uintptr_t)3, AI_HAL_FAILED;
    if (is("binary_error")) return odd_error.message = "\xff\xfe\x01 binary", *error = &odd_error, AI_HAL_FAILED;
    if (is("long_error")) {
        memset(long_text, 'x', sizeof long_text); /* no zero at its end */
        return odd_error.message = long_text, *error = &odd_error, AI_HAL_FAILED;
    }
    return open_device(args, context, error);
}
static ai_hal_status bad_capabilities(ai_hal_context *context, ai_hal_capabilities *found, ai_hal_error **error) {
    static const ai_hal_dtype strange[] = {99, -1};
    ai_hal_status status = capabilities(context, found, error);
    if (is("alignment_3")) found->alignment = 3;
    if (is("alignment_0")) found->alignment = 0;
    if (is("no_dtypes")) found->dtypes = NULL;
    if (is("many_dtypes")) found->dtype_count = 1u << 30;
    if (is("strange_dtypes")) found->dtypes = strange, found->dtype_count = 2;
    if (is("negative_memory")) found->memory_bytes = (uint64_t)-1;
    if (is("older")) found->features = 0;
    if (is("says_power")) found->features |= AI_HAL_READS_POWER;
    if (is("power") || is("power_nan")) found->features |= AI_HAL_READS_POWER;
    if (is("keeps") || is("keeps_lying")) found->features |= AI_HAL_CACHES_PROGRAMS;
    if (is("dynamic") || is("dynamic_lying")) found->features |= AI_HAL_DYNAMIC_SHAPES;
    return status;
}
static ai_hal_status bad_statistics(ai_hal_context *context, ai_hal_statistics *found, ai_hal_error **error) {
    ai_hal_status status = ai_hal_host_statistics(context, found, error);
    if (is("negative_statistics")) found->in_use_bytes = (uint64_t)-5;
    return status;
}
static ai_hal_status bad_support(ai_hal_context *context, const ai_hal_graph *graph, uint32_t node,
                                 ai_hal_support *support, ai_hal_error **error) {
    ai_hal_status status = node_supported(context, graph, node, support, error);
    if (is("long_reason")) support->supported = 0, memset(support->reason, 'r', sizeof support->reason);
    if (is("no_reason")) support->supported = 7, memset(support->reason, 0, sizeof support->reason);
    return status;
}
static ai_hal_status bad_info(ai_hal_program *program, ai_hal_program_info *info, ai_hal_error **error) {
    static const int64_t negative[] = {-7}, other[] = {5}, large[] = {1ll << 62}, open[] = {-1};
    static ai_hal_spec spec;
    ai_hal_status status = program_info(program, info, error);
    spec = info->inputs[0];
    if (is("negative_dims")) spec.dims = negative, info->inputs = &spec;
    if (is("other_dims")) spec.dims = other, info->inputs = &spec;
    if (is("large_dims")) spec.dims = large, info->outputs = &spec;
    if (is("null_dims")) spec.dims = NULL, info->inputs = &spec;
    if (is("huge_rank")) spec.rank = 0xffffffffu, info->inputs = &spec;
    if (is("strange_dtype")) spec.dtype = 8, info->inputs = &spec;
    if (is("wrong_count")) info->input_count = 0;
    if (is("huge_count")) info->output_count = 0xffffffffu;
    if (is("null_specs")) info->inputs = NULL;
    if (is("dynamic") || is("dynamic_lying")) spec.dims = open, info->inputs = info->outputs = &spec;
    return status;
}
static ai_hal_status bad_submit(ai_hal_queue *queue, const ai_hal_submit_args *args, ai_hal_event **event, ai_hal_error **error) {
    if (is("no_event")) return AI_HAL_OK;
    return queue_submit(queue, args, event, error);
}
static ai_hal_callback twice_function;
static ai_hal_status twice(void *user) {
    twice_function(user);
    return twice_function(user);
}
static ai_hal_status bad_callback(ai_hal_queue *queue, ai_hal_callback function, void *user, ai_hal_event **event, ai_hal_error **error) {
    if (!is("calls_twice")) return ai_hal_host_callback(queue, function, user, event, error);
    twice_function = function;
    return ai_hal_host_callback(queue, twice, user, event, error);
}
static ai_hal_status bad_map(ai_hal_context *context, ai_hal_buffer *buffer, void **address, ai_hal_error **error) {
    return is("null_map") ? AI_HAL_OK : ai_hal_host_map(context, buffer, address, error);
}
static ai_hal_status output_dims(ai_hal_program *program, const ai_hal_spec *inputs, uint32_t count, uint32_t output,
                                 int64_t *dims, ai_hal_error **error) {
    (void)program, (void)count, (void)output, (void)error;
    dims[0] = is("dynamic_lying") ? -4 : inputs[0].dims[0];
    return AI_HAL_OK;
}
/* A program is kept as the place where it is in this process: enough to see what the host does with the bytes. */
static ai_hal_status serialize(ai_hal_program *program, void *data, uint64_t *nbytes, ai_hal_error **error) {
    (void)error;
    if (data && *nbytes >= sizeof program) memcpy(data, &program, sizeof program);
    *nbytes = is("keeps_lying") ? (uint64_t)-1 : sizeof program;
    return AI_HAL_OK;
}
static ai_hal_status load(ai_hal_context *context, const void *data, uint64_t nbytes, ai_hal_program **program, ai_hal_error **error) {
    (void)context;
    if (nbytes != sizeof *program) return ai_hal_fail(error, AI_HAL_INVALID_MODEL, NULL, "not of that size");
    memcpy(program, data, sizeof *program);
    atomic_fetch_add(&(*program)->references, 1);
    return AI_HAL_OK;
}
static ai_hal_status power(ai_hal_context *context, double *watts, ai_hal_error **error) {
    (void)context, (void)error;
    *watts = is("power_nan") ? (double)__builtin_nanf("") : 12.5;
    return AI_HAL_OK;
}

static ai_hal_status bad_fd(ai_hal_event *event, int32_t *fd, ai_hal_error **error) {
    if (is("fd_negative")) return *fd = -7, AI_HAL_OK;
    if (is("fd_closed")) return *fd = 1 << 20, AI_HAL_OK;
    if (is("fd_standard")) return *fd = 1, AI_HAL_OK;
    if (is("fd_none")) return AI_HAL_OK;
    return ai_hal_host_event_fd(event, fd, error);
}

AI_HAL_EXPORT const ai_hal_api *ai_hal_get_api(uint32_t major);
const ai_hal_api *ai_hal_get_api(uint32_t major) {
    static struct { ai_hal_api api; void *later[16]; } table;
    fault = getenv("HAL_FAULT") ? strdup(getenv("HAL_FAULT")) : "";
    ai_hal_api *api = &table.api;
    *api = *get_good_api(major);
    api->error_free = never_free, api->probe = bad_probe, api->open = bad_open, api->capabilities = bad_capabilities;
    api->statistics = bad_statistics, api->node_supported = bad_support, api->program_info = bad_info;
    api->queue_submit = bad_submit, api->queue_callback = bad_callback, api->map = bad_map, api->event_fd = bad_fd;
    if (is("dynamic") || is("dynamic_lying")) api->program_output_dims = output_dims;
    if (is("keeps") || is("keeps_lying")) api->program_serialize = serialize, api->program_load = load;
    if (is("power") || is("power_nan")) api->power = power;
    if (is("null_table")) return NULL;
    if (is("wild_table")) return (const ai_hal_api *)(uintptr_t)5;
    if (is("other_major")) api->major = 2;
    if (is("small_table")) api->size = 64;
    if (is("empty_table")) api->size = 0;
    if (is("huge_table")) api->size = 1u << 30;
    if (is("null_open")) api->open = NULL;
    if (is("null_name")) api->name = NULL;
    if (is("binary_name")) api->name = "\xff\xfe\x01";
    if (is("long_name")) memset(long_text, 'x', sizeof long_text), api->name = long_text;
    if (is("null_version")) api->version = NULL;
    if (is("newer")) api->minor = 7, api->size = sizeof table;
    if (is("older")) api->size = offsetof(ai_hal_api, map);
    if (is("version_1_0")) api->minor = 0, api->size = offsetof(ai_hal_api, event_fd);
    return api;
}
