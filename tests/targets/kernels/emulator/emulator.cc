#include "emulator.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, size)
#define ASAN_UNPOISON_MEMORY_REGION(p, size)
#endif

Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
// `barrier`: what the thread waits for, until that has another generation; a thread whose wait is not over is not resumed.
struct Thread { Index index; bool begun, done; const Barrier* barrier; long generation; };
struct Stack { ucontext_t context; jmp_buf place; std::unique_ptr<char[]> memory; void* fiber; };
static std::vector<Thread> threads;
static std::vector<Stack> stacks;
std::vector<Barrier> warps;
std::vector<Block> blocks;
Barrier cluster;
int block_size;
static std::vector<uint64_t> slots[2];
int current;
long progress;
alignas(1024) unsigned char memory[8 * SHARED];
unsigned char* shared = memory;
static ucontext_t beginning;
static jmp_buf scheduler;  // switching by longjmp takes no system call, which swapcontext takes two of
static void (*body)(void*);
static void* arguments;
constexpr size_t STACK = 1 << 20;  // pages of it exist once they are used

#ifdef __SANITIZE_THREAD__
static void* host;  // the fiber of the scheduler
static ucontext_t scheduling;
#endif

static Block& block() { return blocks[current / block_size]; }

UNSEEN static void take_up(int thread) {
  current = thread;
  threadIdx = threads[thread].index;
  blockIdx = block().index;
  shared = memory + thread / block_size * SHARED;
}

UNSEEN void yield() {
  int me = current;
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(host, __tsan_switch_to_fiber_no_sync);
  swapcontext(&stacks[me].context, &scheduling);
#else
  if (!_setjmp(stacks[me].place)) _longjmp(scheduler, 1);
#endif
  take_up(me);
}

UNSEEN static void meet(Barrier& barrier) {
  long generation = barrier.generation;
  if (++barrier.waiting >= barrier.size) { barrier.waiting = 0; ++barrier.generation; ++progress; return; }
  threads[current].barrier = &barrier;
  threads[current].generation = generation;
  while (barrier.generation == generation) yield();
}

void arrive(Barrier& barrier) {
  before(&barrier);
  meet(barrier);
  after(&barrier);
}

// Values lie in one of two places in turn, so that none is overwritten before all have read it: whoever brings the next but one, all have met
// in between. Threads that have returned leave what they brought before.
UNSEEN const uint64_t* bring(const void* value, size_t size) {
  Barrier& warp = warps[current / 32];
  auto& turn = slots[warp.generation & 1];
  memcpy(&turn[current], value, size);
  arrive(warp);
  return &turn[current / 32 * 32];
}

UNSEEN static void leave(Barrier& barrier) {  // those that returned are not waited for
  --barrier.size;
  ++progress;
  if (barrier.size && barrier.waiting >= barrier.size) { barrier.waiting = 0; ++barrier.generation; }
}

UNSEEN static void enter() {
  int me = current;
  for (;;) {
    take_up(me);
    body(arguments);
    threads[me].done = true;
    leave(warps[me / 32]);
    leave(blocks[me / block_size].barrier);
    leave(cluster);
#ifdef __SANITIZE_THREAD__
    before(&blocks);
    __tsan_switch_to_fiber(host, __tsan_switch_to_fiber_no_sync);
    setcontext(&scheduling);
#else
    if (!_setjmp(stacks[me].place)) _longjmp(scheduler, 1);  // this thread of the next block goes on from here
#endif
  }
}

UNSEEN static void resume(int thread) {
  Stack& stack = stacks[thread];
  current = thread;
  threads[thread].barrier = nullptr;
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(stack.fiber, __tsan_switch_to_fiber_no_sync);
  swapcontext(&scheduling, &stack.context);
  return;
#endif
  if (_setjmp(scheduler)) return;
  if (threads[thread].begun) _longjmp(stack.place, 1);
  threads[thread].begun = true;
  swapcontext(&beginning, &stack.context);
}

UNSEEN static void begin(int thread) {
  Stack& stack = stacks[thread];
  if (!stack.memory) stack.memory.reset(new char[STACK]);
  getcontext(&stack.context);
  stack.context.uc_stack.ss_sp = stack.memory.get();
  stack.context.uc_stack.ss_size = STACK;
  stack.context.uc_link = &beginning;
  makecontext(&stack.context, enter, 0);
}

