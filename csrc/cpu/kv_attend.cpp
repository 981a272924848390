// kv_attend: in q? f32|bf16|f16[b,t,h,d], k?, v? of its dtype [b,t,g,d], then a cache's inputs (kv_plan.h); out y? like q,
// then a cache's outputs; ints and meanings in kv_plan.h. Without q: appends. Without k and v: the last counts[b] tokens
// of a sequence are in the cache already.
#include <math.h>
#include <string.h>

#include <algorithm>
#include <atomic>

#include "../core/numeric.h"
#include "../core/parts.h"
#include "../core/pool.h"
#include "../core/scratch.h"
#include "attention_plan.h"
#include "kv_plan.h"
#include "ops.h"

namespace hm {
namespace {

constexpr int64_t kTileRows = 64;  // their scores against a run stay in the second-level cache
constexpr int64_t kSlots = 3;

int64_t slot_of(int64_t page) { return page ? 1 + page % 2 : 0; }

// One call's share of tokens, and all its memory.
class KvCall {
 public:
  KvCall(const Contract& c, const KvArguments& cache, const KvTask& task, KvSource source, int64_t tokens, int64_t first,
         int64_t count, bool local)
      : c_(c), cache_(cache), t_(task), source_(source) {
    AttentionTask& a = t_.raw;
    a.tokens = count;
    a.proj_stride = local ? count : tokens;
    a.cos += a.cos ? first * a.rot : 0;
    a.sin += a.sin ? first * a.rot : 0;
    const int64_t begin = local ? 0 : first, bytes = scale_bytes(a.proj_dtype);
    auto move = [&](const void*& p, int64_t width) {
      if (p) p = static_cast<const char*>(p) + begin * width * bytes;
    };
    move(a.proj, a.proj_width);
    move(t_.q_in, a.heads * a.d);
    move(t_.k_in, a.kv_heads * a.d);
    move(t_.v_in, a.kv_heads * a.d);
    if (a.y) a.y = static_cast<char*>(a.y) + begin * a.heads * a.d * scale_bytes(a.y_dtype);
    place(tokens, first, count);
  }

  // Queries, and the rows of the pages that are touched; fails where a number is not finite, and has written nothing.
  void prepare() {
    const Kernels& kernel = kernels();
    AttentionTask& a = t_.raw;
    const int64_t rows = a.batch * a.tokens * a.heads;
    a.q = scratch_.floats((rows + kSumRows) * a.width);
    load_raw();
    parallel_range(a.batch * a.tokens, 4, [&](int64_t begin, int64_t end) {
      source_ == KvSource::kProjected ? kernel.attention_prepare(a, begin, end) : kernel.kv_take(t_, begin, end);
    });
    check_finite();
  }

  void run() {
    prepare();
    if (source_ != KvSource::kCached) {
      seal();
      save_raw();
    }
    if (t_.raw.y) attend();
  }

 private:
  // Sequence b: tokens [from_, end_) of it belong to this share, and their first page.
  void place(int64_t tokens, int64_t first, int64_t count) {
    AttentionTask& a = t_.raw;
    from_ = scratch_.take<int64_t>(a.batch);
    end_ = scratch_.take<int64_t>(a.batch);
    int64_t *at = scratch_.take<int64_t>(a.batch), *skip = scratch_.take<int64_t>(a.batch);
    int64_t *limit = scratch_.take<int64_t>(a.batch * count), *whole = scratch_.take<int64_t>(a.batch * count);
    for (int64_t b = 0; b < a.batch; ++b) {
      const int64_t real = cache_.counts[b], padding = tokens - real;
      const int64_t before = cache_.lengths[b] - (source_ == KvSource::kCached ? real : 0);
      skip[b] = std::clamp<int64_t>(padding - first, 0, count);
      from_[b] = before + std::max<int64_t>(0, first - padding);
      end_[b] = from_[b] + count - skip[b];
      at[b] = from_[b] % HM_KV_PAGE - skip[b];
      const int64_t room = from_[b] % HM_KV_PAGE + count - skip[b];
      a.capacity = std::max(a.capacity, (room + HM_KV_PAGE - 1) / HM_KV_PAGE * HM_KV_PAGE);
      for (int64_t i = 0; i < count; ++i) {
        limit[b * count + i] = at[b] + i + 1;
        whole[b * count + i] = HM_KV_PAGE;
      }
    }
    a.at = at;
    a.skip = skip;
    a.limit = limit;
    const int64_t bytes = a.batch * a.kv_heads * a.capacity * a.d * scale_bytes(a.cache_dtype);
    a.keys = scratch_.take<char>(bytes);
    a.values = scratch_.take<char>(bytes);
    t_.sink = a;
    t_.sink.keys = cache_.raw_keys;
    t_.sink.values = cache_.raw_values;
    t_.sink.capacity = kSlots * HM_KV_PAGE;
    t_.sink.limit = whole;
  }

