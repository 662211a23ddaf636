// The pool that reads: batches cut into pieces, demanded ones first.

#include <errno.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "flashmoe_reader.h"
#include "transfer.h"

namespace flashmoe {
namespace {

// Pieces as in io/pieces.py.
constexpr int64_t kLeastPiece = 128 * 1024;
constexpr int64_t kMostPiece = 1024 * 1024;
constexpr int kPriorities = 2;

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

// How many forks lie between this process and the one that loaded the library.
std::atomic<uint64_t> forks{0};
void note_fork() { forks.fetch_add(1); }

struct Request {
  int fd;
  int64_t offset, bytes;
  std::vector<iovec> buffers;
  int64_t pieces_left;
  // Of the first of its pieces that failed.
  int64_t failed_piece;
  Outcome outcome;
};

// Pieces up to `next` have been taken, those from `last` on never will be.
struct Batch {
  std::vector<Request> requests;
  std::vector<Piece> pieces;
  size_t next = 0, last = 0;
  int64_t running = 0;

  bool ended() const { return next == last && running == 0; }
};

class Pool {
 public:
  Pool(int threads, bool uncached, fm_preadv preadv)
      : most_threads_(std::max(1, threads)), uncached_(uncached), preadv_(preadv) {}

  std::shared_ptr<Batch> submit(const fm_read* reads, int64_t n, int priority);
  int64_t cancel(Batch& batch);
  int64_t wait(fm_ticket* const* tickets, int64_t n, double seconds);
  bool drain(double seconds);
  fm_read_counters counters();
  void close();

  const uint64_t process = forks.load();

 private:
  void start_threads();
  void run();
  void note(Batch& batch, const Piece& piece, const Outcome& outcome, double seconds);
  int64_t cancel_locked(Batch& batch);
  void count_open(int64_t change);

  const int most_threads_;
  const bool uncached_;
  const fm_preadv preadv_;
  std::mutex lock_;
  std::condition_variable work_waits_, batch_ended_;
  std::vector<std::thread> threads_;
  std::deque<std::shared_ptr<Batch>> waiting_[kPriorities];
  int64_t open_ = 0;         // requests not ended
  int64_t open_pieces_ = 0;
  Clock::time_point clock_ = Clock::now();
  fm_read_counters totals_ = {};
  bool stopping_ = false;
};

}  // namespace
}  // namespace flashmoe

struct fm_ticket {
  std::shared_ptr<flashmoe::Pool> pool;
  std::shared_ptr<flashmoe::Batch> batch;

  // In a child process nothing is left of the parent's threads.
  bool forked() const { return pool->process != flashmoe::forks.load(); }
};

struct fm_reader {
  int32_t threads, uncached;
  fm_preadv preadv;
  std::shared_ptr<flashmoe::Pool> pool;

  bool forked() const { return pool->process != flashmoe::forks.load(); }
};

