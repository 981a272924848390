#include "qmatmul_plan.h"

#include "../core/pool.h"
#include "../core/profile.h"

namespace hm {
namespace {

int64_t group_of(const hm_part& p, int64_t columns) {
  const hm_table table = kInstances[p.instance].table;
  return table == hm_plain ? columns : table == hm_e2m1_gguf ? 32 : p.group;
}

bool one_scale_a_row(const hm_part& p, int64_t columns) {
  return group_of(p, columns) == columns && kInstances[p.instance].table != hm_e2m1_gguf;
}

}  // namespace

void Tokens::add_reader(const Contract& c, const std::string& name, const Parts& weight) {
  int64_t last = 0, instance = -1;  // most parts repeat the group and instance of the one before
  for (int64_t i = 0; i < weight.experts * weight.per_expert; ++i) {
    const hm_part& p = weight.parts[i];
    if (p.rows == 0 || kInstances[p.instance].table == hm_plain) continue;
    const int64_t group = group_of(p, columns_);
    if (group == last && p.instance == instance) continue;
    last = group;
    instance = p.instance;
    if ((group % 32 || columns_ % group) && !one_scale_a_row(p, columns_))
      c.fail(name + "[" + std::to_string(i / weight.per_expert) + "," + std::to_string(i % weight.per_expert) + "]",
             "has group=" + std::to_string(group) + ", needs " + std::to_string(columns_) +
                 " or a multiple of 32 that divides it");
    const InstanceInfo& info = kInstances[p.instance];
    layouts_ |= 1 << qmatmul_layout(info.table, info.bits);
    if (info.table == hm_codebook) continue;
    const QmatmulLevel l = level(p);
    if (levels_.offset(l, padded_) < levels_.offset({}, padded_)) continue;
    if (levels_.count == QmatmulLevels::kMost)
      c.fail(name, "mixes more than " + std::to_string(QmatmulLevels::kMost) + " kinds of codes and groups");
    levels_.level[levels_.count++] = l;
  }
}

QmatmulLevel Tokens::level(const hm_part& p) const {
  const InstanceInfo& info = kInstances[p.instance];
  return qmatmul_level(info.table, info.bits, group_of(p, columns_), one_scale_a_row(p, columns_));
}

void Tokens::allocate(int64_t count) {
  const int64_t x = 4 * padded_, planes = 3 * padded_, sums = padded_ / 2;
  const int64_t units = (levels_.offset({}, padded_) + 1) / 2 * 64;
  auto aligned = [](int64_t n) { return (n + 63) / 64 * 64; };
  int64_t layouts = 0;
  for (int i = 0; i < kSpread; ++i) layouts += layouts_ >> i & 1;
  const int64_t spread = layouts_ >> kSpread ? x : 0;
  memory_.reset(new char[size_t((x + spread + layouts * planes + sums + units + aligned(padded_ / 8)) * count + 64)]);
  inputs_.resize(size_t(count));
  char* p = memory_.get() + (64 - reinterpret_cast<uintptr_t>(memory_.get()) % 64) % 64;
  auto take = [&](int64_t bytes) { return (p += bytes) - bytes; };
  for (QmatmulInput& in : inputs_) {
    in.x = reinterpret_cast<float*>(take(x));
    for (int i = 0; i < 3; ++i) in.planes[i] = reinterpret_cast<int8_t*>(layouts_ >> i & 1 ? take(planes) : nullptr);
    in.spread = reinterpret_cast<float*>(take(spread));
    in.sums32 = reinterpret_cast<int32_t*>(take(sums));
    in.sums = reinterpret_cast<float*>(take(aligned(padded_ / 8)));
    in.units = reinterpret_cast<QmatmulUnit*>(take(units));
  }
}

void Tokens::prepare(const void* x, hm_scale type, int64_t begin, int64_t end) {
  kernels().qmatmul_prepare({static_cast<const char*>(x), type, columns_, layouts_, levels_, inputs_.data()},
                            begin, end);
}

void Tokens::prepare(const void* x, hm_scale type, int64_t count) {
  constexpr int64_t kGrain = 32768;  // numbers a chunk: about 10 us
  allocate(count);
  parallel_range(count, (kGrain + columns_ - 1) / columns_,
                 [&](int64_t begin, int64_t end) { prepare(x, type, begin, end); });
}

void Products::add(const Parts& weight, int64_t expert, const Buffers& buffers, const Tokens& tokens,
                   const std::vector<const QmatmulInput*>& token, const std::vector<char*>& out) {
  if (token.empty()) return;
  const int64_t columns = tokens.columns(), item = scale_bytes(out_type_);
  int64_t row = 0;
  for (int64_t i = 0; i < weight.per_expert; ++i) {
    const hm_part& p = weight.parts[expert * weight.per_expert + i];
    if (p.rows == 0) continue;
    const InstanceInfo& instance = kInstances[p.instance];
    auto place = [&](int64_t buffer, int64_t offset) { return buffers.base[size_t(buffer)] + offset; };
    QmatmulTask task{};
    task.table = instance.table;
    task.bits = instance.bits;
    task.scale_type = instance.scale;
    task.columns = columns;
    task.group = group_of(p, columns);
    task.codes = place(p.codes_buffer, p.codes_offset);
    task.row_bytes = p.row_bytes;
    task.codes_end = task.codes + (p.rows - 1) * p.row_bytes + code_bytes(instance, columns);
    if (instance.table != hm_plain && instance.table != hm_e2m1_gguf) {
      task.scale_stride = columns / task.group * scale_bytes(instance.scale);
      task.scale = place(p.scale_buffer, p.scale_offset);
      if (p.bias_buffer >= 0 && instance.table == hm_linear) task.bias = place(p.bias_buffer, p.bias_offset);
      if (instance.table == hm_codebook) task.codebook = place(p.codebook_buffer, p.codebook_offset);
    }
    if (instance.table != hm_plain) task.units = tokens.units(p);
    task.token_count = int64_t(token.size());
    task.out_type = out_type_;
    tasks_.push_back(task);
    spans_.push_back({token_.size(), p.rows});
    token_.insert(token_.end(), token.begin(), token.end());
    for (char* y : out) out_.push_back(y + row * item);
    row += p.rows;
  }
}

void Products::run() {
  constexpr int64_t kBlock = 16, kLeast = 16 << 10;  // rows a kernel takes at once; bytes worth a hand-over
  const int64_t start = product_count.on ? profile_clock() : 0;
  int64_t total = 0, bytes = 0;
  auto cost = [](const QmatmulTask& t) { return t.row_bytes * (1 + t.token_count / 4); };
  for (size_t i = 0; i < tasks_.size(); ++i) {
    tasks_[i].tokens = token_.data() + spans_[i].begin;
    tasks_[i].out = out_.data() + spans_[i].begin;
    total += cost(tasks_[i]) * spans_[i].rows;
    bytes += (tasks_[i].row_bytes + tasks_[i].scale_stride * (tasks_[i].bias ? 2 : 1)) * spans_[i].rows;
  }
  int64_t target = total / (4 * int64_t(thread_count()));
  if (target < kLeast) target = kLeast;
  struct Chunk {
    const QmatmulTask* task;
    int64_t begin, end;
  };
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < tasks_.size(); ++i) {
    int64_t rows = spans_[i].rows, pieces = (cost(tasks_[i]) * rows + target / 2) / target;
    pieces = pieces < 1 ? 1 : pieces;
    int64_t step = ((rows + pieces - 1) / pieces + kBlock - 1) / kBlock * kBlock;
    for (int64_t n = 0; n < rows; n += step)
      chunks.push_back({&tasks_[i], n, n + step < rows ? n + step : rows});
  }
  parallel(uint32_t(chunks.size()),
           [&](uint32_t i) { kernels().qmatmul(*chunks[i].task, chunks[i].begin, chunks[i].end); });
  if (start) {
    product_count.nanoseconds += profile_clock() - start;
    product_count.bytes += bytes;
  }
}

ByExpert::ByExpert(const int64_t* expert, int64_t count, int64_t experts)
    : first(size_t(experts) + 1), order(size_t(count)) {
  for (int64_t i = 0; i < count; ++i) ++first[size_t(expert[i]) + 1];
  for (size_t e = 0; e < size_t(experts); ++e) first[e + 1] += first[e];
  std::vector<int64_t> next(first.begin(), first.end() - 1);
  for (int64_t i = 0; i < count; ++i) order[size_t(next[size_t(expert[i])]++)] = i;
}

}  // namespace hm
