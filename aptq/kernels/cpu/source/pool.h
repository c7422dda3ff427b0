// Threads that help with a job while it lasts. Nobody waits for a thread that has not begun: where the other cores are
// busy, or a process was forked and has no other threads, the caller does all of the work itself. So it does where all
// sleep and waking them would take longer than they save, unless jobs come in a stream: threads stay awake in it.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>

struct Job {
    void (*run)(const void* context, int64_t part);
    const void* context;  // read only while a part is at work, which the caller waits for
    int64_t parts, helpers;
    std::atomic<int64_t> next{0}, done{0};

    void work() {
        for (int64_t part; (part = next.fetch_add(1)) < parts; done.fetch_add(1, std::memory_order_release))
            run(context, part);
    }
};

class Pool {
    // In nanoseconds: how long a thread looks for something to do before it sleeps, and that where jobs come in a stream.
    static constexpr int64_t PATIENCE = 50'000, PATIENCE_IN_STREAM = 400'000;
    // Jobs are a stream where most come so quickly: the layers of a compiled step, not those of a model in Python.
    static constexpr int64_t QUICKLY = 100'000, STREAM = 12, MOST = 64, PAUSE = 16;
    std::mutex mutex;
    std::condition_variable wake;
    std::shared_ptr<Job> job;
    std::atomic<int64_t> posted{0}, awake{0}, ended{0}, stream{0};
    int64_t threads = 0;

    static int64_t now() {
        auto since = std::chrono::steady_clock::now().time_since_epoch();
        return std::chrono::duration_cast<std::chrono::nanoseconds>(since).count();
    }

    void serve(int64_t index) {
        int64_t seen = 0;
        for (;;) {
            int64_t end = now() + (streams() ? PATIENCE_IN_STREAM : PATIENCE);
            while (posted.load(std::memory_order_acquire) == seen && now() < end)
                for (int spin = 0; spin < 16; spin++) _mm_pause();
            std::shared_ptr<Job> mine;
            {
                std::unique_lock<std::mutex> lock(mutex);
                awake--;
                wake.wait(lock, [&] { return posted.load() != seen; });
                awake++;
                seen = posted.load();
                mine = job;
            }
            if (index < mine->helpers) mine->work();
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

    // Return false, with nothing done, where all threads sleep and are not to be woken.
    bool run(int64_t parts, int64_t workers, bool wakes, void (*work)(const void*, int64_t), const void* context) {
        if (!wakes && awake.load(std::memory_order_relaxed) <= 0) return false;
        auto mine = std::make_shared<Job>();
        mine->run = work, mine->context = context, mine->parts = parts, mine->helpers = workers - 1;
        {
            std::lock_guard<std::mutex> lock(mutex);
            for (; threads < workers - 1; threads++, awake++) std::thread(&Pool::serve, this, threads).detach();
            job = mine;
            posted.fetch_add(1, std::memory_order_release);
            if (wakes && awake.load() < threads) wake.notify_all();
        }
        mine->work();
        while (mine->done.load(std::memory_order_acquire) < parts) _mm_pause();
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
