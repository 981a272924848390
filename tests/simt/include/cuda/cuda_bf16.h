#pragma once
#include "simt_cuda/all.h"
