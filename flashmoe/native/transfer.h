// Filling one piece of a request with preadv.
#ifndef FLASHMOE_TRANSFER_H
#define FLASHMOE_TRANSFER_H

#include <stdint.h>
#include <sys/uio.h>

#include <memory>
#include <vector>

#include "flashmoe_reader.h"

namespace flashmoe {

// What uncached reads are aligned to (file offset, address and size), and where pieces are cut.
constexpr int64_t kBlock = 4096;

// The buffers of a request, found by file offset; offsets may only grow.
class Cursor {
 public:
  Cursor(const iovec* buffers, int64_t start) : buffer_(buffers), start_(start) {}

  void seek(int64_t offset) {
    while (offset >= start_ + int64_t(buffer_->iov_len)) {
      start_ += int64_t(buffer_->iov_len);
      ++buffer_;
    }
    at_ = offset - start_;
  }
  uint8_t* address() const { return static_cast<uint8_t*>(buffer_->iov_base) + at_; }
  int64_t left() const { return int64_t(buffer_->iov_len) - at_; }

 private:
  const iovec* buffer_;
  int64_t start_;
  int64_t at_ = 0;
};

struct Piece {
  int64_t request;  // its index in the batch
  int64_t begin, end;  // in the file
  bool first;  // of its request
};

struct Outcome {
  int64_t offset;  // up to where the file was read
  int32_t error;  // FM_WHOLE, FM_END_OF_FILE, or an errno
};

// Fills pieces one at a time: a thread has its own.
//
// Reads begin and end where blocks do. A block that lies whole and aligned within one buffer is
// read in place, others by way of a bounce buffer. With blocks of one byte that is every byte in
// place, which is what reads through the page cache do.
class Transfer {
 public:
  Transfer(bool uncached, fm_preadv preadv);

  // `cursor` stands anywhere before `begin`.
  Outcome fill(int fd, Cursor cursor, int64_t begin, int64_t end);

 private:
  struct Bounced {
    const uint8_t* bytes;
    int64_t begin, end;  // in the file
  };

  void assemble(Cursor cursor, int64_t position, int64_t done, int64_t end);
  bool add_bounce(int64_t position);

  const int64_t block_;
  const fm_preadv preadv_;
  std::vector<iovec> vectors_;
  std::vector<Bounced> bounced_;
  std::unique_ptr<uint8_t[]> memory_;
  uint8_t* bounce_ = nullptr;
  int64_t used_ = 0;
  bool last_bounced_ = false;
};

}  // namespace flashmoe
#endif
