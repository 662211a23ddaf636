// Threads that sleep until there is work, one per core that this process may use.
#ifndef FLASHMOE_POOL_H
#define FLASHMOE_POOL_H

#include <stdint.h>

#include <functional>

namespace flashmoe {

// Calls work(i) once for every i < count, on the calling thread and the pool's; returns when all
// are done. One call at a time; others wait. Throws std::system_error without a new thread.
void run_parallel(int64_t count, const std::function<void(int64_t)>& work);

}  // namespace flashmoe
#endif
