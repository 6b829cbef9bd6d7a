// A float16 as a float32, for processors without an instruction for it.

#pragma once

#include <cstdint>
#include <cstring>

inline float half_to_float(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7FFF;
    uint32_t bits = rest << 13;
    float value;
    if (rest >= 0x7C00) {  // infinity or NaN
        bits += 0x70000000u;
    } else {               // a denormal number becomes normal, as the factor is exact
        memcpy(&value, &bits, sizeof value);
        value *= 0x1p112f;
        memcpy(&bits, &value, sizeof bits);
    }
    bits |= sign;
    memcpy(&value, &bits, sizeof value);
    return value;
}
