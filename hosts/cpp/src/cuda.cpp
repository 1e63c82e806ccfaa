#include "cuda.hpp"

#include <cstring>
#include <string>
#include <vector>

#include "cuda_driver.hpp"
#include "error.hpp"
#include "library.hpp"

namespace mirror {
namespace {

#ifdef _WIN32
const char* const runtime_names[] = {"cudart64_13.dll", "cudart64_12.dll"};
#else
const char* const runtime_names[] = {"libcudart.so.13", "libcudart.so.12"};
#endif

// Numbers of the CUDA runtime's interface.
constexpr unsigned non_blocking = 1;  // the stream doesn't wait for the default stream's work
constexpr unsigned no_timing = 2;     // an event that only orders
constexpr int host_to_device = 1, device_to_host = 2, device_to_device = 3;
constexpr int relaxed = 2;  // a recording that leaves other threads alone and lets its own allocate
constexpr unsigned long long own_priorities = 8;  // it runs at the priorities of the stream that it was made on
constexpr int kernel_node = 0, copy_node = 1, set_node = 2, host_node = 3, empty_node = 5, allocate_node = 10,
              free_node = 11;
constexpr int unregistered_memory = 0, pinned_memory = 1;
// Words of cudaMemcpy3DParms, and which of them are the pointers.
constexpr std::size_t copy_words = 20, copy_source = 4, copy_target = 12;
constexpr std::size_t pointer_facts_ints = 64;  // more than cudaPointerAttributes has in any version

using Handle = void*;

// The CUDA runtime's functions that are called here.
class CudaRuntime {
 public:
  // ONNX Runtime has loaded the version that it computes with, and streams must be of the same.
  CudaRuntime() : library_(find_library({runtime_names[0], runtime_names[1]})) {
    if (library_ == nullptr)
      throw Error(ErrorKind::device,
                  std::string(runtime_names[0]) + " or " + runtime_names[1] +
                      ", the CUDA runtime of this onnxruntime, can't be loaded; put its folder where "
                      "the loader looks");
    find(set_device, "cudaSetDevice");
    find(free, "cudaFree");
    find(priorities, "cudaDeviceGetStreamPriorityRange");
    find(create_stream, "cudaStreamCreateWithPriority");
    find(destroy_stream, "cudaStreamDestroy");
    find(synchronize, "cudaStreamSynchronize");
    find(begin_capture, "cudaStreamBeginCapture");
    find(end_capture, "cudaStreamEndCapture");
    find(host_alloc, "cudaHostAlloc");
    find(free_host, "cudaFreeHost");
    find(memset, "cudaMemsetAsync");
    find(memcpy, "cudaMemcpyAsync");
    find(memcpy_2d, "cudaMemcpy2DAsync");
    find(create_event, "cudaEventCreateWithFlags");
    find(destroy_event, "cudaEventDestroy");
    find(record_event, "cudaEventRecord");
    find(wait_event, "cudaEventSynchronize");
    find(stream_wait_event, "cudaStreamWaitEvent");
    find(nodes, "cudaGraphGetNodes");
    find(node_type, "cudaGraphNodeGetType");
    find(destroy_node, "cudaGraphDestroyNode");
    find(copy_facts, "cudaGraphMemcpyNodeGetParams");
    find(pointer_facts, "cudaPointerGetAttributes");
    find(instantiate, "cudaGraphInstantiate");
    find(launch_graph, "cudaGraphLaunch");
    find(destroy_graph, "cudaGraphDestroy");
    find(destroy_pass, "cudaGraphExecDestroy");
    find(last_error, "cudaGetLastError");
    find(error_text, "cudaGetErrorString");
  }

  // Throws Error(device) if a call failed.
  void check(int code, const char* what) const {
    if (code == 0) return;
    last_error();  // or a later call would be told of it
    throw Error(ErrorKind::device, std::string("the GPU failed in ") + what + ": " + error_text(code) +
                                       " (CUDA error " + std::to_string(code) + "); load the bundle again");
  }

