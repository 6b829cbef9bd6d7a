// The products with P, of both kinds. Included once for each SIMD level.

#include "philox.h"
#include "rademacher.h"
#include "normals.h"
#include "gaussian.h"
#include "shared_layer.h"
