// The product with a sparse P. Included once for each SIMD level.

#include "philox.h"
#include "rows.h"
#include "sjlt.h"
