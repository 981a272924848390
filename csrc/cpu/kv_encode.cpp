// kv_encode: in rows f32[p,64,d], signs? f32[d], mean? f32[d], balance? f32[d], scale f32[1]; out pages u8[p,n];
// ints codec, side (0 keys, 1 values).
// kv_decode: in pages u8[p,n], the same; out rows f32[p,64,d].
// kv_scores: in q f32[r,d], pages u8[p,n], signs f32[d], mean? f32[d], balance? f32[d]; out q8 i8[r,d], unit f32[r],
// scores i32[r,t], t = 64 p; ints codec.
#include <math.h>

#include "../core/parts.h"
#include "../core/pool.h"
#include "kv_plan.h"
#include "ops.h"

namespace hm {
namespace {

const float* vector_of(Contract& c, const char* name, const DLTensor& t) {
  if (!present(t)) return nullptr;
  c.shape(name, t, "d").dtype(name, t, "f32");
  return reinterpret_cast<const float*>(data(t));
}

// signs?, mean?, balance? of one side.
void take_vectors(Contract& c, const DLTensor* in, KvSide& side) {
  side.signs = vector_of(c, "signs", in[0]);
  c.require(side.signs || !hm_kv_rotated(side.codec), "signs", "is absent, needs f32[d] for a codec that rotates");
  side.mean = vector_of(c, "mean", in[1]);
  side.balance = vector_of(c, "balance", in[2]);
  c.require((!side.mean && !side.balance) || hm_kv_integer(side.codec), "mean",
            "and balance belong to codecs h2, h3, h4 and h8");
}

void check_finite(const Contract& c, const char* name, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (!isfinite(x[i])) c.fail(name, "has a number that is not finite at " + std::to_string(i));
}

const char* run_codec(const char* name, const hm_args* args, bool encode) {
  return guarded([&] {
    Contract c(name);
    c.arity(*args, 5, false, 1, 2, 0);
    const DLTensor &rows = encode ? args->in[0] : args->out[0], &pages = encode ? args->out[0] : args->in[0];
    c.shape("rows", rows, "pud").dtype("rows", rows, "f32");
    c.require(c['u'] == HM_KV_PAGE, "rows", "has u=" + std::to_string(c['u']) + ", needs 64 tokens a page");
    c.require(args->ints[1] == 0 || args->ints[1] == 1, "side",
              "is " + std::to_string(args->ints[1]) + ", needs 0 (keys) or 1 (values)");
    KvCodecTask task{kv_side(c, args->ints[0], args->ints[1] == 1), reinterpret_cast<float*>(data(rows)),
                     reinterpret_cast<uint8_t*>(data(pages))};
    take_vectors(c, args->in + 1, task.side);
    c.bind("scale", 'z', 1).shape("scale", args->in[4], "z").dtype("scale", args->in[4], "f32");
    task.side.scale = *reinterpret_cast<const float*>(data(args->in[4]));
    c.require(task.side.scale > 0 && isfinite(task.side.scale), "scale", "needs a positive number");
    c.bind("pages", 'n', task.side.page_bytes).shape("pages", pages, "pn").dtype("pages", pages, "u8");
    const int64_t count = c['p'], numbers = count * HM_KV_PAGE * task.side.d;
    if (args->check) return;
    if (encode) check_finite(c, "rows", task.rows, numbers);
    parallel_range(count, 1, [&](int64_t begin, int64_t end) {
      (encode ? kernels().kv_encode : kernels().kv_decode)(task, begin, end);
    });
  });
}

}  // namespace

const char* op_kv_encode(const hm_args* args) { return run_codec("kv_encode", args, true); }
const char* op_kv_decode(const hm_args* args) { return run_codec("kv_decode", args, false); }

const char* op_kv_scores(const hm_args* args) {
  return guarded([&] {
    Contract c("kv_scores");
    c.arity(*args, 5, false, 3, 1, 0);
    const DLTensor *in = args->in, *out = args->out;
    c.shape("q", in[0], "rd").dtype("q", in[0], "f32");
    KvScoresTask t{};
    t.side = kv_side(c, args->ints[0], false);
    c.require(hm_kv_integer(t.side.codec), "codec", "has no integer scores, needs h2, h3, h4 or h8");
    take_vectors(c, in + 2, t.side);
    c.bind("pages", 'n', t.side.page_bytes).shape("pages", in[1], "pn").dtype("pages", in[1], "u8");
    c.shape("q8", out[0], "rd").dtype("q8", out[0], "i8").shape("unit", out[1], "r").dtype("unit", out[1], "f32");
    c.bind("scores", 't', c['p'] * HM_KV_PAGE).shape("scores", out[2], "rt").dtype("scores", out[2], "i32");
    t.q = reinterpret_cast<const float*>(data(in[0]));
    t.pages = reinterpret_cast<const uint8_t*>(data(in[1]));
    t.rows = c['r'];
    t.count = c['p'];
    t.q8 = reinterpret_cast<int8_t*>(data(out[0]));
    t.unit = reinterpret_cast<float*>(data(out[1]));
    t.scores = reinterpret_cast<int32_t*>(data(out[2]));
    if (args->check) return;
    check_finite(c, "q", t.q, t.rows * t.side.d);
    kernels().kv_scores(t);
  });
}

}  // namespace hm
