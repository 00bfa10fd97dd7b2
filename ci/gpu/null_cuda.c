/* A CUDA runtime that computes nothing, for machines without a GPU. It has one device, whose memory is host memory.
 * Copies are made, kernels return at once. All that ONNX Runtime's CUDA provider decides before a kernel computes, it
 * decides here as on a GPU. NULL_CUDA_SM is the compute capability of the device (90: Hopper). With NULL_CUDA_TRACE the
 * name of every launched kernel is printed on stderr. Functions that are missing here are added by null_cuda.py; they
 * return 0, success.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "driver_types.h"

#define MOST_KERNELS (1 << 20)
enum { ALIGNMENT = 512, MULTIPROCESSORS = 132, WARP = 32, BLOCK = 1024, SHARED = 49152, SHARED_MOST = 232448 };
static const size_t MEMORY = (size_t)80 << 30;
static char handle[1 << 16]; /* the address of every stream, event and pool */
static const void *kernels[MOST_KERNELS];
static const char *kernel_names[MOST_KERNELS];
static int num_kernels;

static int capability(void) {
  const char *text = getenv("NULL_CUDA_SM");
  return text ? atoi(text) : 90;
}

static int allocate(void **place, size_t bytes) { return posix_memalign(place, ALIGNMENT, bytes + ALIGNMENT) ? 2 : 0; }

static int launched(const void *kernel) {
  if (!getenv("NULL_CUDA_TRACE")) return 0;
  for (int i = 0; i < num_kernels; i++)
    if (kernels[i] == kernel) return fprintf(stderr, "launched %s\n", kernel_names[i]) < 0;
  return fprintf(stderr, "launched a kernel of no name\n") < 0;
}

int cudaGetDeviceCount(int *count) { return *count = 1, 0; }
int cudaGetDevice(int *device) { return *device = 0, 0; }
int cudaDriverGetVersion(int *version) { return *version = 13000, 0; }
int cudaRuntimeGetVersion(int *version) { return *version = 13000, 0; }

int cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "no device");
  p->major = capability() / 10, p->minor = capability() % 10;
  p->totalGlobalMem = MEMORY;
  p->sharedMemPerBlock = SHARED, p->sharedMemPerBlockOptin = p->sharedMemPerMultiprocessor = SHARED_MOST;
  p->warpSize = WARP, p->maxThreadsPerBlock = BLOCK, p->maxThreadsPerMultiProcessor = 2 * BLOCK;
  p->multiProcessorCount = MULTIPROCESSORS, p->regsPerBlock = 65536, p->l2CacheSize = 50 << 20;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = BLOCK, p->maxThreadsDim[2] = 64;
  return 0;
}

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: return *value = BLOCK, 0;
    case cudaDevAttrMaxSharedMemoryPerBlock: return *value = SHARED, 0;
    case cudaDevAttrWarpSize: return *value = WARP, 0;
    case cudaDevAttrMultiProcessorCount: return *value = MULTIPROCESSORS, 0;
    case cudaDevAttrComputeCapabilityMajor: return *value = capability() / 10, 0;
    case cudaDevAttrComputeCapabilityMinor: return *value = capability() % 10, 0;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return *value = SHARED_MOST, 0;
    default: return *value = 0, 0;
  }
}

int cudaMalloc(void **place, size_t bytes) { return allocate(place, bytes); }
int cudaMallocHost(void **place, size_t bytes) { return allocate(place, bytes); }
int cudaHostAlloc(void **place, size_t bytes, unsigned flags) { return allocate(place, bytes); }
int cudaMallocFromPoolAsync(void **place, size_t bytes, void *pool, void *stream) { return allocate(place, bytes); }
int cudaFree(void *place) { return free(place), 0; }
int cudaFreeAsync(void *place, void *stream) { return free(place), 0; }
int cudaFreeHost(void *place) { return free(place), 0; }
int cudaMemcpy(void *to, const void *from, size_t bytes, int kind) { return memcpy(to, from, bytes), 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *s) { return memcpy(to, from, bytes), 0; }
int cudaMemset(void *to, int value, size_t bytes) { return memset(to, value, bytes), 0; }
int cudaMemsetAsync(void *to, int value, size_t bytes, void *stream) { return memset(to, value, bytes), 0; }
int cudaMemGetInfo(size_t *unused, size_t *all) { return *unused = *all = MEMORY, 0; }
int cudaMemPoolCreate(void **pool, void *properties) { return *pool = handle, 0; }

int cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *place) {
  memset(found, 0, sizeof *found);
  found->type = cudaMemoryTypeDevice, found->devicePointer = (void *)place;
  return 0;
}

int cudaStreamCreate(void **stream) { return *stream = handle, 0; }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return *stream = handle, 0; }
int cudaStreamIsCapturing(void *stream, int *status) { return *status = 0, 0; }
int cudaEventCreate(void **event) { return *event = handle, 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { return *event = handle, 0; }
int cudaEventElapsedTime(float *ms, void *start, void *end) { return *ms = 1, 0; }
const char *cudaGetErrorName(int error) { return "none"; }
const char *cudaGetErrorString(int error) { return "none"; }

void **__cudaRegisterFatBinary(void *binary) { return (void **)handle; }
void __cudaRegisterFunction(void **binary, const void *kernel, char *d, const char *name, int t, void *a, void *b,
                            void *c, void *e, int *w) {
  if (num_kernels < MOST_KERNELS) kernels[num_kernels] = kernel, kernel_names[num_kernels++] = name;
}
int __cudaGetKernel(const void **found, const void *kernel) { return *found = kernel, 0; }
int __cudaPopCallConfiguration(void *grid, void *block, size_t *shared, void **stream) {
  return *shared = 0, *stream = handle, 0;
}
int cudaLaunchKernel(const void *kernel) { return launched(kernel); }
int __cudaLaunchKernel(const void *kernel) { return launched(kernel); }
int cudaLaunchKernelExC(const void *config, const void *kernel) { return launched(kernel); }

int cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *kernel) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = BLOCK, found->numRegs = 64, found->binaryVersion = found->ptxVersion = capability();
  return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *kernel, int threads, size_t shared,
                                                           unsigned flags) {
  return *blocks = 2, 0;
}

static int nothing(void) { return 0; }
int cudaGetDriverEntryPointByVersion(const char *symbol, void **found, unsigned version, unsigned long long flags,
                                     int *status) {
  if (status) *status = 0;
  return *found = (void *)nothing, 0;
}
