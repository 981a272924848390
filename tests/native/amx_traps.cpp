// AMX on processors without it: its instructions trap as illegal, and a handler does what Intel's manual says they do.
// So the machine code that ships is what runs, down to the 64 bytes ldtilecfg finds in memory. Stricter than a
// processor: tiles may be configured only once before they are released. Takes the place of csrc/cpu/amx_usable.cpp;
// where the processor has AMX nothing traps.
#include "../../csrc/cpu/amx.h"

namespace hm {
bool amx_of_this_processor();
}
#define amx_usable amx_of_this_processor
#include "../../csrc/cpu/amx_usable.cpp"
#undef amx_usable

#if defined(__x86_64__) && defined(__linux__)
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>

namespace {

struct Tiles {
  bool configured;
  int rows[8], bytes[8];
  uint8_t data[8][16][64];
};
thread_local Tiles tiles;

[[noreturn]] void refuse(const char* why) {
  dprintf(2, "AMX: %s\n", why);
  _exit(3);
}
void require(bool holds, const char* what) {
  if (!holds) refuse(what);
}

// A three-byte VEX instruction of map 0F38.
struct Instruction {
  const uint8_t* at;  // behind the opcode
  const greg_t* general;
  bool r, x, b;  // fourth bits of register numbers
  int v, prefix, opcode, mod, reg, rm;

  bool decode(const uint8_t* p, const greg_t* registers) {
    general = registers;
    if (p[0] != 0xc4 || (p[1] & 31) != 2 || (p[2] & 0x84)) return false;  // W and L are 0
    r = !(p[1] & 128), x = !(p[1] & 64), b = !(p[1] & 32);
    v = ~p[2] >> 3 & 15, prefix = p[2] & 3, opcode = p[3];
    mod = p[4] >> 6, reg = p[4] >> 3 & 7, rm = p[4] & 7;
    at = p + 5;
    return opcode == 0x49 || opcode == 0x4b || opcode == 0x5e;
  }
  int64_t general_register(int number) const {
    constexpr int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return general[kOrder[number]];
  }
  // The address and the register that tile instructions use as a stride; ends behind the operand.
  uint8_t* address(int64_t* stride) {
    int64_t place = 0;
    int base = rm;
    *stride = 0;
    if (rm == 4) {
      const int sib = *at++, index = (sib >> 3 & 7) + 8 * x;
      base = sib & 7;
      if (index != 4) *stride = general_register(index) << (sib >> 6);
    }
    const bool absolute = mod == 0 && base == 5;
    if (!absolute) place += general_register(base + 8 * b);
    if (mod == 1) place += int8_t(*at++);
    if (mod == 2 || absolute) {
      int32_t offset;
      memcpy(&offset, at, 4);
      at += 4;
      place += offset;
      if (absolute && rm != 4) place += reinterpret_cast<int64_t>(at);  // relative to the next instruction
    }
    return reinterpret_cast<uint8_t*>(place);
  }
};

void configure(const uint8_t* p) {
  require(!tiles.configured, "configured twice");
  memset(&tiles, 0, sizeof tiles);
  require(p[0] == 1 && p[1] == 0, "ldtilecfg: palette 1 and row 0");
  for (int i = 2; i < 64; ++i)
    require(p[i] == 0 || (i >= 16 && i < 32) || (i >= 48 && i < 56), "ldtilecfg: reserved bytes are 0");
  for (int t = 0; t < 8; ++t) {
    tiles.bytes[t] = p[16 + 2 * t] + 256 * p[17 + 2 * t];
    tiles.rows[t] = p[48 + t];
    require(tiles.bytes[t] <= 64 && tiles.rows[t] <= 16, "ldtilecfg: a tile has 16 rows of 64 bytes");
    require(!tiles.bytes[t] == !tiles.rows[t], "ldtilecfg: rows and bytes of a tile are both 0 or neither");
  }
  tiles.configured = true;
}

void move(Instruction& i, bool store) {
  int64_t stride;
  require(i.rm == 4 && i.mod != 3, "tile load or store: an address with an index");
  require(tiles.configured && !i.r && i.v == 0 && tiles.rows[i.reg] > 0, "tile load or store: a configured tile");
  uint8_t* p = i.address(&stride);
  for (int row = 0; row < tiles.rows[i.reg]; ++row, p += stride) {
    if (store)
      memcpy(p, tiles.data[i.reg][row], size_t(tiles.bytes[i.reg]));
    else
      memcpy(tiles.data[i.reg][row], p, size_t(tiles.bytes[i.reg]));
  }
  if (store) return;
  for (int row = 0; row < 16; ++row)  // what the shape leaves out becomes 0
    for (int k = row < tiles.rows[i.reg] ? tiles.bytes[i.reg] : 0; k < 64; ++k) tiles.data[i.reg][row][k] = 0;
}

// tdpbusd c, a, b: c[m][n] += a[m][4k..] * b[k][4n..], a unsigned, b signed.
void multiply(const Instruction& i) {
  const int c = i.reg, a = i.rm, b = i.v;
  require(i.mod == 3 && !i.r && !i.b && b < 8 && c != a && c != b && a != b, "tdpbusd: three tiles");
  require(tiles.configured && tiles.rows[a] && tiles.rows[b] && tiles.rows[c], "tdpbusd: configured tiles");
  require(tiles.rows[c] == tiles.rows[a] && tiles.bytes[c] == tiles.bytes[b] && tiles.bytes[a] == 4 * tiles.rows[b] &&
              tiles.bytes[c] % 4 == 0,
          "tdpbusd: shapes that fit");
  for (int m = 0; m < tiles.rows[c]; ++m)
    for (int n = 0; n < tiles.bytes[c] / 4; ++n) {
      uint32_t sum;
      memcpy(&sum, &tiles.data[c][m][4 * n], 4);
      for (int k = 0; k < tiles.bytes[a]; ++k)
        sum += uint32_t(int32_t(tiles.data[a][m][k]) * int8_t(tiles.data[b][k / 4][4 * n + k % 4]));
      memcpy(&tiles.data[c][m][4 * n], &sum, 4);
    }
}

void on_illegal(int, siginfo_t*, void* context) {
  greg_t* general = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const uint8_t* at = reinterpret_cast<const uint8_t*>(general[REG_RIP]);
  Instruction i;
  int64_t none;
  if (!i.decode(at, general)) refuse("an illegal instruction that is not AMX's");
  if (i.opcode == 0x49 && i.prefix == 0 && i.mod != 3 && i.reg == 0)
    configure(i.address(&none));
  else if (i.opcode == 0x49 && i.prefix == 0 && i.mod == 3 && i.reg == 0 && i.rm == 0)
    tiles.configured = false;
  else if (i.opcode == 0x4b && (i.prefix == 3 || i.prefix == 2))
    move(i, i.prefix == 2);
  else if (i.opcode == 0x5e && i.prefix == 1)
    multiply(i);
  else
    refuse("an instruction the kernels have no use for");
  general[REG_RIP] = reinterpret_cast<greg_t>(i.at);
}

}  // namespace

bool hm::amx_usable() {
  if (amx_of_this_processor()) return true;
  struct sigaction action {};
  action.sa_sigaction = on_illegal;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  return sigaction(SIGILL, &action, nullptr) == 0;
}
#else
bool hm::amx_usable() { return amx_of_this_processor(); }
#endif