  int (*set_device)(int);
  int (*free)(void*);
  int (*priorities)(int*, int*);
  int (*create_stream)(Handle*, unsigned, int);
  int (*destroy_stream)(Handle);
  int (*synchronize)(Handle);
  int (*begin_capture)(Handle, int);
  int (*end_capture)(Handle, Handle*);
  int (*host_alloc)(void**, std::size_t, unsigned);
  int (*free_host)(void*);
  int (*memset)(void*, int, std::size_t, Handle);
  int (*memcpy)(void*, const void*, std::size_t, int, Handle);
  int (*memcpy_2d)(void*, std::size_t, const void*, std::size_t, std::size_t, std::size_t, int, Handle);
  int (*create_event)(Handle*, unsigned);
  int (*destroy_event)(Handle);
  int (*record_event)(Handle, Handle);
  int (*wait_event)(Handle);
  int (*stream_wait_event)(Handle, Handle, unsigned);
  int (*nodes)(Handle, Handle*, std::size_t*);
  int (*node_type)(Handle, int*);
  int (*destroy_node)(Handle);
  int (*copy_facts)(Handle, void*);
  int (*pointer_facts)(void*, const void*);
  int (*instantiate)(Handle*, Handle, unsigned long long);
  int (*launch_graph)(Handle, Handle);
  int (*destroy_graph)(Handle);
  int (*destroy_pass)(Handle);
  int (*last_error)();
  const char* (*error_text)(int);

 private:
  template <typename Function>
  void find(Function& function, const char* name) {
    function = reinterpret_cast<Function>(required(name));
  }
  void* required(const char* name) const {
    if (void* found = library_function(library_, name)) return found;
    throw Error(ErrorKind::device, std::string("the CUDA runtime has no ") + name + "; versions 12 and 13 will do");
  }

  void* library_;
};

const CudaRuntime& runtime() {
  static const CudaRuntime found;
  return found;
}

class CudaMark final : public Mark {
 public:
  explicit CudaMark(Handle stream) : stream_(stream) {
    runtime().check(runtime().create_event(&event_, no_timing), "cudaEventCreateWithFlags");
  }
  ~CudaMark() override { runtime().destroy_event(event_); }
  CudaMark(const CudaMark&) = delete;
  CudaMark& operator=(const CudaMark&) = delete;

  void renew() override { runtime().check(runtime().record_event(event_, stream_), "cudaEventRecord"); }
  void wait() override { runtime().check(runtime().wait_event(event_), "cudaEventSynchronize"); }
  Handle event() const { return event_; }

 private:
  Handle stream_, event_ = nullptr;
};

class CudaRecording final : public Recording {
 public:
  CudaRecording(Handle graph, Handle stream) : stream_(stream) {
    runtime().check(runtime().instantiate(&pass_, graph, own_priorities), "cudaGraphInstantiate");
  }
  ~CudaRecording() override { runtime().destroy_pass(pass_); }
  CudaRecording(const CudaRecording&) = delete;
  CudaRecording& operator=(const CudaRecording&) = delete;

  void replay() override { runtime().check(runtime().launch_graph(pass_, stream_), "cudaGraphLaunch"); }

