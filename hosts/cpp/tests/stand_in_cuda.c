/* In place of the NVIDIA driver and of NVRTC: has what hosts/kernels/cuda looks for there, and can't do any of it. */
#define CANT(name) \
  __attribute__((visibility("default"))) int name(void) { return 1; }

CANT(cuGetErrorString)
CANT(cuCtxGetDevice)
CANT(cuDeviceGetAttribute)
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
