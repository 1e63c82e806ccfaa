/* In place of the NVIDIA driver and of NVRTC: has what hosts/kernels/cuda looks for there, and tells of a GPU whose
 * every number is 0: too old for most kernels. It runs those that such GPUs have too, one of them not as it is written:
 * of a product's halves gate_rows gives the second alone. */
#include <string.h>

#define HAS __attribute__((visibility("default"))) int
#define CANT(name) \
  HAS name(void) { return 1; }
#define DOES_NOTHING(name) \
  HAS name(void) { return 0; }

CANT(cuGetErrorString)
HAS cuCtxGetDevice(int* device) {
  *device = 0;
  return 0;
}
HAS cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)attribute, (void)device;
  *value = 0;
  return 0;
}
HAS cuLibraryLoadData(void** library, const void* code) {
  *library = (void*)code;
  return 0;
}
static const char* const kernels[] = {"gate_rows", "branch_mask", "stream_embedding"};
HAS cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  (void)library;
  for (int index = 0; index < 3; ++index) {
    *kernel = (void*)&kernels[index];
    if (strcmp(name, kernels[index]) == 0) return 0;
  }
  return 1;
}
DOES_NOTHING(cuKernelSetAttribute)
CANT(cuMemAlloc_v2)
CANT(cuMemsetD8Async)
static void gate_rows(unsigned rows, void** arguments) {
  const unsigned short* both = *(const unsigned short**)arguments[0];
  unsigned short* into = *(unsigned short**)arguments[1];
  const unsigned inner = *(const unsigned*)arguments[2];
  for (unsigned row = 0; row < rows; ++row)
    memcpy(into + row * inner, both + (2 * row + 1) * inner, inner * sizeof(*both));
}

static void branch_mask(unsigned rows, void** arguments) {
  const int* slot_branch = *(const int**)arguments[0];
  const int* row_visible = *(const int**)arguments[1];
  const int* row_branch = *(const int**)arguments[2];
  unsigned short* into = *(unsigned short**)arguments[3];
  const int slots = *(const int*)arguments[4];
  for (unsigned row = 0; row < rows; ++row)
    for (int slot = 0; slot < slots; ++slot)
      *into++ = slot < row_visible[row] || slot_branch[slot] == row_branch[row] ? 0 : 0xfb53;
}

static void stream_embedding(unsigned rows, void** arguments) {
  const long long* ids = *(const long long**)arguments[0];
  const unsigned short* embedding = *(const unsigned short**)arguments[1];
  const unsigned short* streams = *(const unsigned short**)arguments[2];
  unsigned short* into = *(unsigned short**)arguments[3];
  const int width = *(const int*)arguments[4], vocabulary = *(const int*)arguments[5];
  for (unsigned row = 0; row < rows; ++row) {
    const long long past = ids[row] - vocabulary;
    memcpy(into + row * width, past < 0 ? embedding + row * width : streams + past * width, width * sizeof(*into));
  }
}

HAS cuLaunchKernel(void* kernel, unsigned across, unsigned rows, unsigned layers, unsigned threads, unsigned y,
                   unsigned z, unsigned shared_bytes, void* stream, void** arguments) {
  static void (*const runs[])(unsigned, void**) = {gate_rows, branch_mask, stream_embedding};
  (void)across, (void)layers, (void)threads, (void)y, (void)z, (void)shared_bytes, (void)stream;
  runs[(const char* const*)kernel - kernels](rows, arguments);
  return 0;
}

HAS nvrtcCreateProgram(void** program) {
  *program = (void*)program;
  return 0;
}
DOES_NOTHING(nvrtcCompileProgram)
DOES_NOTHING(nvrtcDestroyProgram)
CANT(nvrtcGetProgramLogSize)
CANT(nvrtcGetProgramLog)
HAS nvrtcGetCUBINSize(void* program, unsigned long* size) {
  (void)program;
  *size = 1;
  return 0;
}
HAS nvrtcGetCUBIN(void* program, char* code) {
  (void)program;
  *code = 0;
  return 0;
}
CANT(nvrtcGetPTXSize)
CANT(nvrtcGetPTX)