  // fn(b, g, row of the raw arrays, row of the slots, rows) for the tokens [begin, end) of every sequence, by page.
  template <class F>
  void each_page(int64_t b, int64_t begin, int64_t end, F&& fn) {
    const AttentionTask& a = t_.raw;
    const int64_t first = from_[b] / HM_KV_PAGE * HM_KV_PAGE;
    for (int64_t t = begin; t < end;) {
      const int64_t page = t / HM_KV_PAGE, n = std::min((page + 1) * HM_KV_PAGE, end) - t;
      for (int64_t g = 0; g < a.kv_heads; ++g) {
        const int64_t head = b * a.kv_heads + g;
        fn(head * a.capacity + t - first, (head * kSlots + slot_of(page)) * HM_KV_PAGE + t % HM_KV_PAGE, n);
      }
      t += n;
    }
  }

  void copy(bool save, int64_t raw, int64_t slot, int64_t n) {
    const int64_t row = t_.raw.d * scale_bytes(t_.raw.cache_dtype);
    char *scratch[] = {static_cast<char*>(t_.raw.keys), static_cast<char*>(t_.raw.values)};
    char *kept[] = {cache_.raw_keys, cache_.raw_values};
    for (int side = 0; side < 2; ++side) {
      char *x = scratch[side] + raw * row, *y = kept[side] + slot * row;
      memcpy(save ? y : x, save ? x : y, size_t(n * row));
    }
  }

  // What the touched pages hold already.
  void load_raw() {
    for (int64_t b = 0; b < t_.raw.batch; ++b) {
      const int64_t first = from_[b] / HM_KV_PAGE * HM_KV_PAGE;
      const int64_t known = source_ == KvSource::kCached ? end_[b] : from_[b];
      if (end_[b] > from_[b])
        each_page(b, first, known, [&](int64_t raw, int64_t slot, int64_t n) { copy(false, raw, slot, n); });
    }
  }

  // Page 0 and the last two pages that were touched.
  void save_raw() {
    for (int64_t b = 0; b < t_.raw.batch; ++b) {
      const int64_t last = std::max<int64_t>(0, end_[b] - 1) / HM_KV_PAGE;
      each_page(b, from_[b], std::min<int64_t>(end_[b], HM_KV_PAGE),
                [&](int64_t raw, int64_t slot, int64_t n) { copy(true, raw, slot, n); });
      each_page(b, std::max(from_[b], std::max<int64_t>(1, last - 1) * HM_KV_PAGE), end_[b],
                [&](int64_t raw, int64_t slot, int64_t n) { copy(true, raw, slot, n); });
    }
  }

  void check_finite() {
    const AttentionTask& a = t_.raw;
    std::atomic<int> bad{0};
    auto scan = [&](const void* rows, int64_t from, int64_t n, hm_scale type, int what) {
      for (int64_t i = from; i < from + n; ++i) {
        const uint16_t* half = static_cast<const uint16_t*>(rows);
        const float x = type == hm_f32 ? static_cast<const float*>(rows)[i]
                        : type == hm_f16 ? f16_to_f32(half[i])
                                         : bf16_to_f32(half[i]);
        if (!isfinite(x)) bad = what;
      }
    };
    parallel_range(a.batch * a.kv_heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head) {
        const int64_t b = head / a.kv_heads, n = end_[b] - from_[b], group = a.heads / a.kv_heads;
        const int64_t from = (head * a.capacity + from_[b] % HM_KV_PAGE) * a.d;
        if (a.y) scan(a.q, (head * a.tokens + a.skip[b]) * group * a.width, n * group * a.width, hm_f32, 1);
        if (source_ == KvSource::kCached) continue;
        scan(a.keys, from, n * a.d, a.cache_dtype, 2);
        scan(a.values, from, n * a.d, a.cache_dtype, 3);
      }
    });
    static const char* const kNames[] = {"", "q", "k", "v"};
    c_.require(!bad, kNames[bad], "has a number that is not finite");
  }

