/* A stand-in for NVIDIA's libnvidia-ml.so.1 with two invented GPUs. No number of it is a measurement.
 *
 * NVML_STUB names the scenario. -DOLD_DRIVER leaves out what old drivers lack, -DOLDEST_DRIVER more. The numbers that
 * change while a program runs are set with stub_set. NVML's order is the reverse of CUDA's in the test.
 */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef unsigned long long u64;
typedef struct { const char *uuid; const char *name; u64 used; int is_slice; } Device;
typedef struct { u64 total, free, used; } Memory;
typedef struct { unsigned version; u64 total, reserved, free, used; } MemoryV2;
typedef struct { unsigned pid; u64 used; unsigned gpu_instance, compute_instance; } Process;

enum { OK = 0, INVALID = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6, TOO_SMALL = 7, NOT_LOADED = 9,
       VERSION_MISMATCH = 25 };
#define RESERVED_BYTES 300000000ULL
#define NOT_AVAILABLE (~0ULL)

static Device gpus[2] = {
    {"GPU-bbbbbbbb-0000-0000-0000-000000000001", "stub GPU B", 1000000, 0},
    {"GPU-aaaaaaaa-0000-0000-0000-000000000000", "stub GPU A", 2000000, 0},
};
static Device slice = {"MIG-cccccccc-0000-0000-0000-000000000002", "stub slice", 3000000, 1};
static volatile u64 own_bytes = 5000, grown_bytes = 0, millijoules = 1000;
static int opened = 0;

static int scenario(const char *name) {
    const char *asked = getenv("NVML_STUB");
    return asked != NULL && strcmp(asked, name) == 0;
}

/* In MIG mode a user is refused what he asks about the GPU, and answered about his slice. */
static int refused(const Device *device) { return scenario("mig") && !device->is_slice; }

void stub_set(u64 process, u64 growth, u64 energy) { own_bytes = process; grown_bytes = growth; millijoules = energy; }
int stub_opened(void) { return opened; }

const char *nvmlErrorString(int code) { (void)code; return "stub error"; }
int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    if (scenario("driver not loaded")) return NOT_LOADED;
    opened++;
    return OK;
}
int nvmlShutdown(void) { opened--; return OK; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { strncpy(text, "0.stub", size); return OK; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **device) {
    if (index > 1) return INVALID;
    *device = &gpus[index];
    return OK;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, Device **device) {
    for (int i = 0; i < 2; i++)
        if (strcmp(uuid, gpus[i].uuid) == 0) { *device = &gpus[i]; return OK; }
    if (scenario("mig") && strcmp(uuid, slice.uuid) == 0) { *device = &slice; return OK; }
    return NOT_FOUND;
}
int nvmlDeviceGetUUID(Device *device, char *text, unsigned size) { strncpy(text, device->uuid, size); return OK; }
int nvmlDeviceGetName(Device *device, char *text, unsigned size) { strncpy(text, device->name, size); return OK; }

int nvmlDeviceGetMemoryInfo(Device *device, Memory *memory) {
    if (refused(device)) return NO_PERMISSION;
    memory->total = 80000000000ULL;
    memory->used = device->used + grown_bytes + RESERVED_BYTES; /* the first version counts the driver's own share */
    memory->free = memory->total - memory->used;
    return OK;
}

static int __attribute__((unused)) list(Device *device, unsigned *count, Process *found) {
    if (scenario("no permission") || refused(device)) return NO_PERMISSION;
    if (scenario("empty list")) { *count = 0; return OK; }
    unsigned room = *count, mine = (unsigned)getpid();
    *count = 2;
    if (found == NULL || room < 2) return TOO_SMALL;
    memset(found, 0, 2 * sizeof *found);
    found[0].pid = mine + 1;
    found[0].used = 777;
    found[1].pid = scenario("foreign pids") ? mine + 2 : mine;
    /* The first GPU of NVML's list books other bytes, so a match by index would show. */
    found[1].used = scenario("wddm") ? NOT_AVAILABLE : own_bytes + (device == &gpus[0] ? 1 : 0);
    return OK;
}

#ifndef OLDEST_DRIVER
int nvmlDeviceGetComputeRunningProcesses_v2(Device *device, unsigned *count, Process *found) {
    return list(device, count, found);
}
#endif

#ifndef OLD_DRIVER
int nvmlDeviceGetComputeRunningProcesses_v3(Device *device, unsigned *count, Process *found) {
    return list(device, count, found);
}
int nvmlDeviceGetMemoryInfo_v2(Device *device, MemoryV2 *memory) {
    if (memory->version != (sizeof(MemoryV2) | 2U << 24)) return VERSION_MISMATCH;
    if (refused(device)) return NO_PERMISSION;
    memory->total = 80000000000ULL;
    memory->reserved = RESERVED_BYTES;
    memory->used = device->used + grown_bytes;
    memory->free = memory->total - memory->reserved - memory->used;
    return OK;
}
int nvmlDeviceGetTotalEnergyConsumption(Device *device, u64 *energy) {
    if (scenario("no energy counter") || device->is_slice) return NOT_SUPPORTED;
    *energy = millijoules + (device == &gpus[0] ? 1000000 : 0);
    return OK;
}
int nvmlDeviceGetMaxMigDeviceCount(Device *device, unsigned *count) {
    *count = scenario("mig") && device == &gpus[1] ? 2 : 0;
    return OK;
}
int nvmlDeviceGetMigDeviceHandleByIndex(Device *device, unsigned index, Device **found) {
    (void)device;
    if (index != 1) return NOT_FOUND; /* the first place is empty */
    *found = &slice;
    return OK;
}
#endif
