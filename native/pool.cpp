#include "pool.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace plyweight {
namespace {

constexpr int kMaxThreads = 256;
// Layers of a model follow each other within this time; a futex takes as long to wake a thread.
constexpr auto kSpin = std::chrono::microseconds(100);
// A range is taken in so many parts, so that a thread that comes late or is held up delays the
// others by one of them at most.
constexpr std::size_t kParts = 8;

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// A thread that sleeps, which can be told to wake up on another processor than the one that wakes it.
//
// Linux wakes a thread on its own processor or on that of who wakes it, where it deems no other idle,
// and in a virtual machine it deems none idle that the host has taken back, which it does when there
// was nothing to do for a while. The two threads then share one processor for milliseconds, of which
// the woken one may not get any until the caller sleeps. Elsewhere than on Linux nothing is done, nor
// where the system refuses (a filter of system calls, more processors than a cpu_set_t holds).
//
// What the thread has afterwards is a list of processors: those it could run on before. It does not
// follow when those of a container become more.
class Sleeper {
public:
#if defined(__linux__)
    void falls_asleep() {
        thread_ = static_cast<pid_t>(syscall(SYS_gettid));  // gettid() is younger than some C libraries
        is_asleep_ = true;
    }
    void is_woken_from_here() {
        const int here = sched_getcpu();
        if (!is_asleep_ || here < 0 || here >= CPU_SETSIZE) return;
        is_asleep_ = false;
        if (sched_getaffinity(thread_, sizeof all_, &all_) != 0) return;
        if (!CPU_ISSET(static_cast<std::size_t>(here), &all_)) return;  // it is elsewhere anyway
        others_ = all_;
        CPU_CLR(static_cast<std::size_t>(here), &others_);
        is_sent_ = CPU_COUNT(&others_) > 0 &&
                   sched_setaffinity(thread_, sizeof others_, &others_) == 0;
    }
    // The sleeper itself, awake: it may run on all processors again, unless somebody else has said
    // meanwhile where it may.
    void is_awake() {
        cpu_set_t now;
        if (is_sent_ && sched_getaffinity(thread_, sizeof now, &now) == 0 &&
            CPU_EQUAL(&now, &others_)) {
            sched_setaffinity(thread_, sizeof all_, &all_);
        }
        is_asleep_ = is_sent_ = false;
    }

private:
    pid_t thread_ = 0;
    bool is_asleep_ = false, is_sent_ = false;
    cpu_set_t all_{}, others_{};  // where it may run, and where until it is awake, if it is sent
#else
    void falls_asleep() {}
    void is_woken_from_here() {}
    void is_awake() {}
#endif
};

// Units of one thread. It takes them from the front, and who has no more takes them as well.
struct alignas(64) Range {
    std::atomic<std::size_t> next{0};
    std::size_t end = 0, step = 1;
};

class Pool {
public:
    void run(Work& work, std::size_t num_units, int num_threads) {
        const std::unique_lock<std::mutex> mine(in_use_, std::try_to_lock);
        if (!mine.owns_lock()) return work.run(0, num_units, 0);
        num_threads = 1 + started(std::min(num_threads, kMaxThreads) - 1);
        if (num_threads == 1) return work.run(0, num_units, 0);

        work_ = &work;
        num_threads_ = num_threads;
        const auto n = static_cast<std::size_t>(num_threads);
        for (std::size_t i = 0; i < n; ++i) {
            const std::size_t begin = num_units * i / n, end = num_units * (i + 1) / n;
            ranges_[i].next.store(begin, std::memory_order_relaxed);
            ranges_[i].end = end;
            ranges_[i].step = std::max<std::size_t>((end - begin + kParts - 1) / kParts, 1);
        }
        {
            const std::lock_guard<std::mutex> lock(sleep_);
            state_.store(++generation_ << 32 | kOpen, std::memory_order_release);
            if (num_asleep_ > 0) {
                for (int i = 0; i < num_started_; ++i) sleepers_[i].is_woken_from_here();
                wake_.notify_all();
            }
        }
        work_on(work, 0);
        // Nothing is left to take. Who has not joined by now need not, and is not waited for.
        state_.fetch_and(~kOpen, std::memory_order_acq_rel);
        for (int i = 0; state_.load(std::memory_order_acquire) & kCount; ++i) {
            if (i < 1000) pause();
            else std::this_thread::yield();
        }
    }

private:
    // state_: the generation of the work, whether it may be joined, and how many have.
    static constexpr std::uint64_t kOpen = std::uint64_t{1} << 31, kCount = kOpen - 1;

    // Sees to it that so many threads wait for work, or as many as the system gives.
    int started(int wanted) {
        for (; num_started_ < wanted; ++num_started_) {
            try {
                std::thread([this, slot = num_started_ + 1] { serve(slot); }).detach();
            } catch (const std::system_error&) {
                break;
            }
        }
        return std::min(num_started_, wanted);
    }

    [[noreturn]] void serve(int slot) {
        std::uint64_t seen = 0;
        for (;;) {
            const std::uint64_t generation = next_generation(seen, sleepers_[slot - 1]);
            seen = generation;
            std::uint64_t state = state_.load(std::memory_order_acquire);
            bool joined = false;
            while (!joined && state >> 32 == generation && (state & kOpen)) {
                joined = state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel);
            }
            if (!joined) continue;
            if (slot < num_threads_) work_on(*work_, slot);
            state_.fetch_sub(1, std::memory_order_acq_rel);
        }
    }

    std::uint64_t next_generation(std::uint64_t seen, Sleeper& sleeper) {
        const auto current = [this] { return state_.load(std::memory_order_acquire) >> 32; };
        const auto until = std::chrono::steady_clock::now() + kSpin;
        do {
            for (int i = 0; i < 64; ++i) {
                if (const auto generation = current(); generation != seen) return generation;
                pause();
            }
        } while (std::chrono::steady_clock::now() < until);
        std::unique_lock<std::mutex> lock(sleep_);
        ++num_asleep_;
        sleeper.falls_asleep();
        wake_.wait(lock, [&] { return current() != seen; });
        --num_asleep_;
        sleeper.is_awake();
        return current();
    }

    void work_on(Work& work, int slot) {
        for (int i = 0; i < num_threads_; ++i) {
            Range& range = ranges_[static_cast<std::size_t>((slot + i) % num_threads_)];
            for (;;) {
                const std::size_t begin =
                    range.next.fetch_add(range.step, std::memory_order_relaxed);
                if (begin >= range.end) break;
                work.run(begin, std::min(begin + range.step, range.end), slot);
            }
        }
    }

    std::mutex in_use_, sleep_;
    std::condition_variable wake_;
    int num_asleep_ = 0, num_started_ = 0, num_threads_ = 1;
    std::uint64_t generation_ = 0;
    std::atomic<std::uint64_t> state_{0};
    Work* work_ = nullptr;
    Range ranges_[kMaxThreads];
    Sleeper sleepers_[kMaxThreads - 1];
};

// Never destroyed, for its threads wait until the process ends. A child of fork has none of them and
// perhaps a locked lock: it starts with a new pool.
std::atomic<Pool*> pool{nullptr};

Pool& the_pool() {
    static std::once_flag once;
    std::call_once(once, [] {
        pool = new Pool;
#if defined(__unix__) || defined(__APPLE__)
        pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
#endif
    });
    return *pool;
}

}  // namespace

void run_parallel(Work& work, std::size_t num_units, int num_threads) {
    if (num_units == 0) return;
    if (num_threads < 2 || num_units < 2) return work.run(0, num_units, 0);
    the_pool().run(work, num_units, num_threads);
}

}  // namespace plyweight
