/* A stand-in for CUDA on a machine without a GPU. It accepts every command and computes nothing.
 *
 * It is preloaded, so its functions take the place of those of the CUDA runtime and cuBLAS, and it is the driver
 * (libcuda.so.1). Device memory is host memory. Copies are made, kernels are not run: their output is whatever was in
 * memory. So everything up to a kernel runs as on a GPU: torch's checks of devices and types, its allocator, Triton's
 * compiler, every launch. Functions that are missing here fail as they do without a driver.
 *
 * STAND_IN is the compute capability of the GPU, without the dot (90: H200).
 */
#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

typedef int Status; /* 0: success, in the runtime, the driver and cuBLAS */

static int capability(void) {
    const char *chosen = getenv("STAND_IN");
    return chosen ? atoi(chosen) : 90;
}

/* Bytes of shared memory that a block may ask for: CUDA C++ programming guide, technical specifications. */
static int shared_memory(void) {
    switch (capability()) {
    case 75: return 64 << 10;
    case 80: case 87: return 163 << 10;
    case 86: case 89: case 120: case 121: return 99 << 10;
    default: return 227 << 10;
    }
}

static const size_t MEMORY = (size_t)139 << 30;

/* ---- the device */

cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return 0; }
cudaError_t cudaGetDevice(int *device) { *device = 0; return 0; }
cudaError_t cudaSetDevice(int device) { return 0; }
cudaError_t cudaDeviceSynchronize(void) { return 0; }
cudaError_t cudaGetLastError(void) { return 0; }
cudaError_t cudaPeekAtLastError(void) { return 0; }
cudaError_t cudaMemGetInfo(size_t *free, size_t *total) { *free = *total = MEMORY; return 0; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
    memset(found, 0, sizeof *found);
    strcpy(found->name, "stand-in");
    found->major = capability() / 10;
    found->minor = capability() % 10;
    found->totalGlobalMem = MEMORY;
    found->multiProcessorCount = 132;
    found->warpSize = 32;
    found->maxThreadsPerBlock = 1024;
    found->maxThreadsPerMultiProcessor = 2048;
    found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024;
    found->maxThreadsDim[2] = 64;
    found->maxGridSize[0] = 0x7fffffff;
    found->maxGridSize[1] = found->maxGridSize[2] = 65535;
    found->sharedMemPerBlock = 48 << 10;
    found->sharedMemPerBlockOptin = shared_memory();
    found->sharedMemPerMultiprocessor = shared_memory() + 1024;
    found->regsPerBlock = found->regsPerMultiprocessor = 65536;
    found->l2CacheSize = 50 << 20;
    found->unifiedAddressing = 1;
    return 0;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    struct cudaDeviceProp is;
    cudaGetDeviceProperties(&is, device);
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = is.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = is.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = is.multiProcessorCount; break;
    case cudaDevAttrWarpSize: *value = is.warpSize; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = is.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = is.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxBlockDimX: *value = is.maxThreadsDim[0]; break;
    case cudaDevAttrMaxBlockDimY: *value = is.maxThreadsDim[1]; break;
    case cudaDevAttrMaxBlockDimZ: *value = is.maxThreadsDim[2]; break;
    case cudaDevAttrMaxGridDimX: *value = is.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: *value = is.maxGridSize[1]; break;
    case cudaDevAttrMaxGridDimZ: *value = is.maxGridSize[2]; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = is.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = is.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = is.sharedMemPerMultiprocessor; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = is.regsPerBlock; break;
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = is.regsPerMultiprocessor; break;
    case cudaDevAttrL2CacheSize: *value = is.l2CacheSize; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = 32; break;
    default: *value = 0;
    }
    return 0;
}

/* ---- memory: never freed, as torch's allocator keeps what it has; pages that are never written cost nothing */

cudaError_t cudaMalloc(void **memory, size_t bytes) {
    const size_t page = 4096;
    char *found = calloc(1, bytes + page);
    *memory = found + page - (size_t)found % page;
    return found ? 0 : cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void *memory) { return 0; }
