// The pool that reads: batches cut into pieces, demanded ones first.
#ifndef FLASHMOE_READ_POOL_H
#define FLASHMOE_READ_POOL_H

#include <stdint.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "flashmoe_reader.h"
#include "transfer.h"

namespace flashmoe {

constexpr int kPriorities = 3;

struct Request {
  int fd;
  int64_t offset, bytes;
  std::vector<iovec> buffers;
  int64_t pieces_left;
  // Of the first of its pieces that failed.
  int64_t failed_piece;
  Outcome outcome;
};

// Batches that are read alike: so many pieces at a time, of so many bytes (0: by their batch).
struct Lane {
  int threads;
  int64_t piece_bytes;
  int running = 0;
};

// Pieces up to `next` have been taken, those from `last` on never will be.
struct Batch {
  std::vector<Request> requests;
  std::vector<Piece> pieces;
  size_t lane = 0;
  size_t next = 0, last = 0;
  int64_t running = 0;

  bool ended() const { return next == last && running == 0; }
};

// One lock guards all of it; a batch that has ended is not touched again.
class ReadPool {
 public:
  // One lane at least; their `running` is 0.
  ReadPool(std::vector<Lane> lanes, bool uncached, fm_preadv preadv);

  // Throws std::system_error without a thread, and std::bad_alloc.
  std::shared_ptr<Batch> submit(const fm_read* reads, int64_t n, int priority, size_t lane);
  void add_lane(const Lane& lane);
  int64_t cancel(Batch& batch);
  int64_t wait(const std::vector<const Batch*>& batches, double seconds);
  bool drain(double seconds);
  fm_read_counters counters();
  void close();

 private:
  using Clock = std::chrono::steady_clock;

  using Queue = std::deque<std::shared_ptr<Batch>>;

  void start_threads();
  void run();
  std::shared_ptr<Batch> next_batch();
  bool anything_waits() const;
  void forget(const Batch& batch);
  void note(Batch& batch, const Piece& piece, const Outcome& outcome, double seconds);
  int64_t cancel_locked(Batch& batch);
  void count_open(int64_t change);

  std::vector<Lane> lanes_;
  int most_threads_ = 1;
  const bool uncached_;
  const fm_preadv preadv_;
  std::mutex lock_;
  std::condition_variable work_waits_, batch_ended_;
  std::vector<std::thread> threads_;
  Queue waiting_[kPriorities];
  int blocked_ = 0;  // threads that found work, but no room in its lane
  int64_t open_ = 0;  // requests not ended
  int64_t open_pieces_ = 0;
  Clock::time_point clock_ = Clock::now();
  fm_read_counters totals_ = {};
  bool stopping_ = false;
};

}  // namespace flashmoe
#endif
