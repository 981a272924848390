// Metal's standard library for a kernel that clang compiles as C++ for OpenCL 2021. That mode brings
// what Metal has too: address spaces, vectors with swizzles, native half, float-only literals.
// README.md says how to add a builtin.
#pragma once
#include "language.h"
#include "traits.h"
#include "vectors.h"
#include "limits.h"
#include "math.h"
#include "common.h"
#include "integer.h"
#include "collective.h"
#include "simdgroup.h"
#include "matrix.h"
#include "atomic.h"
#include "inputs.h"
#include "mlx.h"
