// The products with a dense P, of both kinds. Included once for each SIMD level.

#include "philox.h"
#include "rows.h"
#include "rademacher.h"
#include "normals.h"
#include "gaussian.h"
#include "shared_layer.h"
