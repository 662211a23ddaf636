#include "pool.h"

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "flashmoe_native.h"

namespace flashmoe {
namespace {

int usable_cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, int(std::thread::hardware_concurrency()));
}

std::atomic<int> requested_threads{0};

// Calls follow one another closely: to fall asleep and be woken costs more than to look on for a
// moment. After that a thread sleeps.
constexpr std::chrono::microseconds kPatience{40};

template <class Condition>
bool soon(Condition condition) {
  const auto end = std::chrono::steady_clock::now() + kPatience;
  do {
    for (int i = 0; i < 32; ++i) {
      if (condition()) return true;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

class Pool {
 public:
  void run(int64_t count, int threads, const std::function<void(int64_t)>& work) {
    std::lock_guard<std::mutex> one_call(call_);
    const int helpers = int(std::min<int64_t>(threads, count)) - 1;
    while (started_ < helpers) {
      std::thread(&Pool::help, this, started_).detach();
      ++started_;
    }
    {
      std::lock_guard<std::mutex> lock(state_);
      work_ = &work;
      count_ = count;
      next_.store(0);
      helpers_ = helpers;
      busy_.store(helpers);
      round_.fetch_add(1);
    }
    wake_.notify_all();
    take_all();
    const auto finished = [this] { return busy_.load() == 0; };
    if (soon(finished)) return;
    std::unique_lock<std::mutex> lock(state_);
    done_.wait(lock, finished);
  }

 private:
  void take_all() {
    for (int64_t i; (i = next_.fetch_add(1)) < count_;) (*work_)(i);
  }

  void help(int index) {
    uint64_t seen = 0;
    for (;;) {
      soon([&] { return round_.load() != seen; });
      {
        std::unique_lock<std::mutex> lock(state_);
        wake_.wait(lock, [&] { return round_.load() != seen && index < helpers_; });
        seen = round_.load();
      }
      take_all();
      std::lock_guard<std::mutex> lock(state_);
      if (busy_.fetch_sub(1) == 1) done_.notify_one();
    }
  }

  std::mutex call_;
  std::mutex state_;
  std::condition_variable wake_, done_;
  const std::function<void(int64_t)>* work_ = nullptr;
  std::atomic<int64_t> next_{0};
  int64_t count_ = 0;
  std::atomic<uint64_t> round_{0};
  std::atomic<int> busy_{0};
  int helpers_ = 0, started_ = 0;
};

std::atomic<Pool*> shared_pool{nullptr};

// Threads do not survive a fork. The parent's pool is left behind: its locks may be held.
void forget_pool() { shared_pool.store(nullptr); }

Pool& pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
  (void)registered;
  Pool* current = shared_pool.load();
  if (!current) {
    // Never freed: its threads run until the process ends.
    Pool* created = new Pool;
    if (shared_pool.compare_exchange_strong(current, created)) return *created;
    delete created;
  }
  return *current;
}

}  // namespace

void run_parallel(int64_t count, const std::function<void(int64_t)>& work) {
  const int threads = fm_threads();
  if (threads == 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  pool().run(count, threads, work);
}

}  // namespace flashmoe

int fm_threads(void) {
  const int requested = flashmoe::requested_threads.load();
  return requested > 0 ? requested : flashmoe::usable_cores();
}

void fm_set_threads(int n) { flashmoe::requested_threads.store(n > 0 ? n : 0); }
