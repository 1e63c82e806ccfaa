// What a test program's environment says.
#pragma once

#include <cstdlib>

// Sets MIRROR_KERNELS; null takes it away.
inline void choose(const char* kernels) {
#ifdef _WIN32
  _putenv_s("MIRROR_KERNELS", kernels == nullptr ? "" : kernels);
#else
  kernels == nullptr ? unsetenv("MIRROR_KERNELS") : setenv("MIRROR_KERNELS", kernels, 1);
#endif
}
