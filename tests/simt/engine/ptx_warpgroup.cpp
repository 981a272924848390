// wgmma of signed bytes, A in registers: PTX ISA, "Asynchronous warpgroup-level matrix instructions".
//
// Each warp of a group makes its own 16 rows, so a warp is all that meets here. Results come with the wait: until then
// the sums' registers hold nothing. B is read when it is multiplied and looked at again at the wait: who has written
// there in between is found.
#include "ptx_machine.h"

extern "C" void* simt_warpgroup_slot(size_t bytes);

namespace ptx {
namespace {
constexpr int MOST = 128;  // registers of sums
constexpr uint32_t NOTHING = 0x7fedcba9;

struct Pending {
  uint32_t* to;
  uint32_t value;
  int group;
};
struct Piece {
  const char* at;
  char bytes[16];
  int group;
};
// Of one lane: what has not been waited for.
struct Waiting {
  Pending sum[4 * MOST];
  Piece piece[512];
  int sums, pieces, groups;  // groups: committed so far
  bool fenced;
};
Waiting& waiting() { return *static_cast<Waiting*>(simt_warpgroup_slot(sizeof(Waiting))); }

// Where 16 bytes of a K-major matrix lie, 128-byte swizzle: lines of 128 bytes, eight of them a pattern; bits 4 to 6 of
// an address are exchanged by bits 7 to 9.
struct Descriptor {
  uint64_t bits;
  bool known() const {
    return bits >> 62 == 1 && (bits >> 49 & 7) == 0 && (bits >> 32 & 0x3fff) << 4 == 1024;
  }
  const char* piece(int row, int half) const {
    const uint64_t base = uint64_t(simt_arena_base());
    const uint64_t start = base + ((((bits & 0x3fff) << 4) - base) & 0x3ffff);
    const uint64_t at = start + row / 8 * 1024 + row % 8 * 128 + 16 * half;
    return reinterpret_cast<const char*>(at ^ (at >> 7 & 7) << 4);
  }
};

struct Product {
  Descriptor b;
  int columns;
  uint32_t a[4], sum[MOST];
};
void multiply(Lane**, int n, Lane** by_lane, int) {
  if (n < 32) return;  // the engine reports the lanes that are absent
  int8_t a[16][32];
  for (int l = 0; l < 32; l++) {
    const Product& p = operand<Product>(by_lane[l]);
    for (int r = 0; r < 4; r++)
      memcpy(&a[l / 4 + r % 2 * 8][l % 4 * 4 + r / 2 * 16], &p.a[r], 4);
  }
  for (int l = 0; l < 32; l++) {
    Product& p = operand<Product>(by_lane[l]);
    for (int i = 0; i < p.columns / 2; i++) {
      const int row = l / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + l % 4 * 2 + i % 2;
      for (int k = 0; k < 32; k++)
        p.sum[i] += uint32_t(a[row][k] * int8_t(p.b.piece(column, k / 16)[k % 16]));
    }
  }
}

// The sums' registers as they will be.
uint32_t sum_of(const Waiting& w, const uint32_t* to, uint32_t now) {
  for (int i = 0; i < w.sums; i++)
    if (w.sum[i].to == to) return w.sum[i].value;
  return now;
}

bool multiply_async(const Machine& m, const Instruction& i, Waiting& w) {
  const std::string& shape = i.parts.size() > 4 ? i.parts[4] : i.name();
  const int columns = shape.rfind("m64n", 0) == 0 ? atoi(shape.c_str() + 4) : 0;
  if (!i.has("aligned") || shape != "m64n" + std::to_string(columns) + "k32") return false;
  if (!i.has("s32") || i.parts.size() != 8 || i.parts[6] != "s8" || i.parts[7] != "s8") return false;
  if (columns < 8 || columns > 256 || columns % 8 || i.operands.size() != 4) return false;
  const Operand &sums = i.operands[0], &a = i.operands[1];
  if (int(sums.list.size()) != columns / 2 || a.list.size() != 4) return false;
  Product p{{m.get(i.operands[2])}, columns, {}, {}};
  if (!p.b.known()) return false;
  if (!w.fenced) simt_fail("wgmma-fence", "registers since the last wait are not fenced", m.file, m.line);
  if (w.sums + columns / 2 > 4 * MOST || w.pieces + 2 * columns / 32 + 2 > 512)
    return simt_fail("wgmma-wait", "too many products are under way", m.file, m.line), true;
  uint32_t* to[MOST];
  for (int k = 0; k < columns / 2; k++) {
    to[k] = static_cast<uint32_t*>(m.operands[sums.list[k].reg].output);
    if (m.get(i.operands[3])) p.sum[k] = sum_of(w, to[k], uint32_t(m.get(sums.list[k])));
  }
  for (int k = 0; k < 4; k++) p.a[k] = uint32_t(m.get(a.list[k]));
  for (int k = lane(); k < 2 * columns; k += 32) {
    Piece& piece = w.piece[w.pieces++];
    piece.at = p.b.piece(k / 2, k % 2);
    piece.group = w.groups;
    simt_note_range(piece.at, 16, 0, m.pc);
    memcpy(piece.bytes, piece.at, 16);
  }
  simt_block_coll(&p, 0, ~0u, multiply, m.file, m.line);
  for (int k = 0; k < columns / 2; k++) {
    int at = 0;
    while (at < w.sums && w.sum[at].to != to[k]) at++;
    if (at == w.sums) w.sums++;
    w.sum[at] = {to[k], p.sum[k], w.groups};
    m.set(sums.list[k], NOTHING);
  }
  return true;
}

void wait(const Machine& m, Waiting& w, int groups_left) {
  const int done = w.groups - groups_left;
  int left = 0;
  for (int i = 0; i < w.sums; i++) {
    if (w.sum[i].group < done) *w.sum[i].to = w.sum[i].value;
    else w.sum[left++] = w.sum[i];
  }
  w.sums = left, left = 0;
  for (int i = 0; i < w.pieces; i++) {
    const Piece& p = w.piece[i];
    if (p.group >= done) {
      w.piece[left++] = p;
      continue;
    }
    simt_note_range(p.at, 16, 0, m.pc);
    if (memcmp(p.at, p.bytes, 16)) simt_fail("wgmma-overwritten", "shared memory changed before the wait", m.file, m.line);
  }
  w.pieces = left;
  w.fenced = false;
}

bool warpgroup(const Machine& m, const Instruction& i) {
  Waiting& w = waiting();
  if (i.has("mma_async")) return multiply_async(m, i, w);
  if (i.has("fence")) return w.fenced = true;
  if (i.has("commit_group")) return ++w.groups;
  if (!i.has("wait_group") || i.operands.size() != 1) return false;
  wait(m, w, int(m.get(i.operands[0])));
  return true;
}
}  // namespace

Entries warpgroup_instructions() { return {{"wgmma", {warpgroup, 0}}}; }
}  // namespace ptx
