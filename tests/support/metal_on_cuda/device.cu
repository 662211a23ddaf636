// Memory, launches and times on an NVIDIA GPU, for Python. Functions return a cudaError_t.

#include <cuda_runtime.h>

#include <cstddef>

#define RETURN_IF_FAILED(call) \
  if (const cudaError_t status = (call)) return status

namespace {

constexpr int WARM_UPS = 2;
constexpr int MOST_BUFFERS = 16;

cudaError_t enqueue(
    const void* kernel,
    const unsigned* groups,
    const unsigned* threads,
    void** buffers,
    int n_buffers,
    cudaStream_t stream) {
  if (n_buffers > MOST_BUFFERS) return cudaErrorInvalidValue;
  void* arguments[MOST_BUFFERS] = {};
  for (int i = 0; i < n_buffers; ++i) arguments[i] = &buffers[i];
  return cudaLaunchKernel(
      kernel,
      dim3(groups[0], groups[1], groups[2]),
      dim3(threads[0], threads[1], threads[2]),
      arguments,
      0,
      stream);
}

// milliseconds [repeats], each of everything that `put` puts on a stream, without the host's part.
template <class Put>
cudaError_t time_graph(Put put, int repeats, float* milliseconds) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t work;
  cudaEvent_t begin, end;
  RETURN_IF_FAILED(cudaStreamCreate(&stream));
  RETURN_IF_FAILED(cudaEventCreate(&begin));
  RETURN_IF_FAILED(cudaEventCreate(&end));
  RETURN_IF_FAILED(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  RETURN_IF_FAILED(put(stream));
  RETURN_IF_FAILED(cudaStreamEndCapture(stream, &graph));
  RETURN_IF_FAILED(cudaGraphInstantiateWithFlags(&work, graph, 0));
  for (int i = -WARM_UPS; i < repeats; ++i) {
    RETURN_IF_FAILED(cudaEventRecord(begin, stream));
    RETURN_IF_FAILED(cudaGraphLaunch(work, stream));
    RETURN_IF_FAILED(cudaEventRecord(end, stream));
    RETURN_IF_FAILED(cudaEventSynchronize(end));
    if (i >= 0) RETURN_IF_FAILED(cudaEventElapsedTime(&milliseconds[i], begin, end));
  }
  RETURN_IF_FAILED(cudaGraphExecDestroy(work));
  RETURN_IF_FAILED(cudaGraphDestroy(graph));
  RETURN_IF_FAILED(cudaEventDestroy(begin));
  RETURN_IF_FAILED(cudaEventDestroy(end));
  return cudaStreamDestroy(stream);
}

}  // namespace

extern "C" {

const char* error_text(int status) { return cudaGetErrorString(cudaError_t(status)); }

int device_count(int* count) { return cudaGetDeviceCount(count); }

int device_name(char* name, std::size_t size) {
  cudaDeviceProp properties;
  RETURN_IF_FAILED(cudaGetDeviceProperties(&properties, 0));
  for (std::size_t i = 0; i < size; ++i) {
    name[i] = properties.name[i];
    if (!name[i]) break;
  }
  return cudaSuccess;
}

int allocate(void** address, std::size_t bytes) { return cudaMalloc(address, bytes); }

int release(void* address) { return cudaFree(address); }

int fill(void* address, int value, std::size_t bytes) { return cudaMemset(address, value, bytes); }

// From or to the host, or from one place on the device to another.
int copy(void* to, const void* from, std::size_t bytes) {
  return cudaMemcpy(to, from, bytes, cudaMemcpyDefault);
}

// Runs a kernel to its end. groups [3], threads [3], buffers [n_buffers].
int launch(
    const void* kernel,
    const unsigned* groups,
    const unsigned* threads,
    void** buffers,
    int n_buffers) {
  RETURN_IF_FAILED(enqueue(kernel, groups, threads, buffers, n_buffers, nullptr));
  return cudaDeviceSynchronize();
}

// `calls` launches, one after the other, with buffers [calls, n_buffers].
int time_launches(
    const void* kernel,
    const unsigned* groups,
    const unsigned* threads,
    void** buffers,
    int n_buffers,
    int calls,
    int repeats,
    float* milliseconds) {
  const auto put = [&](cudaStream_t stream) {
    for (int i = 0; i < calls; ++i) {
      void** mine = buffers + std::size_t(i) * n_buffers;
      RETURN_IF_FAILED(enqueue(kernel, groups, threads, mine, n_buffers, stream));
    }
    return cudaSuccess;
  };
  return time_graph(put, repeats, milliseconds);
}

// `calls` copies of `bytes`, one behind the other in both buffers.
int time_copies(
    void* to, const void* from, std::size_t bytes, int calls, int repeats, float* milliseconds) {
  const auto put = [&](cudaStream_t stream) {
    for (int i = 0; i < calls; ++i) {
      const std::size_t at = i * bytes;
      RETURN_IF_FAILED(cudaMemcpyAsync(
          static_cast<char*>(to) + at,
          static_cast<const char*>(from) + at,
          bytes,
          cudaMemcpyDeviceToDevice,
          stream));
    }
    return cudaSuccess;
  };
  return time_graph(put, repeats, milliseconds);
}

}  // extern "C"
