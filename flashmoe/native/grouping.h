// Pairs of a row and a slot, sorted so that each slot's weights are read once; work shared out.
#ifndef FLASHMOE_GROUPING_H
#define FLASHMOE_GROUPING_H

#include <stdint.h>

#include <functional>
#include <vector>

#include "flashmoe_native.h"
#include "rows.h"

namespace flashmoe {

// FM_OK when the description can be multiplied with.
int check_matrix(const fm_matrix* w);

// FM_OK when every slot is one of w's; slots may be null.
int check_slots(const int32_t* slots, int64_t n_pairs, const fm_matrix& w);

// One slot and its places in the sorted order.
struct Run {
  int64_t slot;
  int64_t first;
  int64_t count;
};

// Pairs sorted by slot, stably; slots null means slot 0 for all.
struct Order {
  std::vector<int64_t> pairs;  // pairs[i] is the pair in place i
  std::vector<Run> runs;

  Order(const int32_t* slots, int64_t n_pairs);

  // Places first .. first + count - 1 alone.
  Order part(int64_t first, int64_t count) const;

 private:
  Order() = default;
};

// Calls work(run, begin, end) for ranges of rows that cover 0 .. rows - 1 of every run, on all
// threads where `products` multiplications are worth it.
void for_each_rows(const Order& order, int64_t rows, int64_t products,
                   const std::function<void(const Run&, int64_t, int64_t)>& work);

}  // namespace flashmoe
#endif
