#pragma once
#include "freemerge/dtype.h"
#include "freemerge/isa.h"

// whether no element is infinite or NaN
FREEMERGE_OP(bool, all_finite, const Source& array, std::size_t n)
