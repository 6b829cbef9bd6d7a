// What the library is, for the module that loads it: the version of its interface, and its SIMD levels.
//
// All of it is a plain C interface: no Python header is needed to build it, and a caller holds no lock meanwhile.

#include "levels.h"

namespace {

struct Level {
    const char* name;
    bool available;
};

}  // namespace

// What this library and its callers must agree on: the functions that it exports, and the structures that they take.
EXPORT int gradstore_interface() { return 7; }

// The name of level number `index`, fastest first; null after the last. `available` says whether this process may use it.
EXPORT const char* gradstore_level(int index, int* available) {
#define LEVEL(name) {#name, has_##name()},
    static const Level levels[] = {EACH_LEVEL(LEVEL)};
    if (index < 0 || index >= (int)(sizeof levels / sizeof *levels)) return nullptr;
    *available = levels[index].available;
    return levels[index].name;
}