  // Pages that are full now, but for page 0.
  void seal() {
    struct Full {
      int64_t g, raw, place;
    };
    const AttentionTask& a = t_.raw;
    std::vector<Full> full;
    for (int64_t b = 0; b < a.batch; ++b) {
      const int64_t first = from_[b] / HM_KV_PAGE;
      for (int64_t p = std::max<int64_t>(1, first); p < end_[b] / HM_KV_PAGE; ++p)
        for (int64_t g = 0; g < a.kv_heads; ++g)
          full.push_back({g, ((b * a.kv_heads + g) * a.capacity + (p - first) * HM_KV_PAGE) * a.d,
                          t_.table[b * t_.table_width + p] * a.kv_heads + g});
    }
    const int64_t bytes = scale_bytes(a.cache_dtype);
    parallel_range(int64_t(full.size()) * 2, 1, [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u) {
        const Full& f = full[size_t(u / 2)];
        const bool values = u % 2;
        const char* rows = static_cast<const char*>(values ? a.values : a.keys) + f.raw * bytes;
        uint8_t* pages = values ? cache_.value_pages : cache_.key_pages;
        kernels().kv_seal(t_, f.g, values, rows, pages + f.place * (values ? t_.value : t_.key).page_bytes);
      }
    });
  }

  // Queries by page and key head, the ones with most keys first.
  std::vector<KvTile> tiles() const {
    const AttentionTask& a = t_.raw;
    const int64_t group = a.heads / a.kv_heads, most = std::max<int64_t>(1, kTileRows / group);
    std::vector<KvTile> list;
    for (int64_t b = 0; b < a.batch; ++b)
      for (int64_t i = a.skip[b]; i < a.tokens;) {
        const int64_t token = from_[b] + i - a.skip[b], page = token / HM_KV_PAGE;
        const int64_t n = std::min({most, a.tokens - i, (page + 1) * HM_KV_PAGE - token});
        const int64_t from = std::max<int64_t>(1, t_.window ? page - t_.window : 1);
        for (int64_t g = 0; g < a.kv_heads; ++g)
          list.push_back({b, g, i, i + n, page, from, (page - from_[b] / HM_KV_PAGE) * HM_KV_PAGE, n * group,
                          ((b * a.kv_heads + g) * a.tokens + i) * group});
        i += n;
      }
    std::stable_sort(list.begin(), list.end(), [](const KvTile& x, const KvTile& y) { return x.page > y.page; });
    return list;
  }

  AttentionPart part(Scratch& scratch, int64_t rows) const {
    return {scratch.floats(rows * t_.raw.width), scratch.floats(rows), scratch.floats(rows), scratch.floats(rows)};
  }

  KvWork work(Scratch& scratch, int64_t rows) const {
    const int64_t width = t_.raw.width;
    float* copy = scratch.floats(kBlockKeys * width);
    auto plain = [&] {
      AttentionPart p = part(scratch, rows);
      p.noise = nullptr;
      return p;
    };
    return {scratch.floats(rows * kRunKeys), scratch.take<int8_t>(rows * 2 * kRunKeys),
            scratch.floats(rows * kRunPages), scratch.take<int32_t>(rows * 2 * kRunPages),
            scratch.floats(kRunKeys), scratch.floats(kRunKeys), copy,
            {scratch.floats(rows * kBlockKeys), copy, plain(), plain()},
            part(scratch, rows), part(scratch, rows)};
  }

  void clear_padding() {
    const AttentionTask& a = t_.raw;
    const int64_t row = a.heads * a.d * scale_bytes(a.y_dtype);
    for (int64_t b = 0; b < a.batch; ++b)
      memset(static_cast<char*>(a.y) + b * a.proj_stride * row, 0, size_t(a.skip[b] * row));
  }

  void attend() {
    const Kernels& kernel = kernels();
    const AttentionTask& a = t_.raw;
    const int64_t all = a.batch * a.tokens * a.heads;
    t_.query = scratch_.take<KvQuery>(all + kSumRows);
    t_.q8 = scratch_.take<int8_t>((all + kSumRows) * a.d);
    std::fill_n(t_.query + all, kSumRows, KvQuery{});
    memset(t_.q8 + all * a.d, 0, size_t(kSumRows * a.d));
    t_.turned = hm_kv_turbo(t_.key.codec) ? scratch_.floats((all + kSumRows) * a.width) : nullptr;
    clear_padding();
    for (int64_t b = 0; b < a.batch; ++b)  // rows of padding are not queries
      for (int64_t g = 0; g < a.kv_heads; ++g) {
        const int64_t group = a.heads / a.kv_heads, row = (b * a.kv_heads + g) * a.tokens * group;
        memset(a.q + row * a.width, 0, size_t(a.skip[b] * group * a.width) * 4);
      }
    parallel_range(all, 16, [&](int64_t begin, int64_t end) { kernel.kv_query(t_, begin, end); });

    const std::vector<KvTile> list = tiles();
    int64_t rows = 0, runs = 0;
    for (const KvTile& q : list) {
      rows = std::max(rows, (q.rows + kSumRows - 1) / kSumRows * kSumRows);
      runs = std::max(runs, (q.page + kRunPages - 1) / kRunPages);
    }
    const int64_t count = int64_t(list.size());
    if (count >= 4 * thread_count() || runs <= 1) {
      parallel(uint32_t(count), [&](uint32_t u) {
        Scratch mine;
        kernel.kv_finish(t_, list[u], work(mine, rows), nullptr);
      });
      return;
    }
    std::vector<AttentionPart> parts(size_t(count * runs));
    for (AttentionPart& p : parts) p = part(scratch_, rows);
    parallel_range(count * runs, 1, [&](int64_t begin, int64_t end) {
      Scratch mine;
      const KvWork memory = work(mine, rows);
      for (int64_t u = begin; u < end; ++u) kernel.kv_run(t_, list[size_t(u / runs)], u % runs, memory, parts[size_t(u)]);
    });
    parallel(uint32_t(count), [&](uint32_t u) {
      Scratch mine;
      kernel.kv_finish(t_, list[u], work(mine, rows), parts.data() + u * runs);
    });
  }

  const Contract& c_;
  const KvArguments& cache_;
  KvTask t_;
  const KvSource source_;
  Scratch scratch_;
  int64_t *from_, *end_;
};

}  // namespace

