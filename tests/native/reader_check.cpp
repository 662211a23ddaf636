// The reader pool on heap buffers of the exact size, with errors injected: meant to be compiled
// with sanitizers. Takes a file to write to; exit status 1 on an error.

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "flashmoe_reader.h"

namespace {

constexpr int64_t kSize = 3000001;
std::vector<uint8_t> content(kSize);
bool good = true;

void expect(bool condition, const char* what) {
  if (condition) return;
  fprintf(stderr, "wrong: %s\n", what);
  good = false;
}

struct Random {
  uint64_t state;
  int64_t below(int64_t n) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return int64_t((state >> 33) % uint64_t(n));
  }
};

// Buffers of one request; some of them aligned, most not.
struct Target {
  int64_t offset;
  std::vector<std::unique_ptr<uint8_t, void (*)(void*)>> memory;
  std::vector<iovec> buffers;

  explicit Target(Random& random) {
    int64_t total = 0;
    for (int64_t i = 0, n = 1 + random.below(5); i < n; ++i) {
      int64_t size = 1 + random.below(random.below(2) ? 300 : 200000);
      void* at = nullptr;
      if (random.below(2)) {
        size = (size / 4096 + 1) * 4096;
        if (posix_memalign(&at, 4096, size_t(size))) abort();
      } else {
        at = malloc(size_t(size));
      }
      memory.emplace_back(static_cast<uint8_t*>(at), free);
      buffers.push_back({at, size_t(size)});
      total += size;
    }
    offset = random.below(3) ? random.below(kSize - total) : (kSize - total) / 4096 * 4096;
  }
  fm_read read(int fd) const { return {offset, buffers.data(), int32_t(buffers.size()), fd}; }
  bool holds() const {
    int64_t at = offset;
    for (const iovec& buffer : buffers) {
      if (memcmp(buffer.iov_base, &content[size_t(at)], buffer.iov_len)) return false;
      at += int64_t(buffer.iov_len);
    }
    return true;
  }
};

std::atomic<uint64_t> calls{0};

// Interrupted, cut short by blocks, or as asked for.
int64_t unsteady(int32_t fd, const iovec* buffers, int32_t n, int64_t offset) {
  const uint64_t call = calls.fetch_add(1);
  if (call % 5 == 1) return -EINTR;
  iovec first = buffers[0];
  if (call % 3 == 2 && n > 1) n = 1;
  if (call % 7 == 3 && first.iov_len > 8192) {
    first.iov_len = 4096;
    buffers = &first;
    n = 1;
  }
  const ssize_t count = preadv(fd, buffers, n, off_t(offset));
  return count < 0 ? -errno : count;
}

int64_t broken(int32_t fd, const iovec* buffers, int32_t n, int64_t offset) {
  int64_t end = offset;
  for (int32_t i = 0; i < n; ++i) end += int64_t(buffers[i].iov_len);
  if (offset <= 2000000 && 2000000 < end) return -EIO;
  return preadv(fd, buffers, n, off_t(offset));
}

void wait(fm_ticket* ticket) {
  while (fm_ticket_wait(&ticket, 1, 0.01) != 0) {
  }
}

void batches(fm_reader* reader, int fd, uint64_t seed, int32_t lane) {
  Random random{seed};
  for (int round = 0; round < 40; ++round) {
    std::vector<Target> targets;
    std::vector<fm_read> reads;
    for (int64_t i = 0, n = random.below(7); i < n; ++i) targets.emplace_back(random);
    for (const Target& target : targets) reads.push_back(target.read(fd));
    fm_ticket* tickets[2];
    const auto half = int64_t(reads.size() / 2), rest = int64_t(reads.size()) - half;
    expect(!fm_reader_submit(reader, reads.data(), half, FM_PREFETCH, lane, &tickets[0]), "submit");
    // Now and then the other way round: a lane without room may not keep others waiting.
    const int32_t other = round % 3 ? lane : 0;
    expect(!fm_reader_submit(reader, reads.data() + half, rest, FM_DEMAND, other, &tickets[1]),
           "submit");
    fm_failure failure;
    if (round % 4 == 0) {
      const int64_t dropped = fm_ticket_cancel(tickets[0]);
      wait(tickets[0]);
      const int32_t error = fm_ticket_failure(tickets[0], &failure);
      expect(error == (dropped ? FM_DROPPED : FM_WHOLE), "what was dropped");
      int64_t whole = half - dropped;
      for (int64_t i = 0; i < whole; ++i) expect(targets[size_t(i)].holds(), "before a drop");
    }
    while (fm_ticket_wait(tickets, 2, 0.01) < 0) {
    }
    for (fm_ticket* ticket : tickets) wait(ticket);
    expect(fm_ticket_failure(tickets[1], &failure) == FM_WHOLE, "failure");
    for (size_t i = size_t(half); i < targets.size(); ++i) expect(targets[i].holds(), "bytes");
    for (fm_ticket* ticket : tickets) fm_ticket_free(ticket);
  }
}

