/* Reading byte ranges of files into memory, concurrently: the reader's part of the interface.
 *
 * A request is cut into pieces, which a pool of threads reads in order of priority; its buffers
 * have to stay until its batch has ended. Threads do not survive a fork: in the child a reader
 * starts anew, and batches of the parent count as ended there, dropped.
 */
#ifndef FLASHMOE_READER_H
#define FLASHMOE_READER_H

#include <stdint.h>
#include <sys/uio.h>

#include "flashmoe_native.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct fm_reader fm_reader;
typedef struct fm_ticket fm_ticket;

enum { FM_DEMAND = 0, FM_PREFETCH = 1, FM_WARM_START = 2 };

/* What may take preadv's place: the bytes read, or minus an errno. */
typedef int64_t (*fm_preadv)(int32_t fd, const struct iovec* buffers, int32_t n_buffers,
                             int64_t offset);

/* Fill buffers, none of them empty, one after the other from offset of fd. */
typedef struct {
  int64_t offset;
  const struct iovec* buffers; /* copied when the request is submitted */
  int32_t n_buffers;
  int32_t fd;
} fm_read;

/* What became of the first request that is not whole. */
typedef struct {
  int64_t request; /* its index in the batch */
  int64_t offset;  /* where in the file; the request's offset when it was dropped */
  int32_t error;   /* an errno, or one of the following */
} fm_failure;

enum {
  FM_WHOLE = 0,
  FM_END_OF_FILE = -1, /* the file ends at offset */
  FM_DROPPED = -2      /* cancelled before it began */
};

/* Totals: reads and bytes of whole requests; seconds added up over concurrent pieces; seconds
 * with requests not ended; and the integral of their number over time. */
typedef struct {
  int64_t reads;
  int64_t bytes;
  double seconds;
  double busy_seconds;
  double open_seconds;
} fm_read_counters;

/* Uncached: the descriptors were opened with O_DIRECT or have F_NOCACHE set. Pieces have at most
 * piece_bytes; with 0 a batch has one for each thread, within bounds. preadv may be NULL. NULL
 * without memory. */
FM_EXPORT fm_reader* fm_reader_open(int32_t threads, int64_t piece_bytes, int32_t uncached,
                                    fm_preadv preadv);

/* A lane: batches submitted to it are cut into pieces of piece_bytes (0 as above), of which at
 * most so many are read at a time; lane 0 is that of fm_reader_open. Priorities hold across
 * lanes. Its number, or -1 without memory. */
FM_EXPORT int32_t fm_reader_add_lane(fm_reader* reader, int32_t threads, int64_t piece_bytes);

/* Queue a batch behind earlier ones of its priority; FM_OK puts a ticket into *ticket, which is
 * to be freed. FM_NO_RESOURCES, when there is no thread or memory: nothing will be read. */
FM_EXPORT int fm_reader_submit(fm_reader* reader, const fm_read* reads, int64_t n,
                               int32_t priority, int32_t lane, fm_ticket** ticket);

/* Drop everything that has not begun; 1 once nothing is being read, 0 when seconds have passed. */
FM_EXPORT int fm_reader_drain(fm_reader* reader, double seconds);

FM_EXPORT void fm_reader_counters(fm_reader* reader, fm_read_counters* counters);

/* Wait for everything submitted and free the reader. Tickets outlive it. */
FM_EXPORT void fm_reader_close(fm_reader* reader);

/* The index of the first ticket, all of one reader, whose batch has ended; -1 when none has
 * after so many seconds. */
FM_EXPORT int64_t fm_ticket_wait(fm_ticket* const* tickets, int64_t n, double seconds);

/* Drop the requests that have not begun; returns how many. */
FM_EXPORT int64_t fm_ticket_cancel(fm_ticket* ticket);

/* FM_WHOLE, or the error of *failure: that of the first request that failed, or else of the
 * first that was dropped. For batches that have ended. */
FM_EXPORT int32_t fm_ticket_failure(fm_ticket* ticket, fm_failure* failure);

/* For batches that have ended. */
FM_EXPORT void fm_ticket_free(fm_ticket* ticket);

#ifdef __cplusplus
}
#endif
#endif
