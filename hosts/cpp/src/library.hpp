// Libraries that are looked for at run time: nothing links to them, and a host that doesn't need one lacks it.
#pragma once

#include <initializer_list>

namespace mirror {

// The first of some libraries that the process has, else the first that can be loaded; null if none can.
void* find_library(std::initializer_list<const char*> names);

// A function of a library by its name; null if it has none.
void* library_function(void* library, const char* name);

}  // namespace mirror
