/* In place of the NVIDIA driver and of NVRTC: has what hosts/kernels/cuda looks for there, and tells of a GPU whose every
 * number is 0: too old for the kernels. Of these it runs one, which such GPUs have too, and not as it is written: of a
 * product's halves gate_rows gives the second alone. */
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
HAS cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  *kernel = library;
  return strcmp(name, "gate_rows");
}
DOES_NOTHING(cuKernelSetAttribute)
CANT(cuMemAlloc_v2)
CANT(cuMemsetD8Async)
HAS cuLaunchKernel(void* kernel, unsigned across, unsigned rows, unsigned layers, unsigned threads, unsigned y,
                   unsigned z, unsigned shared_bytes, void* stream, void** arguments) {
  const unsigned short* both = *(const unsigned short**)arguments[0];
  unsigned short* into = *(unsigned short**)arguments[1];
  const unsigned inner = *(const unsigned*)arguments[2];
  (void)kernel, (void)across, (void)layers, (void)threads, (void)y, (void)z, (void)shared_bytes, (void)stream;
  for (unsigned row = 0; row < rows; ++row)
    memcpy(into + row * inner, both + (2 * row + 1) * inner, inner * sizeof(*both));
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