void run_kv_attention(const Contract& c, const KvArguments& cache, const KvTask& task, KvSource source, int64_t tokens,
                      int64_t first, int64_t count, bool local) {
  KvCall(c, cache, task, source, tokens, first, count, local).run();
}

const char* op_kv_attend(const hm_args* args) {
  return guarded([&] {
    Contract c("kv_attend");
    c.arity(*args, 3 + KvArguments::kInputs, false, 1 + KvArguments::kOutputs, KvArguments::kInts, 0);
    const DLTensor *in = args->in, &y = args->out[0];
    const bool asks = present(in[0]), gives = present(in[1]);
    c.require(asks || gives, "q", "is absent, and so is k: needs one of them");
    c.require(gives == present(in[2]), "v", gives ? "is absent, k is not" : "is given without k");
    const DLTensor& x = asks ? in[0] : in[1];
    if (asks) c.shape("q", in[0], "bthd").dtype("q", in[0], "f32 bf16 f16");
    const std::string type = asks ? dtype_name(x.dtype) : "f32 bf16 f16";
    const char* names[] = {"k", "v"};
    for (int i = 0; i < 2 && gives; ++i)
      c.shape(names[i], in[1 + i], "btgd").dtype(names[i], in[1 + i], i ? dtype_name(in[1].dtype) : type);
    KvArguments cache(c, in + 3, args->out + 1, args->ints);
    KvTask task = cache.task;
    AttentionTask& a = task.raw;
    a.heads = asks ? c['h'] : a.kv_heads;
    c.require(a.heads > 0 && a.kv_heads > 0 && a.heads % a.kv_heads == 0, "q",
              "has h=" + std::to_string(a.heads) + ", needs a multiple of g=" + std::to_string(a.kv_heads));
    c.require(present(y) == asks, "y", asks ? "is absent" : "is given without q");
    if (asks) c.shape("y", y, "bthd").dtype("y", y, dtype_name(x.dtype));
    a.proj_dtype = a.y_dtype = storage(x);
    a.y = asks ? data(y) : nullptr;
    task.q_in = asks ? data(in[0]) : nullptr;
    task.k_in = gives ? data(in[1]) : nullptr;
    task.v_in = gives ? data(in[2]) : nullptr;
    if (args->check) return;
    cache.check_tables(c, c['t'], gives);
    if (!a.batch || !c['t']) return;
    const int64_t tokens = c['t'], chunk = attention_chunk(a.batch, tokens);
    const KvSource source = gives ? KvSource::kGiven : KvSource::kCached;
    for (int64_t i = 0; i < tokens && tokens > chunk; i += chunk)  // all is checked before anything is written
      KvCall(c, cache, task, source, tokens, i, std::min(chunk, tokens - i), false).prepare();
    for (int64_t i = 0; i < tokens; i += chunk)
      run_kv_attention(c, cache, task, source, tokens, i, std::min(chunk, tokens - i), false);
  });
}

}  // namespace hm
