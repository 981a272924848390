// attention: in proj[b,t,w] f32|bf16|f16 (q and gate interleaved by head, k, v: w = 2*h*d + 2*g*d), q_norm
// f32[d], k_norm f32[d], cos f32[b,t,r], sin f32[b,t,r], mask? bool|u8[b,t,n]; out y[b,t,m] f32 or proj's
// dtype, m = h*d, keys and values f32|bf16|f16[b,g,c,d], both read and written at past..past+t;
// ints h, past; floats eps.
#include "attention_plan.h"

#include <math.h>

#include <algorithm>

#include "../core/parts.h"
#include "../core/pool.h"
#include "../core/scratch.h"
#include "ops.h"

namespace hm {
namespace {

constexpr int64_t kTileRows = 128;  // their scores, sums and a block of keys stay in the second-level cache

// For every query where its keys end, and per sequence where the first one is and where tokens go.
void see(const AttentionTask& t, int64_t* start, int64_t* limit, int64_t* at, int64_t* skip) {
  for (int64_t b = 0; b < t.batch; ++b) {
    start[b] = t.mask ? t.past + t.tokens : 0;
    at[b] = t.past;
    skip[b] = 0;
    for (int64_t i = 0; i < t.tokens; ++i) {
      int64_t& end = limit[b * t.tokens + i];
      end = t.past + i + 1;
      if (!t.mask) continue;
      const uint8_t* row = t.mask + (b * t.stride + i) * t.mask_width;
      int64_t first = 0;
      for (end = t.past + t.tokens; end > 0 && !row[end - 1];) --end;
      while (first < end && !row[first]) ++first;
      if (end > 0) start[b] = std::min(start[b], first);
    }
  }
}

AttentionPart part_of(Scratch& scratch, int64_t rows, int64_t width) {
  return {scratch.floats(rows * width), scratch.floats(rows), scratch.floats(rows), nullptr};
}

AttentionWork work_of(Scratch& scratch, const AttentionTask& t, int64_t rows) {
  float *scores = scratch.floats(rows * kBlockKeys), *copy = scratch.floats(kBlockKeys * t.width);
  return {scores, copy, part_of(scratch, rows, t.width), part_of(scratch, rows, t.width)};
}

}  // namespace

void check_projected(Contract& c, const DLTensor* norms, const DLTensor* angles, AttentionTask& task) {
  const char *norm_names[] = {"q_norm", "k_norm"}, *angle_names[] = {"cos", "sin"};
  for (int i = 0; i < 2; ++i) c.shape(norm_names[i], norms[i], "d").dtype(norm_names[i], norms[i], "f32");
  const int64_t d = c['d'];
  c.require(d > 0 && d <= kMostHeadDim, "q_norm",
            "has d=" + std::to_string(d) + ", needs 1.." + std::to_string(kMostHeadDim));
  for (int i = 0; i < 2; ++i) c.shape(angle_names[i], angles[i], "btr").dtype(angle_names[i], angles[i], "f32");
  c.require(c['r'] % 2 == 0 && c['r'] <= d, "cos",
            "has r=" + std::to_string(c['r']) + ", needs an even number up to " + std::to_string(d));
  task.q_norm = reinterpret_cast<const float*>(data(norms[0]));
  task.k_norm = reinterpret_cast<const float*>(data(norms[1]));
  task.cos = reinterpret_cast<const float*>(data(angles[0]));
  task.sin = reinterpret_cast<const float*>(data(angles[1]));
  task.batch = c['b'];
  task.tokens = task.stride = task.proj_stride = c['t'];
  task.d = d;
  task.rot = c['r'];
  task.scale = float(1 / sqrt(double(d)));
  task.width = (d + 15) / 16 * 16;
}

void check_heads(const Contract& c, int64_t heads, double eps, AttentionTask& task) {
  c.require(heads > 0 && heads <= 1 << 20 && c['g'] > 0 && heads % c['g'] == 0, "heads",
            "is " + std::to_string(heads) + ", needs a multiple of g=" + std::to_string(c['g']));
  c.require(eps >= 0 && eps < 1, "eps", "is " + std::to_string(eps) + ", needs 0 <= eps < 1");
  task.heads = heads;
  task.kv_heads = c['g'];
  task.proj_width = 2 * (heads + c['g']) * c['d'];
  task.eps = float(eps);
}

void check_attention(Contract& c, const DLTensor* norms, const DLTensor* angles, const DLTensor& mask,
                     const DLTensor* caches, int64_t heads, int64_t past, double eps, AttentionTask& task) {
  const char* cache_names[] = {"keys", "values"};
  check_projected(c, norms, angles, task);
  for (int i = 0; i < 2; ++i)
    c.shape(cache_names[i], caches[i], "bgcd").dtype(cache_names[i], caches[i], "f32 bf16 f16");
  c.dtype("values", caches[1], dtype_name(caches[0].dtype));
  check_heads(c, heads, eps, task);
  c.require(past >= 0 && past <= c['c'] - c['t'], "past",
            "is " + std::to_string(past) + ", needs 0.." + std::to_string(c['c'] - c['t']) + " for " +
                std::to_string(c['t']) + " tokens in a cache of " + std::to_string(c['c']));
  if (present(mask)) {
    c.shape("mask", mask, "btn").dtype("mask", mask, "bool u8");
    c.require(c['n'] >= past + c['t'], "mask",
              "has n=" + std::to_string(c['n']) + ", needs at least " + std::to_string(past + c['t']));
    task.mask = reinterpret_cast<const uint8_t*>(data(mask));
    task.mask_width = c['n'];
  }
  task.keys = data(caches[0]);
  task.values = data(caches[1]);
  task.cache_dtype = storage(caches[0]);
  task.capacity = c['c'];
  task.past = past;
}

void run_attention(const AttentionTask& all, int64_t first, int64_t count, bool local) {
  AttentionTask t = all;
  t.tokens = count;
  t.past += first;
  t.cos += first * t.rot;
  t.sin += first * t.rot;
  if (t.mask) t.mask += first * t.mask_width;
  if (local) {
    t.proj_stride = count;
  } else {
    t.proj = static_cast<const char*>(t.proj) + first * t.proj_width * scale_bytes(t.proj_dtype);
    t.y = static_cast<char*>(t.y) + first * t.heads * t.d * scale_bytes(t.y_dtype);
  }
  const int64_t group = t.heads / t.kv_heads;
  Scratch scratch;
  t.q = scratch.floats((t.batch * t.tokens * t.heads + 3) * t.width);
  int64_t *start = scratch.take<int64_t>(t.batch), *limit = scratch.take<int64_t>(t.batch * t.tokens);
  int64_t *at = scratch.take<int64_t>(t.batch), *skip = scratch.take<int64_t>(t.batch);
  see(t, start, limit, at, skip);
  t.start = start;
  t.limit = limit;
  t.at = at;
  t.skip = skip;
  const Kernels& kernel = kernels();
  parallel_range(t.batch * t.tokens, 4, [&](int64_t begin, int64_t end) { kernel.attention_prepare(t, begin, end); });

  t.tile_tokens = std::min(t.tokens, std::max<int64_t>(1, kTileRows / group));
  const int64_t tiles = t.batch * t.kv_heads * ((t.tokens + t.tile_tokens - 1) / t.tile_tokens);
  const int64_t rows = (t.tile_tokens * group + 3) / 4 * 4;
  t.blocks = (t.past + t.tokens + kBlockKeys - 1) / kBlockKeys;
  if (tiles >= 4 * thread_count() || t.blocks == 1) {
    parallel(uint32_t(tiles), [&](uint32_t u) {
      Scratch mine;
      kernel.attention_tiles(t, work_of(mine, t, rows), u, u + 1);
    });
    return;
  }
  AttentionPart* parts = scratch.take<AttentionPart>(tiles * t.blocks);
  for (int64_t i = 0; i < tiles * t.blocks; ++i) parts[i] = part_of(scratch, rows, t.width);
  parallel_range(tiles * t.blocks, 1, [&](int64_t begin, int64_t end) {
    Scratch mine;
    kernel.attention_parts(t, work_of(mine, t, rows), parts, begin, end);
  });
  parallel_range(tiles, 4, [&](int64_t begin, int64_t end) {
    Scratch mine;
    kernel.attention_join(t, work_of(mine, t, rows), parts, begin, end);
  });
}

const char* op_attention(const hm_args* args) {
  return guarded([&] {
    Contract c("attention");
    c.arity(*args, 6, false, 3, 2, 1);
    const DLTensor *in = args->in, *out = args->out;
    AttentionTask task{};
    c.shape("proj", in[0], "btw").dtype("proj", in[0], "f32 bf16 f16");
    check_attention(c, in + 1, in + 3, in[5], out + 1, args->ints[0], args->ints[1], args->floats[0], task);
    c.require(c['w'] == task.proj_width, "proj",
              "has w=" + std::to_string(c['w']) + ", needs " + std::to_string(task.proj_width));
    c.bind("y", 'm', task.heads * task.d).shape("y", out[0], "btm");
    const std::string narrow = dtype_name(in[0].dtype);
    c.dtype("y", out[0], narrow == "f32" ? narrow : "f32 " + narrow);
    task.proj = data(in[0]);
    task.proj_dtype = storage(in[0]);
    task.y = data(out[0]);
    task.y_dtype = storage(out[0]);
    if (args->check || !task.batch || !task.tokens) return;
    const int64_t chunk = attention_chunk(task.batch, task.tokens);
    for (int64_t i = 0; i < task.tokens; i += chunk)
      run_attention(task, i, std::min(chunk, task.tokens - i), false);
  });
}

}  // namespace hm
