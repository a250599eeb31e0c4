// Runs the kernel of hopper.cu on CPUs: a thread of the GPU is one of the system's, a warp has a single lane.

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

struct Word;

namespace {
constexpr int WARP = 1;
struct Group {
  std::vector<float> memory;
  std::barrier<> barrier{THREADS};
};
thread_local int thread_number, block_number;
thread_local Group *group;
int block_count;

int thread() { return thread_number; }
int block() { return block_number; }
int blocks() { return block_count; }
float *memory() { return group->memory.data(); }
void sync_threads() { group->barrier.arrive_and_wait(); }
void publish() { std::atomic_thread_fence(std::memory_order_seq_cst); }
void give_up() { std::abort(); }
int uniform(int value) { return value; }
template <class T>
T add_lanes(T value) {
  return value;
}
void copy(float *to, const float *from) { std::copy_n(from, 4, to); }
void arrive() {}
float read_fresh(const float *value) { return *value; }
template <int N, class Store>
void reduce(float (&values)[N], Store store) {
  for (int i = 0; i < N; i++) store(i, values[i]);
}
void write(Word *word, Word value);
Word read(const Word *word);
}  // namespace

#include "../mnist_fast/kernels/hopper.cu"

namespace {
void write(Word *word, Word value) {
  unsigned long long halves[2];
  std::memcpy(halves, &value, 16);
  for (int i = 0; i < 2; i++)
    std::atomic_ref(reinterpret_cast<unsigned long long *>(word)[i]).store(halves[i], std::memory_order_release);
}
Word read(const Word *word) {
  std::this_thread::yield();  // the block waited for may need this core
  unsigned long long halves[2];
  for (int i = 0; i < 2; i++)
    halves[i] = std::atomic_ref(reinterpret_cast<unsigned long long *>(const_cast<Word *>(word))[i])
                    .load(std::memory_order_acquire);
  Word value;
  std::memcpy(&value, halves, 16);
  return value;
}
}  // namespace

namespace {
void run(void (*kernel)(HopperArguments), const HopperArguments &arguments, int count) {
  block_count = count;
  std::vector<Group> groups(count);
  std::vector<std::jthread> threads;
  for (int b = 0; b < count; b++) {
    groups[b].memory.assign(FLOATS, NAN);  // what is not written must not be read
    for (int t = 0; t < THREADS; t++)
      threads.emplace_back([&, b, t] {
        block_number = b, thread_number = t, group = &groups[b];
        kernel(arguments);
      });
  }
}
}  // namespace

extern "C" {
void launch_train(const HopperArguments *arguments, int count) { run(train, *arguments, count); }
void launch_pack(const HopperArguments *arguments) { run(pack, *arguments, 1); }
int count_packed() { return PACKED; }
}
