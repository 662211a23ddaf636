#include "transfer.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>

#include <algorithm>

namespace flashmoe {
namespace {

// What one preadv takes at most on Linux and macOS (IOV_MAX).
constexpr size_t kMostBuffers = 1024;
constexpr int64_t kBounceBytes = 256 * 1024;

int64_t system_preadv(int32_t fd, const iovec* buffers, int32_t n, int64_t offset) {
  const ssize_t count = preadv(fd, buffers, n, off_t(offset));
  return count < 0 ? -int64_t(errno) : int64_t(count);
}

bool goes_on(int fd, int64_t offset) {
  struct stat status;
  return fstat(fd, &status) == 0 && int64_t(status.st_size) > offset;
}

}  // namespace

Transfer::Transfer(bool uncached, fm_preadv preadv)
    : block_(uncached ? kBlock : 1), preadv_(preadv ? preadv : system_preadv) {}

Outcome Transfer::fill(int fd, Cursor cursor, int64_t begin, int64_t end) {
  int64_t done = begin;
  while (done < end) {
    const int64_t position = done / block_ * block_;
    cursor.seek(done);
    assemble(cursor, position, done, end);
    int64_t count;
    do {
      count = preadv_(fd, vectors_.data(), int32_t(vectors_.size()), position);
    } while (count == -EINTR);
    if (count < 0) return {done, int32_t(-count)};
    const int64_t valid = std::min(position + count, end);
    if (valid <= done) {
      // Nothing new came: the file ends here, unless the disk gives part of a block.
      const bool part = count > 0 && block_ > 1 && goes_on(fd, done);
      return {done, part ? EIO : FM_END_OF_FILE};
    }
    Cursor target = cursor;
    for (const Bounced& from : bounced_) {
      const int64_t last = std::min(from.end, valid);
      for (int64_t at = std::max(from.begin, done); at < last;) {
        target.seek(at);
        const int64_t size = std::min(last - at, target.left());
        memcpy(target.address(), from.bytes + (at - from.begin), size_t(size));
        at += size;
      }
    }
    done = valid;
  }
  return {end, FM_WHOLE};
}

// Buffers for one read from `position`: of the file's done .. end, and of what lies around it in
// the same blocks.
void Transfer::assemble(Cursor cursor, int64_t position, int64_t done, int64_t end) {
  vectors_.clear();
  bounced_.clear();
  used_ = 0;
  last_bounced_ = false;
  while (position < end && vectors_.size() < kMostBuffers) {
    int64_t size = 0;
    if (position >= done) {
      cursor.seek(position);
      size = std::min(cursor.left(), end - position) / block_ * block_;
      if (reinterpret_cast<uintptr_t>(cursor.address()) % uintptr_t(block_)) size = 0;
    }
    if (size) {
      vectors_.push_back({cursor.address(), size_t(size)});
      last_bounced_ = false;
      position += size;
    } else {
      if (!add_bounce(position)) return;
      position += block_;
    }
  }
}

// One more block that goes through the bounce buffer; false when that is full.
bool Transfer::add_bounce(int64_t position) {
  if (used_ == kBounceBytes) return false;
  if (!bounce_) {
    memory_.reset(new uint8_t[kBounceBytes + kBlock]);
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    bounce_ = memory_.get() + (kBlock - address % kBlock) % kBlock;
  }
  if (last_bounced_) {
    vectors_.back().iov_len += size_t(block_);
    bounced_.back().end += block_;
  } else {
    vectors_.push_back({bounce_ + used_, size_t(block_)});
    bounced_.push_back({bounce_ + used_, position, position + block_});
    last_bounced_ = true;
  }
  used_ += block_;
  return true;
}

}  // namespace flashmoe
