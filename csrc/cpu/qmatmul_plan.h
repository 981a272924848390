// Splits rows times tokens into chunks, each one sequential stream of weights. Every op that
// multiplies by a weight goes through here.
#pragma once
#include <memory>
#include <vector>

#include "../core/parts.h"
#include "kernels.h"

namespace hm {

// Tokens of one input, prepared once for all weights that read it.
class Tokens {
 public:
  explicit Tokens(int64_t columns) : columns_(columns), padded_((columns + 255) / 256 * 256) {}
  // Notes what a weight's kernels want of the tokens; call for every reader, before prepare().
  void add_reader(const Contract& c, const std::string& name, const Parts& weight);
  // x is [count, columns].
  void prepare(const void* x, hm_scale type, int64_t count);
  // The same in two steps, for an x that appears piece by piece: memory, then tokens [begin, end).
  void allocate(int64_t count);
  void prepare(const void* x, hm_scale type, int64_t begin, int64_t end);
  const QmatmulInput* operator[](int64_t t) const { return &inputs_[size_t(t)]; }
  int64_t columns() const { return columns_; }
  // Where the units of a part's level begin.
  int64_t units(const hm_part& p) const { return levels_.offset(level(p), padded_); }

 private:
  QmatmulLevel level(const hm_part& p) const;
  int64_t columns_, padded_;
  int layouts_ = 0;
  QmatmulLevels levels_{};
  std::vector<QmatmulInput> inputs_;
  std::unique_ptr<char[]> memory_;
};

// The products of one call: add() them all, then run() them on all threads with one join.
class Products {
 public:
  explicit Products(hm_scale out_type) : out_type_(out_type) {}
  // out[i] <- rows of `expert` times token[i]; the Tokens must outlive run().
  void add(const Parts& weight, int64_t expert, const Buffers& buffers, const Tokens& tokens,
           const std::vector<const QmatmulInput*>& token, const std::vector<char*>& out);
  void run();

 private:
  struct Span {  // a task's tokens and results
    size_t begin;
    int64_t rows;
  };
  hm_scale out_type_;
  std::vector<QmatmulTask> tasks_;
  std::vector<Span> spans_;
  std::vector<const QmatmulInput*> token_;
  std::vector<char*> out_;
};

// Tokens of each expert: order[first[e]..first[e+1]) are positions in `expert`, ascending.
struct ByExpert {
  std::vector<int64_t> first, order;
  ByExpert(const int64_t* expert, int64_t count, int64_t experts);
};

}  // namespace hm
