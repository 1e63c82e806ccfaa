/* In place of the NVIDIA driver and of NVRTC: has what hosts/kernels/cuda looks for there, and can't do any of it but tell
 * of a GPU, whose every number is 0: too old for the kernels. */
#define CANT(name) \
  __attribute__((visibility("default"))) int name(void) { return 1; }

CANT(cuGetErrorString)
__attribute__((visibility("default"))) int cuCtxGetDevice(int* device) {
  *device = 0;
  return 0;
}
__attribute__((visibility("default"))) int cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)attribute, (void)device;
  *value = 0;
  return 0;
}
CANT(cuLibraryLoadData)
CANT(cuLibraryGetKernel)
CANT(cuKernelSetAttribute)
CANT(cuMemAlloc_v2)
CANT(cuMemsetD8Async)
CANT(cuLaunchKernel)
CANT(nvrtcCreateProgram)
CANT(nvrtcCompileProgram)
CANT(nvrtcDestroyProgram)
CANT(nvrtcGetProgramLogSize)
CANT(nvrtcGetProgramLog)
CANT(nvrtcGetCUBINSize)
CANT(nvrtcGetCUBIN)
CANT(nvrtcGetPTXSize)
CANT(nvrtcGetPTX)