void failures(int fd, int uncached) {
  fm_reader* reader = fm_reader_open(3, 0, uncached, broken);
  std::vector<uint8_t> buffer(4001000);
  std::vector<iovec> parts;
  for (size_t i = 0; i < 4001; ++i) parts.push_back({&buffer[i * 1000], 1000});
  const fm_read reads[] = {{100, parts.data(), 1500, fd},
                           {kSize - 5, parts.data() + 1500, 1, fd},
                           {0, parts.data() + 1501, 2500, fd}};
  for (int first = 0; first < 3; ++first) {
    fm_ticket* ticket;
    expect(!fm_reader_submit(reader, reads + first, 3 - first, FM_DEMAND, 0, &ticket), "submit");
    wait(ticket);
    fm_failure failure;
    const int32_t error = fm_ticket_failure(ticket, &failure);
    // The last byte of the file is that of the second request, which the first one precedes.
    expect(error == (first == 2 ? EIO : FM_END_OF_FILE), "the first failure");
    expect(failure.request == (first == 0 ? 1 : 0), "its request");
    expect(first == 2 ? failure.offset <= 2000000 : failure.offset == kSize, "its offset");
    fm_ticket_free(ticket);
  }
  fm_read_counters counters;
  fm_reader_counters(reader, &counters);
  expect(counters.reads == 1 && counters.bytes == 1500000, "counters");
  expect(fm_reader_submit(reader, reads, 1, 3, 0, nullptr) == FM_BAD_ARGUMENT, "bad argument");
  fm_reader_close(reader);
}

// Tickets outlive their reader; what was submitted is read before it closes.
void closing(int fd) {
  fm_reader* reader = fm_reader_open(4, 0, 0, nullptr);
  Random random{9};
  std::vector<Target> targets;
  std::vector<fm_ticket*> tickets;
  for (int i = 0; i < 50; ++i) targets.emplace_back(random);
  for (const Target& target : targets) {
    const fm_read read = target.read(fd);
    tickets.emplace_back();
    expect(!fm_reader_submit(reader, &read, 1, FM_PREFETCH, 0, &tickets.back()), "submit");
  }
  fm_reader_close(reader);
  for (size_t i = 0; i < targets.size(); ++i) {
    wait(tickets[i]);
    expect(targets[i].holds(), "closing");
    fm_ticket_free(tickets[i]);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  Random random{1};
  for (uint8_t& byte : content) byte = uint8_t(random.below(256));
  const int out = open(argv[1], O_CREAT | O_TRUNC | O_WRONLY, 0600);
  expect(write(out, content.data(), content.size()) == ssize_t(kSize), "writing");
  close(out);
  const int fd = open(argv[1], O_RDONLY);
  for (int uncached : {0, 1}) {
    for (fm_preadv preadv : {fm_preadv(nullptr), fm_preadv(unsteady)}) {
      // Pieces of a block, which is the least there are, with reads that may come up short.
      const int64_t piece = preadv ? 4096 : 0;
      fm_reader* reader = fm_reader_open(4, piece, uncached, preadv);
      const int32_t narrow = fm_reader_add_lane(reader, 1, 8192);
      expect(narrow == 1, "a lane");
      std::vector<std::thread> callers;
      for (uint64_t seed : {1, 2, 3})
        callers.emplace_back([=] { batches(reader, fd, seed, seed == 3 ? narrow : 0); });
      for (std::thread& caller : callers) caller.join();
      while (!fm_reader_drain(reader, 0.01)) {
      }
      fm_read_counters counters;
      fm_reader_counters(reader, &counters);
      expect(counters.busy_seconds > 0 && counters.open_seconds >= counters.busy_seconds,
             "counters");
      printf("uncached %d: %lld reads\n", uncached, static_cast<long long>(counters.reads));
      fm_reader_close(reader);
    }
    failures(fd, uncached);
  }
  closing(fd);
  close(fd);
  return good ? 0 : 1;
}
