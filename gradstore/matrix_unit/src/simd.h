// How the compiled parts of this package compile one source for several processors.

#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define BEGIN_TARGET(features) PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define END_TARGET _Pragma("clang attribute pop")
#define WHOLE_REGISTERS ""
#else
#define BEGIN_TARGET(features) _Pragma("GCC push_options") PRAGMA(GCC target(features))
#define END_TARGET _Pragma("GCC pop_options")
#define WHOLE_REGISTERS ",prefer-vector-width=512"
#endif
