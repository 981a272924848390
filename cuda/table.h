// How a compiled kernel is found and called, for device code (launch.cuh) and the module that launches
// (csrc/bind/cuda.cpp).
#pragma once

namespace hm {

struct Arguments {
  static constexpr int ARRAYS = 24, SIZES = 32;
  const void* array[ARRAYS];  // in order; nullptr for an absent one
  int size[SIZES];            // in order; a float as its bits
};

struct Entry {
  const char* name;    // its C++ text: hadamoe.cuda_plan.Launch.name
  const void* kernel;  // a __global__ function of Arguments
  int arrays, sizes;   // how many it reads
  int threads;         // of a block, at most
};

struct Table {
  const Entry* entries;
  int count;
};

}  // namespace hm