cudaError_t cudaHostAlloc(void **memory, size_t bytes, unsigned flags) { *memory = malloc(bytes); return 0; }
cudaError_t cudaFreeHost(void *memory) { free(memory); return 0; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *memory) {
    memset(found, 0, sizeof *found);
    return 0;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    if (kind != cudaMemcpyDeviceToDevice) memmove(to, from, bytes); /* that would be a kernel's work */
    return 0;
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) { return 0; }

/* ---- streams, events, launches */

cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return 0; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) { *status = 0; return 0; }
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **before, const cudaGraphEdgeData **edges,
                                     size_t *count) {
    *status = 0;
    return 0;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { *event = (cudaEvent_t)1; return 0; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return 0; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) { return 0; }
cudaError_t cudaEventQuery(cudaEvent_t event) { return 0; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return 0; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) { *ms = 1; return 0; }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return 0; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *kernel, int threads,
                                                                   size_t shared, unsigned flags) {
    *blocks = 1;
    return 0;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *kernel) {
    memset(found, 0, sizeof *found);
    found->ptxVersion = found->binaryVersion = capability();
    found->maxThreadsPerBlock = 1024;
    found->maxDynamicSharedSizeBytes = shared_memory();
    return 0;
}
Status __cudaLaunchKernel(void) { return 0; }
cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t stream) {
    return 0;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *launch, const void *kernel, void **args) { return 0; }

/* ---- the driver, for kernels that Triton compiled; functions that ignore their arguments declare none */

Status cuDriverGetVersion(int *version) { *version = 13000; return 0; }
Status cuDeviceGet(int *device, int number) { *device = 0; return 0; }
Status cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
Status cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
Status cuDeviceGetAttribute(int *value, int attribute, int device) {
    return cudaDeviceGetAttribute(value, attribute, device); /* the numbers are the runtime's */
}
Status cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
Status cuCtxSetCurrent(void) { return 0; }
Status cuCtxGetLimit(void) { return 0; }
Status cuCtxSetLimit(void) { return 0; }
Status cuPointerGetAttribute(void *value, int attribute, void *memory) { *(void **)value = memory; return 0; }
Status cuModuleLoad(void **module, const char *file) { *module = (void *)1; return 0; }
Status cuModuleLoadData(void **module, const void *code) { *module = (void *)1; return 0; }
Status cuModuleUnload(void *module) { return 0; }
Status cuModuleGetFunction(void **kernel, void *module, const char *name) { *kernel = (void *)1; return 0; }
Status cuFuncGetAttribute(int *value, int attribute, void *kernel) { *value = 0; return 0; }
Status cuFuncSetAttribute(void *kernel, int attribute, int value) { return 0; }
Status cuFuncSetCacheConfig(void *kernel, int config) { return 0; }
Status cuLaunchKernel(void) { return 0; }
Status cuLaunchKernelEx(void) { return 0; }
Status cuGetErrorString(int error, const char **text) { *text = "not known to the stand-in"; return 0; }
Status cuGetProcAddress_v2(const char *name, void **found, int version, unsigned long flags, void *status) {
    *found = NULL;
    return 500; /* not found */
}

/* ---- cuBLAS */

Status cublasCreate_v2(void **handle) { *handle = (void *)1; return 0; }
Status cublasSetStream_v2(void *handle, void *stream) { return 0; }
Status cublasSetWorkspace_v2(void *handle, void *memory, size_t bytes) { return 0; }
Status cublasGetMathMode(void *handle, int *mode) { *mode = 0; return 0; }
Status cublasSetMathMode(void *handle, int mode) { return 0; }
Status cublasGemmEx(void) { return 0; }
Status cublasGemmStridedBatchedEx(void) { return 0; }
Status cublasSgemm_v2(void) { return 0; }
Status cublasSgemmStridedBatched(void) { return 0; }
Status cublasLtCreate(void **handle) { *handle = (void *)1; return 0; }
Status cublasLtMatmul(void) { return 0; }
Status cublasLtMatmulAlgoGetHeuristic(void *handle, void *product, void *a, void *b, void *c, void *d, void *preference,
                                      int wanted, void *results, int *found) {
    memset(results, 0, 96);
    *found = 1;
    return 0;
}
