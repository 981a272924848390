// What CUDA kernels ask of the engine beyond lanes and barriers: asynchronous copies and matrix
// fragments.
#include "../include/cuda/simt_cuda/half.h"
#include "../include/cuda/simt_cuda/matrix.h"

using namespace simt_cuda;
#define EXPORT extern "C" __attribute__((visibility("default")))

// ---- asynchronous copies
// Zero-initialised memory of one thread, for the life of its block.
extern "C" void* simt_lane_slot(size_t bytes);

struct Copy { char* to; const char* from; int bytes, zeros; };
struct Copies {
  Copy copy[512];
  int group_end[64];  // the copies of a committed group end here
  int copies, groups;
};
static Copies& copies() { return *static_cast<Copies*>(simt_lane_slot(sizeof(Copies))); }

EXPORT void simt_copy_async(void* to, const void* from, int bytes, int zeros) {
  Copies& c = copies();
  if (bytes != 4 && bytes != 8 && bytes != 16) {
    simt_fail("cp-async", "a copy is of 4, 8 or 16 bytes", "", 0);
  } else if (c.copies == 512) {
    simt_fail("cp-async", "more than 512 copies of one thread are under way", "", 0);
  } else {
    c.copy[c.copies++] = {static_cast<char*>(to), static_cast<const char*>(from), bytes, zeros};
  }
}
EXPORT void simt_copy_commit() {
  Copies& c = copies();
  if (c.groups == 64)
    simt_fail("cp-async", "more than 64 groups of copies are under way", "", 0);
  else
    c.group_end[c.groups++] = c.copies;
}
EXPORT void simt_copy_wait(int groups_left, void* pc) {
  if (!pc) pc = __builtin_return_address(0);
  Copies& c = copies();
  const int groups = c.groups - groups_left;
  if (groups <= 0) return;
  const int done = c.group_end[groups - 1];
  for (const Copy* p = c.copy; p < c.copy + done; p++) {
    const int read = p->bytes - p->zeros;
    if (read) simt_note_range(p->from, read, 0, pc);
    simt_note_range(p->to, p->bytes, 1, pc);
    memcpy(p->to, p->from, read);
    memset(p->to + read, 0, p->zeros);
  }
  memmove(c.copy, c.copy + done, (c.copies - done) * sizeof(Copy));
  for (int i = groups; i < c.groups; i++) c.group_end[i - groups] = c.group_end[i] - done;
  c.copies -= done;
  c.groups -= groups;
}

// ---- mma.sync
// Lane l holds rows l / 4 and l / 4 + 8; a register holds neighbouring columns.
template <int kind> static double number(uint32_t word, int i) {
  if (kind == F16) return half_to_float(uint16_t(word >> 16 * i));
  if (kind == BF16) return bfloat_to_float(uint16_t(word >> 16 * i));
  return kind == S8 ? int8_t(word >> 8 * i) : uint8_t(word >> 8 * i);
}
template <int a_kind, int b_kind = a_kind> static void multiply(Lane**, int n, Lane** by_lane, int) {
  if (n < 32) return;  // the engine reports the lanes that are absent
  constexpr bool integer = b_kind == S8 || b_kind == U8;
  constexpr int packed = integer ? 4 : 2, depth = 8 * packed;
  double a[16][32], b[32][8];
  for (int l = 0; l < 32; l++) {
    const Product& p = operand<Product>(by_lane[l]);
    const int row = l / 4, column = l % 4 * packed;
    for (int i = 0; i < packed; i++) {
      for (int r = 0; r < 4; r++)
        a[row + r % 2 * 8][column + i + r / 2 * depth / 2] = number<a_kind>(p.a[r], i);
      for (int r = 0; r < 2; r++) b[column + i + r * depth / 2][row] = number<b_kind>(p.b[r], i);
    }
  }
  for (int l = 0; l < 32; l++) {
    Product& p = operand<Product>(by_lane[l]);
    for (int r = 0; r < 4; r++) {
      const int row = l / 4 + r / 2 * 8, column = l % 4 * 2 + r % 2;
      if (integer) {
        int64_t sum = int32_t(p.c[r]);
        for (int k = 0; k < depth; k++) sum += int64_t(a[row][k] * b[k][column]);
        p.d[r] = uint32_t(sum);
      } else {
        float sum = bits<float>(p.c[r]);
        for (int k = 0; k < depth; k++) sum = fmaf(a[row][k], b[k][column], sum);
        p.d[r] = bits<uint32_t>(sum);
      }
    }
  }
}
EXPORT void simt_mma(Product* p, int kind, const char* file, uint32_t line) {
  static const ResolveFn resolve[] = {multiply<F16>, multiply<BF16>, multiply<S8>, multiply<U8>,
                                      multiply<U8, S8>};
  simt_block_coll(p, 0, ~0u, resolve[kind], file, line);
}

// ---- ldmatrix
struct Load { const char* row; uint32_t* out; int count; bool transposed; };
static void load_matrices(Lane**, int n, Lane** by_lane, int) {
  if (n < 32) return;
  const char* row[32];
  for (int l = 0; l < 32; l++) row[l] = operand<Load>(by_lane[l]).row;
  for (int l = 0; l < 32; l++) {
    const Load& load = operand<Load>(by_lane[l]);
    for (int m = 0; m < load.count; m++) {
      uint16_t pair[2];
      for (int i = 0; i < 2; i++) {
        const int r = l / 4, c = l % 4 * 2 + i;
        const char* place = load.transposed ? row[m * 8 + c] + 2 * r : row[m * 8 + r] + 2 * c;
        memcpy(&pair[i], place, 2);
      }
      load.out[m] = pair[0] | uint32_t(pair[1]) << 16;
    }
  }
}
EXPORT void simt_ldmatrix(const void* row, uint32_t* out, int count, bool transposed,
                          const char* file, uint32_t line, void* pc) {
  if (int(lane()) < count * 8) simt_note_range(row, 16, 0, pc);
  Load load{static_cast<const char*>(row), out, count, transposed};
  simt_block_coll(&load, 0, ~0u, load_matrices, file, line);
}