namespace flashmoe {
namespace {

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

std::shared_ptr<Batch> Pool::submit(const fm_read* reads, int64_t n, int priority) {
  auto batch = std::make_shared<Batch>();
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
  const int64_t most = std::clamp(total / most_threads_, kLeastPiece, kMostPiece);
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

void Pool::start_threads() {
  const auto wanted = size_t(std::min<int64_t>(most_threads_, open_pieces_));
  threads_.reserve(size_t(most_threads_));
  while (threads_.size() < wanted) threads_.emplace_back(&Pool::run, this);
}

void Pool::run() {
  Transfer transfer(uncached_, preadv_);
  std::unique_lock<std::mutex> locked(lock_);
  for (;;) {
    auto* queue = &waiting_[FM_DEMAND];
    if (queue->empty()) queue = &waiting_[FM_FORECAST];
    if (queue->empty()) {
      if (stopping_) return;
      work_waits_.wait(locked);
      continue;
    }
    const std::shared_ptr<Batch> batch = queue->front();
    const Piece piece = batch->pieces[batch->next++];
    ++batch->running;
    if (batch->next == batch->last) queue->pop_front();
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

void Pool::note(Batch& batch, const Piece& piece, const Outcome& outcome, double seconds) {
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
  if (batch.ended()) batch_ended_.notify_all();
}

int64_t Pool::cancel(Batch& batch) {
  std::lock_guard<std::mutex> locked(lock_);
  return cancel_locked(batch);
}

int64_t Pool::cancel_locked(Batch& batch) {
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
      for (auto& queue : waiting_) {
        const auto found =
            std::find_if(queue.begin(), queue.end(), [&](auto& b) { return b.get() == &batch; });
        if (found == queue.end()) continue;
        queue.erase(found);
        break;
      }
      batch_ended_.notify_all();
    }
  }
  return dropped;
}

int64_t Pool::wait(fm_ticket* const* tickets, int64_t n, double seconds) {
  int64_t ended = -1;
  std::unique_lock<std::mutex> locked(lock_);
  batch_ended_.wait_for(locked, Seconds(seconds), [&] {
    for (int64_t i = 0; i < n && ended < 0; ++i) {
      if (tickets[i]->batch->ended()) ended = i;
    }
    return ended >= 0;
  });
  return ended;
}

bool Pool::drain(double seconds) {
  std::unique_lock<std::mutex> locked(lock_);
  for (auto& queue : waiting_) {
    const auto batches = queue;
    for (const auto& batch : batches) cancel_locked(*batch);
  }
  return batch_ended_.wait_for(locked, Seconds(seconds), [&] { return open_ == 0; });
}

fm_read_counters Pool::counters() {
  std::lock_guard<std::mutex> locked(lock_);
  count_open(0);
  return totals_;
}

void Pool::close() {
  {
    std::lock_guard<std::mutex> locked(lock_);
    stopping_ = true;
  }
  work_waits_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

void Pool::count_open(int64_t change) {
  const auto now = Clock::now();
  if (open_) {
    const double passed = Seconds(now - clock_).count();
    totals_.busy_seconds += passed;
    totals_.open_seconds += passed * double(open_);
  }
  clock_ = now;
  open_ += change;
}

// What a fork left behind is never touched again: its locks may be held, its threads are gone.
template <typename T>
void leave(std::shared_ptr<T>& pointer) {
  new std::shared_ptr<T>(std::move(pointer));
}

}  // namespace
}  // namespace flashmoe

using namespace flashmoe;

fm_reader* fm_reader_open(int32_t threads, int32_t uncached, fm_preadv preadv) {
  static const int registered = pthread_atfork(nullptr, nullptr, note_fork);
  (void)registered;
  try {
    auto pool = std::make_shared<Pool>(threads, uncached != 0, preadv);
    return new fm_reader{threads, uncached, preadv, std::move(pool)};
  } catch (const std::exception&) {
    return nullptr;
  }
}

int fm_reader_submit(fm_reader* reader, const fm_read* reads, int64_t n, int32_t priority,
                     fm_ticket** ticket) {
  if (!reader || (n && !reads) || n < 0 || priority < 0 || priority >= kPriorities || !ticket)
    return FM_BAD_ARGUMENT;
  try {
    if (reader->forked()) {
      auto fresh =
          std::make_shared<Pool>(reader->threads, reader->uncached != 0, reader->preadv);
      leave(reader->pool);
      reader->pool = std::move(fresh);
    }
    auto made = std::make_unique<fm_ticket>();
    made->pool = reader->pool;
    made->batch = reader->pool->submit(reads, n, priority);
    *ticket = made.release();
  } catch (const std::exception&) {
    return FM_NO_RESOURCES;
  }
  return FM_OK;
}

int fm_reader_drain(fm_reader* reader, double seconds) {
  return reader->forked() || reader->pool->drain(seconds);
}

void fm_reader_counters(fm_reader* reader, fm_read_counters* counters) {
  *counters = reader->forked() ? fm_read_counters{} : reader->pool->counters();
}

void fm_reader_close(fm_reader* reader) {
  if (reader->forked()) {
    leave(reader->pool);
  } else {
    reader->pool->close();
  }
  delete reader;
}

int64_t fm_ticket_wait(fm_ticket* const* tickets, int64_t n, double seconds) {
  for (int64_t i = 0; i < n; ++i) {
    if (tickets[i]->forked()) return i;
  }
  return n > 0 ? tickets[0]->pool->wait(tickets, n, seconds) : -1;
}

int64_t fm_ticket_cancel(fm_ticket* ticket) {
  return ticket->forked() ? 0 : ticket->pool->cancel(*ticket->batch);
}

int32_t fm_ticket_failure(fm_ticket* ticket, fm_failure* failure) {
  // Read without the lock: nobody writes to a batch that has ended, and in a child process
  // nobody can.
  const bool cut_off = ticket->forked() && !ticket->batch->ended();
  int32_t error = FM_WHOLE;
  const auto& requests = ticket->batch->requests;
  for (size_t i = 0; i < requests.size(); ++i) {
    Outcome outcome = requests[i].outcome;
    if (cut_off && outcome.error == FM_WHOLE && requests[i].pieces_left) {
      outcome = {requests[i].offset, FM_DROPPED};
    }
    const bool dropped = outcome.error == FM_DROPPED;
    if (outcome.error == FM_WHOLE || (dropped && error != FM_WHOLE)) continue;
    *failure = {int64_t(i), outcome.offset, outcome.error};
    error = outcome.error;
    if (!dropped) break;
  }
  return error;
}

void fm_ticket_free(fm_ticket* ticket) {
  if (ticket->forked()) {
    leave(ticket->pool);
    leave(ticket->batch);
  }
  delete ticket;
}
