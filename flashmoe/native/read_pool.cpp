#include "read_pool.h"

#include <errno.h>

#include <algorithm>
#include <exception>
#include <iterator>
#include <utility>

namespace flashmoe {
namespace {

// Pieces as in io/depth.py.
constexpr int64_t kLeastPiece = 128 * 1024;
constexpr int64_t kMostPiece = 1024 * 1024;

using Seconds = std::chrono::duration<double>;

// The file range of a request in pieces of about equal size, cut where blocks begin.
int64_t cut(std::vector<Piece>& pieces, int64_t request, int64_t begin, int64_t size,
            int64_t most) {
  const size_t before = pieces.size();
  const int64_t count = (size + most - 1) / most;
  int64_t from = begin;
  for (int64_t i = 1; i <= count; ++i) {
    // In two terms: the product of a size and a count of pieces may overflow.
    const int64_t mark = begin + size / count * i + size % count * i / count;
    const int64_t to = i == count ? begin + size : mark / kBlock * kBlock;
    if (from < to) {
      pieces.push_back({request, from, to, pieces.size() == before});
      from = to;
    }
  }
  return int64_t(pieces.size() - before);
}

}  // namespace

ReadPool::ReadPool(std::vector<Lane> lanes, bool uncached, fm_preadv preadv)
    : lanes_(std::move(lanes)), uncached_(uncached), preadv_(preadv) {
  for (const Lane& lane : lanes_) most_threads_ = std::max(most_threads_, lane.threads);
}

void ReadPool::add_lane(const Lane& lane) {
  std::lock_guard<std::mutex> locked(lock_);
  lanes_.push_back(lane);
  most_threads_ = std::max(most_threads_, lane.threads);
}

std::shared_ptr<Batch> ReadPool::submit(const fm_read* reads, int64_t n, int priority,
                                        size_t number) {
  Lane lane;
  {
    std::lock_guard<std::mutex> locked(lock_);
    lane = lanes_[number];
  }
  auto batch = std::make_shared<Batch>();
  batch->lane = number;
  batch->requests.reserve(size_t(n));
  int64_t total = 0, empty = 0;
  for (int64_t i = 0; i < n; ++i) {
    const fm_read& read = reads[i];
    Request request = {read.fd, read.offset, 0, {read.buffers, read.buffers + read.n_buffers},
                       0, -1, {0, FM_WHOLE}};
    for (const iovec& buffer : request.buffers) request.bytes += int64_t(buffer.iov_len);
    total += request.bytes;
    batch->requests.push_back(std::move(request));
  }
  const int64_t most = lane.piece_bytes > 0
                           ? lane.piece_bytes
                           : std::clamp(total / lane.threads, kLeastPiece, kMostPiece);
  for (int64_t i = 0; i < n; ++i) {
    Request& request = batch->requests[size_t(i)];
    request.pieces_left = cut(batch->pieces, i, request.offset, request.bytes, most);
    empty += request.pieces_left == 0;
  }
  batch->last = batch->pieces.size();

  std::lock_guard<std::mutex> locked(lock_);
  const auto pieces = int64_t(batch->pieces.size());
  if (pieces) {
    waiting_[priority].push_back(batch);
    open_pieces_ += pieces;
    try {
      start_threads();
    } catch (...) {
      if (threads_.empty()) {
        open_pieces_ -= pieces;
        waiting_[priority].pop_back();
        throw;
      }
      // Fewer threads are slower, no worse.
    }
  }
  totals_.reads += empty;
  count_open(n - empty);
  if (pieces == 1) {
    work_waits_.notify_one();
  } else if (pieces) {
    work_waits_.notify_all();
  }
  return batch;
}

void ReadPool::start_threads() {
  const auto wanted = size_t(std::min<int64_t>(most_threads_, open_pieces_));
  threads_.reserve(size_t(most_threads_));
  while (threads_.size() < wanted) threads_.emplace_back(&ReadPool::run, this);
}

bool ReadPool::anything_waits() const {
  return std::any_of(std::begin(waiting_), std::end(waiting_),
                     [](const Queue& queue) { return !queue.empty(); });
}

// The batch whose next piece is to be read now; null when none is, or all have to wait.
std::shared_ptr<Batch> ReadPool::next_batch() {
  for (const Queue& queue : waiting_) {
    const auto found = std::find_if(queue.begin(), queue.end(), [&](const auto& batch) {
      return lanes_[batch->lane].running < lanes_[batch->lane].threads;
    });
    if (found != queue.end()) return *found;
    // What is less urgent waits with it.
    if (!queue.empty()) return nullptr;
  }
  return nullptr;
}

void ReadPool::run() {
  Transfer transfer(uncached_, preadv_);
  std::unique_lock<std::mutex> locked(lock_);
  for (;;) {
    const std::shared_ptr<Batch> batch = next_batch();
    if (!batch) {
      const bool blocked = anything_waits();
      if (!blocked && stopping_) return;
      blocked_ += blocked;
      work_waits_.wait(locked);
      blocked_ -= blocked;
      continue;
    }
    const Piece piece = batch->pieces[batch->next++];
    ++batch->running;
    ++lanes_[batch->lane].running;
    if (batch->next == batch->last) forget(*batch);
    // Whoever takes a piece wakes the next one, if there is room for it.
    if (blocked_ && stopping_) {
      work_waits_.notify_all();
    } else if (blocked_ && next_batch()) {
      work_waits_.notify_one();
    }
    locked.unlock();

    const Request& request = batch->requests[size_t(piece.request)];
    const auto started = Clock::now();
    Outcome outcome;
    try {
      outcome = transfer.fill(request.fd, Cursor(request.buffers.data(), request.offset),
                              piece.begin, piece.end);
    } catch (const std::exception&) {
      outcome = {piece.begin, ENOMEM};
    }
    const double seconds = Seconds(Clock::now() - started).count();

    locked.lock();
    note(*batch, piece, outcome, seconds);
  }
}

void ReadPool::note(Batch& batch, const Piece& piece, const Outcome& outcome, double seconds) {
  Request& request = batch.requests[size_t(piece.request)];
  totals_.seconds += seconds;
  const bool failed = outcome.error != FM_WHOLE;
  if (failed && (request.failed_piece < 0 || piece.begin < request.failed_piece)) {
    request.failed_piece = piece.begin;
    request.outcome = outcome;
  }
  --open_pieces_;
  if (--request.pieces_left == 0) {
    count_open(-1);
    if (request.outcome.error == FM_WHOLE) {
      ++totals_.reads;
      totals_.bytes += request.bytes;
    }
  }
  --batch.running;
  --lanes_[batch.lane].running;
  if (batch.ended()) batch_ended_.notify_all();
}

int64_t ReadPool::cancel(Batch& batch) {
  std::lock_guard<std::mutex> locked(lock_);
  return cancel_locked(batch);
}

int64_t ReadPool::cancel_locked(Batch& batch) {
  size_t last = batch.next;
  while (last < batch.last && !batch.pieces[last].first) ++last;
  int64_t dropped = 0;
  for (size_t i = last; i < batch.last; ++i) {
    if (!batch.pieces[i].first) continue;
    Request& request = batch.requests[size_t(batch.pieces[i].request)];
    request.outcome = {request.offset, FM_DROPPED};
    ++dropped;
  }
  if (dropped) {
    open_pieces_ -= int64_t(batch.last - last);
    batch.last = last;
    count_open(-dropped);
    if (batch.next == last) {
      forget(batch);
      if (blocked_) work_waits_.notify_all();
      batch_ended_.notify_all();
    }
  }
  return dropped;
}

// Take a batch out of its queue.
void ReadPool::forget(const Batch& batch) {
  for (Queue& queue : waiting_) {
    const auto found =
        std::find_if(queue.begin(), queue.end(), [&](auto& b) { return b.get() == &batch; });
    if (found == queue.end()) continue;
    queue.erase(found);
    return;
  }
}

int64_t ReadPool::wait(const std::vector<const Batch*>& batches, double seconds) {
  const auto ended = [](const Batch* batch) { return batch->ended(); };
  std::unique_lock<std::mutex> locked(lock_);
  auto found = std::find_if(batches.begin(), batches.end(), ended);
  // A look is free; a wait of no time at all still sleeps until a timer's next tick.
  if (found == batches.end() && seconds > 0) {
    batch_ended_.wait_for(locked, Seconds(seconds), [&] {
      found = std::find_if(batches.begin(), batches.end(), ended);
      return found != batches.end();
    });
  }
  return found == batches.end() ? -1 : found - batches.begin();
}

bool ReadPool::drain(double seconds) {
  std::unique_lock<std::mutex> locked(lock_);
  for (auto& queue : waiting_) {
    const auto batches = queue;
    for (const auto& batch : batches) cancel_locked(*batch);
  }
  return batch_ended_.wait_for(locked, Seconds(seconds), [&] { return open_ == 0; });
}

fm_read_counters ReadPool::counters() {
  std::lock_guard<std::mutex> locked(lock_);
  count_open(0);
  return totals_;
}

void ReadPool::close() {
  {
    std::lock_guard<std::mutex> locked(lock_);
    stopping_ = true;
  }
  work_waits_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

void ReadPool::count_open(int64_t change) {
  const auto now = Clock::now();
  if (open_) {
    const double passed = Seconds(now - clock_).count();
    totals_.busy_seconds += passed;
    totals_.open_seconds += passed * double(open_);
  }
  clock_ = now;
  open_ += change;
}

}  // namespace flashmoe
