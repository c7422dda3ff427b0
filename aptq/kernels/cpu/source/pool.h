// Threads that help with a job while it lasts. Nobody waits for a thread that has not begun: where the other cores are
// busy, or a process was forked and has no other threads, the caller does all of the work itself. So it does where all
// sleep and waking them would take longer than they save, unless jobs come in a stream: threads stay awake in it. And
// where another caller's job is under way: there is one at a time.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

class Pool {
    // In nanoseconds: how long a thread looks for something to do before it sleeps, and that where jobs come in a stream.
    static constexpr int64_t PATIENCE = 50'000, PATIENCE_IN_STREAM = 400'000;
    // Jobs are a stream where most come so quickly: the layers of a compiled step, not those of a model in Python.
    static constexpr int64_t QUICKLY = 100'000, STREAM = 12, MOST = 64, PAUSE = 16;
    typedef void (*Run)(const void* context, int64_t part);

    // The number of the job, and below it that of its next part. Who raises it from a value has that part, and what it
    // has read of the job before is then the job's: fields change only while no part can be had (NONE).
    static constexpr uint64_t JOB = (uint64_t)1 << 32, NONE = JOB - 1;
    alignas(64) std::atomic<uint64_t> ticket{NONE};
    alignas(64) std::atomic<Run> run_part{nullptr};
    std::atomic<const void*> run_context{nullptr};
    std::atomic<int64_t> parts{0}, helpers{0};
    alignas(64) std::atomic<int64_t> done{0};
    alignas(64) std::atomic<int64_t> asleep{0}, ended{0}, stream{0};
    std::atomic<bool> busy{false};
    std::mutex mutex;
    std::condition_variable wake;
    int64_t threads = 0;

    static int64_t now() {
        auto since = std::chrono::steady_clock::now().time_since_epoch();
        return std::chrono::duration_cast<std::chrono::nanoseconds>(since).count();
    }

    void work(uint64_t job) {
        for (uint64_t seen; (seen = ticket.load(std::memory_order_acquire)) / JOB == job;) {
            Run run = run_part.load(std::memory_order_acquire);
            const void* context = run_context.load(std::memory_order_acquire);
            int64_t part = (int64_t)(seen % JOB);
            if (part >= parts.load(std::memory_order_acquire)) return;
            if (!ticket.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) continue;
            run(context, part);
            done.fetch_add(1, std::memory_order_release);
        }
    }

    void serve(int64_t index) {
        uint64_t seen = 0;
        auto waits = [&] {
            uint64_t value = ticket.load();
            return value / JOB == seen || value % JOB == NONE;
        };
        for (;;) {
            int64_t end = now() + (streams() ? PATIENCE_IN_STREAM : PATIENCE);
            while (waits() && now() < end)
                for (int spin = 0; spin < 16 && waits(); spin++) _mm_pause();
            if (waits()) {
                std::unique_lock<std::mutex> lock(mutex);
                asleep++;
                wake.wait(lock, [&] { return !waits(); });
                asleep--;
            }
            seen = ticket.load(std::memory_order_acquire) / JOB;
            if (index < helpers.load(std::memory_order_acquire)) work(seen);
        }
    }

   public:
    // Never destroyed: its threads may be at work while the process ends.
    static Pool& shared() {
        static Pool* pool = new Pool;
        return *pool;
    }

    bool streams() const { return stream.load(std::memory_order_relaxed) >= STREAM; }
    void begins() {
        bool soon = now() - ended.load(std::memory_order_relaxed) < QUICKLY;
        int64_t count = stream.load(std::memory_order_relaxed);
        stream.store(soon ? std::min(count + 1, MOST) : std::max(count - PAUSE, (int64_t)0), std::memory_order_relaxed);
    }
    void ends() { ended.store(now(), std::memory_order_relaxed); }

    // Return false, with nothing done, where all threads sleep and are not to be woken, or another caller has them.
    bool run(int64_t count, int64_t workers, bool wakes, Run work_part, const void* context) {
        if (busy.exchange(true, std::memory_order_acquire)) return false;
        if (!wakes && asleep.load(std::memory_order_relaxed) >= threads) {
            busy.store(false, std::memory_order_release);
            return false;
        }
        for (; threads < workers - 1; threads++) std::thread(&Pool::serve, this, threads).detach();
        uint64_t job = (ticket.load(std::memory_order_relaxed) / JOB + 1) % JOB;
        ticket.store(job * JOB + NONE, std::memory_order_release);
        run_part.store(work_part, std::memory_order_release);
        run_context.store(context, std::memory_order_release);
        parts.store(count, std::memory_order_release);
        helpers.store(workers - 1, std::memory_order_release);
        done.store(0, std::memory_order_release);
        ticket.store(job * JOB);
        // Not waited for: a lock that a forked process has from a thread that it has not would be one for ever.
        if (wakes && asleep.load() > 0 && mutex.try_lock()) {
            mutex.unlock();
            wake.notify_all();
        }
        work(job);
        while (done.load(std::memory_order_acquire) < count) _mm_pause();
        busy.store(false, std::memory_order_release);
        return true;
    }
};

constexpr int64_t WORTH_WAKING = 100'000;  // nanoseconds of one thread: others take some 30'000 to wake

// Call `work(part)` for each part below `parts`, on at most `threads` threads; all of it takes one of them some
// `nanoseconds`.
template <class Work>
static void in_parallel(int64_t parts, int64_t threads, int64_t nanoseconds, const Work& work) {
    if (threads > parts) threads = parts;
    auto run = [](const void* context, int64_t part) { (*(const Work*)context)(part); };
    Pool& pool = Pool::shared();
    if (threads > 1) pool.begins();
    bool wakes = nanoseconds >= WORTH_WAKING || pool.streams();
    if (threads <= 1 || !pool.run(parts, threads, wakes, run, &work))
        for (int64_t part = 0; part < parts; part++) work(part);
    if (threads > 1) pool.ends();
}
