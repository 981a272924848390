// Times ggml's matrix-vector products at this model's shapes: weights beyond any cache, in the
// buffer llama.cpp itself picks. One line of JSON a measurement.
//   ggml_kernels THREADS POOL_MB SECONDS TYPE...
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

namespace {

constexpr int64_t kExperts = 256, kUsed = 8;

struct Shape {
  const char* name;
  int64_t rows, columns;
  bool experts;
};
constexpr Shape kShapes[] = {
    {"dense", 8192, 2048, false}, {"head", 248320, 2048, false}, {"experts", 1024, 2048, true}};

ggml_type type_named(const std::string& name) {
  for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
    const char* known = ggml_type_name(ggml_type(i));
    if (known && name == known) return ggml_type(i);
  }
  fprintf(stderr, "ggml_kernels: no type %s\n", name.c_str());
  exit(2);
}

// llama.cpp's order: what the CPU offers beyond its plain buffer first, plain memory last.
std::vector<ggml_backend_buffer_type_t> buffer_types(ggml_backend_t backend) {
  std::vector<ggml_backend_buffer_type_t> types;
  ggml_backend_dev_t device = ggml_backend_get_device(backend);
  auto extra = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(ggml_backend_reg_get_proc_address(
      ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
  for (ggml_backend_buffer_type_t* t = extra ? extra(device) : nullptr; t && *t; ++t) types.push_back(*t);
  types.push_back(ggml_backend_cpu_buffer_type());
  return types;
}

// A few rows quantised from random numbers, repeated.
std::vector<char> random_rows(ggml_type type, int64_t columns, int64_t rows) {
  constexpr int64_t kDistinct = 64;
  std::mt19937 rng(1);
  std::normal_distribution<float> normal(0, 0.02f);
  std::vector<float> values(size_t(columns * kDistinct)), importance(size_t(columns), 1.f);
  for (float& v : values) v = normal(rng);
  const size_t row = ggml_row_size(type, columns);
  std::vector<char> distinct(row * kDistinct), all(row * size_t(rows));
  ggml_quantize_chunk(type, values.data(), distinct.data(), 0, kDistinct, columns, importance.data());
  for (int64_t r = 0; r < rows; ++r) memcpy(&all[size_t(r) * row], &distinct[size_t(r % kDistinct) * row], row);
  return all;
}

// A graph of products that touch `pool` bytes of weights in all; run and time it.
void measure(ggml_backend_t backend, ggml_type type, const Shape& s, size_t pool, double seconds, int threads) {
  const size_t matrix = ggml_row_size(type, s.columns) * size_t(s.rows);
  const int64_t products = s.experts ? kExperts / kUsed : std::max<int64_t>(2, int64_t(pool / matrix));
  const int64_t copies = s.experts ? 1 : products;
  const size_t overhead = ggml_tensor_overhead();
  ggml_context* weights = ggml_init({overhead * size_t(copies), nullptr, true});
  ggml_context* rest =
      ggml_init({overhead * size_t(3 * products + 1) + ggml_graph_overhead_custom(size_t(4 * products), false), nullptr, true});
  std::vector<ggml_tensor*> w, ids, out;
  for (int64_t i = 0; i < copies; ++i)
    w.push_back(s.experts ? ggml_new_tensor_3d(weights, type, s.columns, s.rows, kExperts)
                          : ggml_new_tensor_2d(weights, type, s.columns, s.rows));
  ggml_tensor* x = s.experts ? ggml_new_tensor_3d(rest, GGML_TYPE_F32, s.columns, 1, 1)
                             : ggml_new_tensor_2d(rest, GGML_TYPE_F32, s.columns, 1);
  ggml_cgraph* graph = ggml_new_graph_custom(rest, size_t(4 * products), false);
  for (int64_t i = 0; i < products; ++i) {
    if (s.experts) ids.push_back(ggml_new_tensor_2d(rest, GGML_TYPE_I32, kUsed, 1));
    out.push_back(s.experts ? ggml_mul_mat_id(rest, w[0], x, ids.back()) : ggml_mul_mat(rest, w[size_t(i)], x));
    ggml_build_forward_expand(graph, out.back());
  }
  ggml_backend_buffer_t memory = nullptr;
  for (ggml_backend_buffer_type_t t : buffer_types(backend)) {
    // What a device supports depends on the buffer a weight is in: ask with an empty one, as llama.cpp does.
    ggml_backend_buffer_t probe = ggml_backend_buft_alloc_buffer(t, 0);
    w[0]->buffer = probe;
    const bool fits = ggml_backend_dev_supports_op(ggml_backend_get_device(backend), out[0]);
    w[0]->buffer = nullptr;
    ggml_backend_buffer_free(probe);
    if (fits && (memory = ggml_backend_alloc_ctx_tensors_from_buft(weights, t))) break;
  }
  ggml_backend_buffer_t scratch = ggml_backend_alloc_ctx_tensors(rest, backend);
  if (!memory || !scratch) {
    fprintf(stderr, "ggml_kernels: no memory for %s %s\n", ggml_type_name(type), s.name);
    exit(1);
  }
  const std::vector<char> rows = random_rows(type, s.columns, s.rows * (s.experts ? kExperts : 1));
  for (ggml_tensor* t : w) ggml_backend_tensor_set(t, rows.data(), 0, rows.size());
  std::mt19937 rng(2);
  std::vector<float> values(size_t(s.columns));
  for (float& v : values) v = std::normal_distribution<float>()(rng);
  ggml_backend_tensor_set(x, values.data(), 0, values.size() * sizeof(float));
  std::vector<int32_t> order(kExperts);  // every expert once
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), rng);
  for (size_t i = 0; i < ids.size(); ++i)
    ggml_backend_tensor_set(ids[i], &order[i * kUsed], 0, kUsed * sizeof(int32_t));

  ggml_backend_graph_compute(backend, graph);
  double best = 1e9, spent = 0;
  for (int i = 0; i < 5 || spent < seconds; ++i) {
    const auto start = std::chrono::steady_clock::now();
    ggml_backend_graph_compute(backend, graph);
    const double took = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::min(best, took);
    spent += took;
  }
  const double bytes = double(matrix) * double(products) * (s.experts ? kUsed : 1);
  printf("{\"type\": \"%s\", \"what\": \"%s\", \"buffer\": \"%s\", \"rows\": %lld, \"columns\": %lld, \"threads\": %d, "
         "\"microseconds\": %.2f, \"gbytes\": %.3f}\n",
         ggml_type_name(type), s.name, ggml_backend_buffer_name(memory), static_cast<long long>(s.rows),
         static_cast<long long>(s.columns), threads, best / double(products) * 1e6, bytes / best / 1e9);
  fflush(stdout);
  ggml_backend_buffer_free(memory);
  ggml_backend_buffer_free(scratch);
  ggml_free(weights);
  ggml_free(rest);
}

}  // namespace

int main(int count, char** args) {
  if (count < 5) {
    fprintf(stderr, "usage: ggml_kernels THREADS POOL_MB SECONDS TYPE...\n");
    return 2;
  }
  ggml_log_set([](ggml_log_level level, const char* text, void*) {
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
  }, nullptr);
  const int threads = atoi(args[1]);
  ggml_backend_t backend = ggml_backend_cpu_init();
  ggml_backend_cpu_set_n_threads(backend, threads);
  for (int i = 4; i < count; ++i)
    for (const Shape& s : kShapes)
      measure(backend, type_named(args[i]), s, size_t(atoll(args[2])) << 20, atof(args[3]), threads);
  ggml_backend_free(backend);
}
