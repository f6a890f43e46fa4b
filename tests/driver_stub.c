/* Stands in for libcuda.so.1 and libnvidia-ml.so.1 (it is loaded under both names): what awq_trt/engine/driver.py asks
   of them, with the answers from the environment. FAKE_GPUS="name;major;minor;total;free,..." */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct Gpu {
  char name[64];
  int major, minor;
  unsigned long long total, free;
};

static int Gpus(struct Gpu* gpus) {
  char const* text = getenv("FAKE_GPUS");
  int count = 0;
  while (text && *text) {
    struct Gpu* gpu = &gpus[count++];
    sscanf(text, "%63[^;];%d;%d;%llu;%llu", gpu->name, &gpu->major, &gpu->minor, &gpu->total, &gpu->free);
    text = strchr(text, ',');
    if (text) ++text;
  }
  return count;
}

static int Number(char const* name, int other) { return getenv(name) ? atoi(getenv(name)) : other; }

int cuInit(unsigned flags) { return flags ? 1 : Number("FAKE_INIT", 0); }
int cuDriverGetVersion(int* version) {
  *version = Number("FAKE_CUDA", 13000);
  return 0;
}
int cuDeviceGetCount(int* count) {
  struct Gpu gpus[8];
  *count = Gpus(gpus);
  return 0;
}
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal + 10; /* a handle, no index */
  return 0;
}
int cuDeviceGetName(char* name, int length, int device) {
  struct Gpu gpus[8];
  Gpus(gpus);
  snprintf(name, length, "%s", gpus[device - 10].name);
  return 0;
}
int cuDeviceTotalMem_v2(size_t* bytes, int device) {
  struct Gpu gpus[8];
  Gpus(gpus);
  *bytes = gpus[device - 10].total;
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  struct Gpu gpus[8];
  Gpus(gpus);
  *value = attribute == 75 ? gpus[device - 10].major : attribute == 76 ? gpus[device - 10].minor : -1;
  return 0;
}
int cuDeviceGetUuid_v2(unsigned char* uuid, int device) {
  for (int i = 0; i < 16; ++i) uuid[i] = 16 * (device - 10) + i;
  return 0;
}
int cuGetErrorString(int error, char const** text) {
  *text = "initialization error";
  return error == 3 ? 0 : 1;
}

int nvmlInit_v2(void) { return Number("FAKE_NVML", 0); }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char* version, unsigned length) {
  snprintf(version, length, "580.65.06");
  return 0;
}
int nvmlDeviceGetHandleByUUID(char const* uuid, void** device) {
  char const* kind = getenv("FAKE_KIND") ? getenv("FAKE_KIND") : "GPU";
  for (int i = 0; i < 8; ++i) { /* NVML's handles are no indices either */
    char text[64];
    snprintf(text, sizeof text, "%s-%x%x%x%x%x%x%x%x-%x%x%x%x-%x%x%x%x-%x%x%x%x-%x%x%x%x%x%x%x%x%x%x%x%x", kind, i, 0,
             i, 1, i, 2, i, 3, i, 4, i, 5, i, 6, i, 7, i, 8, i, 9, i, 10, i, 11, i, 12, i, 13, i, 14, i, 15);
    if (!strcmp(text, uuid)) {
      *device = (void*)(size_t)(i + 100);
      return 0;
    }
  }
  return 6;
}
int nvmlDeviceGetMemoryInfo(void* device, unsigned long long* memory) {
  struct Gpu gpus[8];
  Gpus(gpus);
  memory[0] = gpus[(size_t)device - 100].total;
  memory[1] = gpus[(size_t)device - 100].free;
  memory[2] = memory[0] - memory[1];
  return 0;
}
