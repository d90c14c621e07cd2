#include "emulator.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, size)
#define ASAN_UNPOISON_MEMORY_REGION(p, size)
#endif

Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
std::vector<Thread> threads;
std::vector<Barrier> warps;
std::vector<Block> blocks;
Barrier cluster;
int block_size;
std::vector<uint64_t> slots;
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
  swapcontext(&threads[me].context, &scheduling);
#else
  if (!_setjmp(threads[me].place)) _longjmp(scheduler, 1);
#endif
  take_up(me);
}

UNSEEN static void leave(Barrier& barrier) {  // those that returned are not waited for
  --barrier.size;
  ++progress;
  if (barrier.size && barrier.waiting >= barrier.size) { barrier.waiting = 0; ++barrier.generation; }
}

UNSEEN static void enter() {
  int me = current;
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
  _longjmp(scheduler, 1);
#endif
}

UNSEEN static void resume(Thread& thread) {
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(thread.fiber, __tsan_switch_to_fiber_no_sync);
  swapcontext(&scheduling, &thread.context);
  return;
#endif
  if (_setjmp(scheduler)) return;
  if (thread.begun) _longjmp(thread.place, 1);
  thread.begun = true;
  swapcontext(&beginning, &thread.context);
}

UNSEEN static void run_blocks() {
  int count = block_size * int(blocks.size());
  cluster = {0, count, 0};
  for (auto& block : blocks) block.barrier = {0, block_size, 0};
  for (size_t warp = 0; warp < warps.size(); ++warp) warps[warp] = {0, std::min(32, count - int(warp) * 32), 0};
  for (int at = 0; at < count; ++at) {
    int i = at % block_size;
    Thread& thread = threads[at];
    thread.done = thread.begun = false;
#ifdef __SANITIZE_THREAD__
    host = __tsan_get_current_fiber();
    thread.fiber = __tsan_create_fiber(0);
#endif
    thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = STACK;
    thread.context.uc_link = &beginning;
    makecontext(&thread.context, enter, 0);
  }
  for (int left = count; left;) {
    long before = progress;
    for (int i = 0; i < count; ++i) {
      if (threads[i].done) continue;
      current = i;
      resume(threads[i]);
      left -= threads[i].done;
    }
    if (left && progress == before) {
      fprintf(stderr, "emulator: the threads of a block or cluster wait for each other at different barriers\n");
      abort();
    }
  }
#ifdef __SANITIZE_THREAD__
  after(&blocks);
  for (int at = 0; at < count; ++at) __tsan_destroy_fiber(threads[at].fiber);
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
  for (auto& thread : threads)
    if (!thread.stack) thread.stack.reset(new char[STACK]);
  warps.resize((count + 31) / 32);
  slots.resize(((count + 31) / 32) * 32);
  for (unsigned z = gridDim.z; z-- > 0;)  // the last block first: none may rely on those before it
    for (unsigned y = gridDim.y; y-- > 0;)
      for (unsigned x = gridDim.x; x >= together; x -= together) {
        for (unsigned i = 0; i < together; ++i) blocks[i].index = {x - together + i, y, z};
        run_blocks();
      }
}
}  // namespace emulator

// The last of the arguments of every entry point: a kernel as a function of a packed array of arguments, and the grid and block.
extern "C" void emulator_launch(void (*function)(void*), void* arguments, const int* size) { emulator::launch(function, arguments, size); }