 private:
  Handle stream_, pass_ = nullptr;
};

int memory_kind(const void* address) {
  int facts[pointer_facts_ints] = {};
  runtime().check(runtime().pointer_facts(facts, address), "cudaPointerGetAttributes");
  return facts[0];
}

// Whether a copy's source will hold the same at every replay, and nobody on the host waits for it.
bool copies_what_stays(Handle node) {
  const void* words[copy_words] = {};
  runtime().check(runtime().copy_facts(node, words), "cudaGraphMemcpyNodeGetParams");
  const int source = memory_kind(words[copy_source]), target = memory_kind(words[copy_target]);
  return source != unregistered_memory && target != unregistered_memory && target != pinned_memory;
}

std::vector<Handle> nodes_of(Handle graph) {
  std::size_t count = 0;
  runtime().check(runtime().nodes(graph, nullptr, &count), "cudaGraphGetNodes");
  std::vector<Handle> nodes(count);
  if (count > 0) runtime().check(runtime().nodes(graph, nodes.data(), &count), "cudaGraphGetNodes");
  return nodes;
}

// Whether a graph can be replayed, what must happen but once taken out. ONNX Runtime ends a pass with a call on
// the host that frees the pinned memory of the pass's copies: a replay would free it again. Without that call the
// memory stays as long as the process, and so do the copies' sources.
bool made_replayable(Handle graph) {
  for (const Handle node : nodes_of(graph)) {
    int kind = 0;
    runtime().check(runtime().node_type(node, &kind), "cudaGraphNodeGetType");
    if (kind == host_node)
      runtime().check(runtime().destroy_node(node), "cudaGraphDestroyNode");
    else if (kind == copy_node ? !copies_what_stays(node)
                               : kind != kernel_node && kind != set_node && kind != empty_node &&
                                     kind != allocate_node && kind != free_node)
      return false;
  }
  return true;
}

class CudaStream final : public DeviceStream {
 public:
  CudaStream(int index, bool urgent, double share) : index_(index) {
    int least = 0, greatest = 0;
    select();
    runtime().check(runtime().priorities(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
    const int priority = urgent ? greatest : least;
    if (share < 1.0) {
      runtime().check(runtime().free(nullptr), "cudaFree");  // makes the context that the part belongs to
      stream_ = cuda_driver().part_stream(index, share, priority);
      whole_ = stream_ == nullptr;
    }
    if (stream_ == nullptr)
      runtime().check(runtime().create_stream(&stream_, non_blocking, priority), "cudaStreamCreateWithPriority");
  }
  ~CudaStream() override { runtime().destroy_stream(stream_); }
  CudaStream(const CudaStream&) = delete;
  CudaStream& operator=(const CudaStream&) = delete;

  void* handle() const override { return stream_; }
  bool whole() const override { return whole_; }

  std::shared_ptr<void> pinned(std::size_t bytes) override {
    void* memory = nullptr;
    select();
    runtime().check(runtime().host_alloc(&memory, bytes, 0), "cudaHostAlloc");
    std::memset(memory, 0, bytes);
    return {memory, [](void* given) { runtime().free_host(given); }};
  }

  void clear(void* device, std::size_t bytes) override {
    select();
    runtime().check(runtime().memset(device, 0, bytes, stream_), "cudaMemsetAsync");
  }
  // First of what a pass does, maybe on a thread that has not worked with this GPU.
  void upload(void* device, const void* host, std::size_t bytes) override {
    select();
    runtime().check(runtime().memcpy(device, host, bytes, host_to_device, stream_), "cudaMemcpyAsync");
  }
  void download(void* host, const void* device, std::size_t bytes) override {
    runtime().check(runtime().memcpy(host, device, bytes, device_to_host, stream_), "cudaMemcpyAsync");
  }
  void spread(void* to, std::size_t pitch, const void* from, std::size_t bytes, std::size_t count) override {
    runtime().check(runtime().memcpy_2d(to, pitch, from, bytes, bytes, count, device_to_device, stream_),
                    "cudaMemcpy2DAsync");
  }
  void wait() override { runtime().check(runtime().synchronize(stream_), "cudaStreamSynchronize"); }

  std::unique_ptr<Mark> mark() override {
    select();
    return std::make_unique<CudaMark>(stream_);
  }

  void after(Mark& mark) override {
    const Handle event = static_cast<CudaMark&>(mark).event();
    runtime().check(runtime().stream_wait_event(stream_, event, 0), "cudaStreamWaitEvent");
  }

  std::unique_ptr<Recording> record(const std::function<void()>& launch) override {
    select();
    runtime().check(runtime().begin_capture(stream_, relaxed), "cudaStreamBeginCapture");
    bool failed = false;
    try {
      launch();
    } catch (const std::exception&) {
      failed = true;  // run as usual, it will say why if that wasn't the recording's fault
    }
    Handle made = nullptr;
    failed |= runtime().end_capture(stream_, &made) != 0;
    runtime().last_error();  // or the next call would be told of it
    if (made == nullptr) return nullptr;
    const std::shared_ptr<void> graph(made, [](void* given) { runtime().destroy_graph(given); });
    if (failed || !made_replayable(made)) return nullptr;
    auto recording = std::make_unique<CudaRecording>(made, stream_);
    ++recorded;
    return recording;
  }

 private:
  // Makes this GPU the calling thread's: memory, events and streams are made on that one.
  void select() const { runtime().check(runtime().set_device(index_), "cudaSetDevice"); }

  int index_;
  Handle stream_ = nullptr;
  bool whole_ = true;
};

}  // namespace

std::shared_ptr<DeviceStream> open_cuda_stream(int index, bool urgent, double share) {
  return std::make_shared<CudaStream>(index, urgent, share);
}

}  // namespace mirror
