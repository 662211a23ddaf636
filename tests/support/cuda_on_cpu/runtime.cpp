// See cuda_runtime.h. As strict as CUDA where that is cheap: memory is filled with rubbish, and
// what is captured into a graph runs when that is launched, not before.

#include "cuda_runtime.h"

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

thread_local uint3 threadIdx, blockIdx;

namespace {

constexpr unsigned WARP = 32;
// As many as `device.cu` hands over at most, those that a kernel does not have being null.
constexpr int ARGUMENTS = 16;

class Barrier {
 public:
  explicit Barrier(unsigned threads) : threads_(threads) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const unsigned turn = turn_;
    if (++here_ == threads_) {
      here_ = 0;
      ++turn_;
      all_.notify_all();
    } else {
      all_.wait(lock, [&] { return turn != turn_; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_;
  unsigned threads_, here_ = 0, turn_ = 0;
};

struct Warp {
  Barrier barrier{WARP};
  float values[WARP];
};

struct Block {
  explicit Block(unsigned threads) : barrier(threads) {
    for (unsigned i = 0; i < threads / WARP; ++i) warps.push_back(std::make_unique<Warp>());
  }
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
};

Block* block;

template <int... I>
void call(const void* kernel, void** arguments, std::integer_sequence<int, I...>) {
  using Kernel = void (*)(decltype(I, static_cast<void*>(nullptr))...);
  reinterpret_cast<Kernel>(reinterpret_cast<std::uintptr_t>(kernel))(arguments[I]...);
}

void run(const void* kernel, dim3 groups, dim3 threads, std::vector<void*> arguments) {
  Block mine(threads.x);
  block = &mine;
  std::vector<std::thread> all;
  for (unsigned i = 0; i < threads.x; ++i)
    all.emplace_back([&, i] {
      threadIdx = {i, 0, 0};
      for (unsigned y = 0; y < groups.y; ++y)
        for (unsigned x = 0; x < groups.x; ++x) {
          blockIdx = {x, y, 0};
          call(kernel, arguments.data(), std::make_integer_sequence<int, ARGUMENTS>());
          // Blocks share one place for what is __shared__.
          mine.barrier.wait();
        }
    });
  for (auto& thread : all) thread.join();
}

}  // namespace

struct Graph {
  std::vector<std::function<void()>> steps;
};
struct Stream {
  Graph* captured = nullptr;
};
struct Event {
  std::chrono::steady_clock::time_point at;
};

namespace {

cudaError_t enqueue(Stream* stream, std::function<void()> step) {
  if (stream && stream->captured) {
    stream->captured->steps.push_back(std::move(step));
  } else {
    step();
  }
  return cudaSuccess;
}

}  // namespace

void __syncthreads() { block->barrier.wait(); }
void __syncwarp() { block->warps[threadIdx.x / WARP]->barrier.wait(); }

float __shfl_xor_sync(unsigned, float value, int lanes) {
  Warp& warp = *block->warps[threadIdx.x / WARP];
  const unsigned lane = threadIdx.x % WARP;
  warp.values[lane] = value;
  warp.barrier.wait();
  const float other = warp.values[lane ^ unsigned(lanes)];
  warp.barrier.wait();
  return other;
}

const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaErrorMemoryAllocation ? "out of memory" : "invalid argument";
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  std::strcpy(properties->name, "a CPU");
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

cudaError_t cudaMalloc(void** address, std::size_t bytes) {
  *address = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (!*address) return cudaErrorMemoryAllocation;
  std::memset(*address, 0xA5, bytes);
  return cudaSuccess;
}

cudaError_t cudaFree(void* address) {
  std::free(address);
  return cudaSuccess;
}

cudaError_t cudaMemset(void* address, int value, std::size_t bytes) {
  std::memset(address, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(
    void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  return enqueue(stream, [=] { std::memcpy(to, from, bytes); });
}

cudaError_t cudaLaunchKernel(
    const void* kernel,
    dim3 groups,
    dim3 threads,
    void** arguments,
    std::size_t,
    cudaStream_t stream) {
  std::vector<void*> values;
  for (int i = 0; i < ARGUMENTS; ++i)
    values.push_back(arguments[i] ? *static_cast<void**>(arguments[i]) : nullptr);
  return enqueue(stream, [=] { run(kernel, groups, threads, values); });
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = new Stream;
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  stream->captured = new Graph;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = stream->captured;
  stream->captured = nullptr;
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* work, cudaGraph_t graph, unsigned) {
  *work = new Graph(*graph);
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t work, cudaStream_t) {
  for (const auto& step : work->steps) step();
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t work) {
  delete work;
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new Event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  event->at = std::chrono::steady_clock::now();
  return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  *milliseconds = std::chrono::duration<float, std::milli>(end->at - begin->at).count();
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
