// The C interface to the pool that reads, and what a fork means for it.

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <utility>
#include <vector>

#include "flashmoe_reader.h"
#include "read_pool.h"

using namespace flashmoe;

namespace {

// How many forks lie between this process and the one that loaded the library.
std::atomic<uint64_t> forks{0};
void note_fork() { forks.fetch_add(1); }

// What a fork left behind is never touched again: its locks may be held, its threads are gone.
template <typename T>
void leave(std::shared_ptr<T>& pointer) {
  new std::shared_ptr<T>(std::move(pointer));
}

}  // namespace

struct fm_ticket {
  std::shared_ptr<ReadPool> pool;
  std::shared_ptr<Batch> batch;
  uint64_t process;

  bool forked() const { return process != forks.load(); }
};

struct fm_reader {
  std::vector<Lane> lanes;
  bool uncached;
  fm_preadv preadv;
  std::shared_ptr<ReadPool> pool;
  uint64_t process;

  bool forked() const { return process != forks.load(); }
};

fm_reader* fm_reader_open(int32_t threads, int64_t piece_bytes, int32_t uncached,
                          fm_preadv preadv) {
  static const int registered = pthread_atfork(nullptr, nullptr, note_fork);
  (void)registered;
  try {
    std::vector<Lane> lanes = {{std::max(1, threads), piece_bytes}};
    auto pool = std::make_shared<ReadPool>(lanes, uncached != 0, preadv);
    return new fm_reader{std::move(lanes), uncached != 0, preadv, std::move(pool), forks.load()};
  } catch (const std::exception&) {
    return nullptr;
  }
}

int32_t fm_reader_add_lane(fm_reader* reader, int32_t threads, int64_t piece_bytes) {
  try {
    const Lane lane = {std::max(1, threads), piece_bytes};
    reader->lanes.push_back(lane);
    // A child process begins with all lanes.
    if (!reader->forked()) reader->pool->add_lane(lane);
  } catch (const std::exception&) {
    return -1;
  }
  return int32_t(reader->lanes.size() - 1);
}

int fm_reader_submit(fm_reader* reader, const fm_read* reads, int64_t n, int32_t priority,
                     int32_t lane, fm_ticket** ticket) {
  if (!reader || (n && !reads) || n < 0 || priority < 0 || priority >= kPriorities || !ticket)
    return FM_BAD_ARGUMENT;
  if (lane < 0 || size_t(lane) >= reader->lanes.size()) return FM_BAD_ARGUMENT;
  try {
    if (reader->forked()) {
      auto fresh =
          std::make_shared<ReadPool>(reader->lanes, reader->uncached, reader->preadv);
      leave(reader->pool);
      reader->pool = std::move(fresh);
      reader->process = forks.load();
    }
    auto made = std::make_unique<fm_ticket>();
    made->pool = reader->pool;
    made->process = reader->process;
    made->batch = reader->pool->submit(reads, n, priority, size_t(lane));
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
  std::vector<const Batch*> batches;
  for (int64_t i = 0; i < n; ++i) {
    if (tickets[i]->forked()) return i;
    batches.push_back(tickets[i]->batch.get());
  }
  return n > 0 ? tickets[0]->pool->wait(batches, seconds) : -1;
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
