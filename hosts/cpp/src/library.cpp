#include "library.hpp"

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace mirror {
namespace {

#ifdef _WIN32
void* loaded_library(const char* name) { return GetModuleHandleA(name); }
void* load_library(const char* name) { return LoadLibraryA(name); }
#else
void* loaded_library(const char* name) { return dlopen(name, RTLD_NOW | RTLD_NOLOAD); }
void* load_library(const char* name) { return dlopen(name, RTLD_NOW); }
#endif

}  // namespace

void* find_library(std::initializer_list<const char*> names) {
  for (const auto look : {loaded_library, load_library})
    for (const char* name : names)
      if (void* library = look(name)) return library;
  return nullptr;
}

void* library_function(void* library, const char* name) {
#ifdef _WIN32
  return reinterpret_cast<void*>(GetProcAddress(static_cast<HMODULE>(library), name));
#else
  return dlsym(library, name);
#endif
}

}  // namespace mirror
