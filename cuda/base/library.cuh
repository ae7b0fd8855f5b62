// Libraries that are looked for at run time.
#pragma once

#if defined(_WIN32)
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace subspan::cuda {

/// A path, or a name that the loader knows; `loaded_only`: only if it is in the process already. Null where it cannot be had. Never closed.
inline void *open_library(const char *path, bool loaded_only) {
#if defined(_WIN32)
    return loaded_only ? static_cast<void *>(GetModuleHandleA(path)) : static_cast<void *>(LoadLibraryA(path));
#else
    return dlopen(path, RTLD_LAZY | RTLD_LOCAL | (loaded_only ? RTLD_NOLOAD : 0));
#endif
}

/// f = the function of that name; whether there is one.
template <class F> bool find(void *library, const char *name, F *&f) {
#if defined(_WIN32)
    f = reinterpret_cast<F *>(GetProcAddress(static_cast<HMODULE>(library), name));
#else
    f = reinterpret_cast<F *>(dlsym(library, name));
#endif
    return f != nullptr;
}

} // namespace subspan::cuda