// The threads of a warp go on for as long as one of them comes further; then the next warp's do. Returns how many have returned.
UNSEEN static int run_warp(int first, int end) {
  int returned = 0;
  for (long before = progress - 1; progress != before;) {
    before = progress;
    for (int i = first; i < end; ++i) {
      const Thread& thread = threads[i];
      if (thread.done || (thread.barrier && thread.barrier->generation == thread.generation)) continue;
      resume(i);
      returned += thread.done;
    }
  }
  return returned;
}

UNSEEN static void run_blocks() {
  int count = block_size * int(blocks.size());
  cluster = {0, count, 0};
  for (auto& block : blocks) block.barrier = {0, block_size, 0};
  for (size_t warp = 0; warp < warps.size(); ++warp) warps[warp] = {0, std::min(32, count - int(warp) * 32), 0};
  for (int at = 0; at < count; ++at) {
    unsigned i = at % block_size;
    Thread& thread = threads[at];
    thread.done = false;
    thread.barrier = nullptr;
    thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
#ifdef __SANITIZE_THREAD__
    host = __tsan_get_current_fiber();
    stacks[at].fiber = __tsan_create_fiber(0);
    begin(at);
#else
    if (!thread.begun) begin(at);
#endif
  }
  for (int left = count; left;) {
    long before = progress;
    for (int first = 0; first < count; first += 32) left -= run_warp(first, std::min(first + 32, count));
    if (left && progress == before) {
      fprintf(stderr, "emulator: the threads of a block or cluster wait for each other at different barriers\n");
      abort();
    }
  }
#ifdef __SANITIZE_THREAD__
  after(&blocks);
  for (int at = 0; at < count; ++at) __tsan_destroy_fiber(stacks[at].fiber);
#endif
}

UNSEEN static void launch(void (*function)(void*), void* pointer, const int* size) {
  body = function;
  arguments = pointer;
  gridDim = {unsigned(size[0]), unsigned(size[1]), unsigned(size[2])};
  blockDim = {unsigned(size[3]), unsigned(size[4]), unsigned(size[5])};
  block_size = size[3] * size[4] * size[5];
  const unsigned together = std::max(size[6], 1);
  int count = block_size * together;
  if (together > 8 || gridDim.x % together || (together > 1 && block_size % 32)) {
    fprintf(stderr, "emulator: %u blocks of %d threads of a grid of %u are no cluster\n", together, block_size, gridDim.x);
    abort();
  }
  ASAN_UNPOISON_MEMORY_REGION(memory, sizeof(memory));
  for (unsigned i = 0; i < together; ++i) ASAN_POISON_MEMORY_REGION(memory + i * SHARED + size[7], SHARED - size[7]);
  blocks.resize(together);
  threads.resize(std::max<size_t>(threads.size(), count));
  stacks.resize(threads.size());
  warps.resize((count + 31) / 32);
  for (auto& turn : slots) turn.resize(((count + 31) / 32) * 32);
  for (unsigned z = gridDim.z; z-- > 0;)  // the last block first: none may rely on those before it
    for (unsigned y = gridDim.y; y-- > 0;)
      for (unsigned x = gridDim.x; x >= together; x -= together) {
        for (unsigned i = 0; i < together; ++i) blocks[i].index = {x - together + i, y, z};
        run_blocks();
      }
}
}  // namespace emulator

void __syncthreads() { emulator::arrive(emulator::block().barrier); }
void __syncwarp(unsigned) { emulator::arrive(emulator::warps[emulator::current / 32]); }
UNSEEN int __syncthreads_or(int x) {
  emulator::block().votes |= x != 0;
  __syncthreads();
  int found = emulator::block().votes;
  __syncthreads();
  emulator::block().votes = 0;
  __syncthreads();
  return found;
}

// The last of the arguments of every entry point: a kernel as a function of a packed array of arguments, and the grid and block.
extern "C" void emulator_launch(void (*function)(void*), void* arguments, const int* size) { emulator::launch(function, arguments, size); }
