/* Stands in for libnvidia-ml.so.1: what awq_trt/engine/driver.py asks of it through pynvml, with the answers from the
   environment. FAKE_GPUS="name;major;minor;total;free;cores;MIG parts,..."; the last three may be left out. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct Gpu {
  char name[64];
  int major, minor, cores, parts;
  unsigned long long total, free;
};

/* Handles are no indices: 100 + the GPU's, and 1000 more for each of its MIG parts. */
static int IndexOf(size_t device) { return device % 1000 - 100; }
static int PartOf(size_t device) { return device / 1000; }

static int Gpus(struct Gpu* gpus) {
  char const* text = getenv("FAKE_GPUS");
  int count = 0;
  while (text && *text) {
    struct Gpu* gpu = &gpus[count++];
    memset(gpu, 0, sizeof *gpu);
    sscanf(text, "%63[^;];%d;%d;%llu;%llu;%d;%d", gpu->name, &gpu->major, &gpu->minor, &gpu->total, &gpu->free,
           &gpu->cores, &gpu->parts);
    text = strchr(text, ',');
    if (text) ++text;
  }
  return count;
}

static struct Gpu Find(size_t device) {
  struct Gpu gpus[8];
  Gpus(gpus);
  return gpus[IndexOf(device)];
}

static int Number(char const* name, int other) { return getenv(name) ? atoi(getenv(name)) : other; }

int nvmlInitWithFlags(unsigned flags) { return flags ? 2 : Number("FAKE_INIT", 0); }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char* version, unsigned length) {
  snprintf(version, length, "580.65.06");
  return 0;
}
int nvmlSystemGetCudaDriverVersion_v2(int* version) {
  *version = Number("FAKE_CUDA", 13000);
  return *version ? 0 : 12; /* library not found: libcuda.so.1 */
}
int nvmlDeviceGetCount_v2(unsigned* count) {
  struct Gpu gpus[8];
  *count = Gpus(gpus);
  return Number("FAKE_COUNT", 0);
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, size_t* device) {
  *device = index + 100;
  return 0;
}
int nvmlDeviceGetMaxMigDeviceCount(size_t device, unsigned* count) {
  *count = Find(device).parts ? 7 : 0;
  return 0;
}
int nvmlDeviceGetMigDeviceHandleByIndex(size_t device, unsigned index, size_t* part) {
  *part = device + 1000 * index;
  return 1 <= index && index <= (unsigned)Find(device).parts ? 0 : 6; /* not found: numbers have gaps */
}
int nvmlDeviceGetUUID(size_t device, char* uuid, unsigned length) {
  snprintf(uuid, length, PartOf(device) ? "MIG-%d%d00" : "GPU-%d%d00", IndexOf(device), PartOf(device));
  return 0;
}
int nvmlDeviceGetName(size_t device, char* name, unsigned length) {
  snprintf(name, length, PartOf(device) ? "%s MIG 1g.10gb" : "%s", Find(device).name);
  return 0;
}
int nvmlDeviceGetCudaComputeCapability(size_t device, int* major, int* minor) {
  *major = Find(device).major;
  *minor = Find(device).minor;
  return PartOf(device) ? 2 : 0; /* invalid argument */
}
int nvmlDeviceGetMemoryInfo(size_t device, unsigned long long* memory) {
  memory[0] = Find(device).total / (PartOf(device) ? 8 : 1);
  memory[1] = Find(device).free / (PartOf(device) ? 8 : 1);
  memory[2] = memory[0] - memory[1];
  return memory[0] ? 0 : 3; /* not supported: memory that is the host's */
}
int nvmlDeviceGetNumGpuCores(size_t device, unsigned* cores) {
  *cores = Find(device).cores;
  return 0;
}
int nvmlDeviceGetMaxClockInfo(size_t device, int type, unsigned* megahertz) {
  *megahertz = type == 1 ? 2000 : 0;
  return 0;
}
