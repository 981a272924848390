// CUDA C++ for this machine: every CUDA header of this folder is this one.
#pragma once
#include "types.h"
#include "warp.h"
#include "math.h"
#include "half.h"
#include "memory.h"
#include "matrix.h"
#include "ptx.h"
#include "call.h"
