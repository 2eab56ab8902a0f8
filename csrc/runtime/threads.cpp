#include "freemerge/threads.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace freemerge {
namespace {

// One parallel_for: its bodies are handed out by a counter; whoever is free takes the next.
struct Job {
  std::size_t count;
  const std::function<void(std::size_t)>& body;
  std::atomic<std::size_t> next{0}, done{0};
  std::exception_ptr failure;
  std::mutex mutex;
  std::condition_variable finished;

  Job(std::size_t count, const std::function<void(std::size_t)>& body) : count(count), body(body) {}

  bool exhausted() const { return next.load() >= count; }

  void work() {
    for (std::size_t index; (index = next.fetch_add(1)) < count;) {
      try {
        body(index);
      } catch (...) {
        std::lock_guard<std::mutex> lock(mutex);
        if (!failure) failure = std::current_exception();
      }
      if (done.fetch_add(1) + 1 == count) {
        std::lock_guard<std::mutex> lock(mutex);
        finished.notify_all();
      }
    }
  }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    finished.wait(lock, [this] { return done.load() == count; });
    if (failure) std::rethrow_exception(failure);
  }
};

class Pool {
 public:
  explicit Pool(int workers) {
    try {
      for (int i = 0; i < workers; ++i) threads_.emplace_back([this] { serve(); });
    } catch (const std::system_error&) {
      // The system allows no more threads: callers do what these would have done.
    }
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  void run(std::size_t count, const std::function<void(std::size_t)>& body) {
    auto job = std::make_shared<Job>(count, body);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      jobs_.push_back(job);
    }
    wake_.notify_all();
    job->work();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto mine = std::find(jobs_.begin(), jobs_.end(), job);
      if (mine != jobs_.end()) jobs_.erase(mine);
    }
    job->wait();
  }

 private:
  void serve() {
    for (;;) {
      std::shared_ptr<Job> job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [this] {
          while (!jobs_.empty() && jobs_.front()->exhausted()) jobs_.pop_front();
          return stopping_ || !jobs_.empty();
        });
        if (stopping_) return;
        job = jobs_.front();
      }
      job->work();
    }
  }

  std::vector<std::thread> threads_;
  std::deque<std::shared_ptr<Job>> jobs_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stopping_ = false;
};

int cores() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

std::mutex pool_mutex;
std::shared_ptr<Pool> pool;
std::atomic<int> wanted{0};

// After fork() the workers exist in the parent only, and a lock may be held by a thread that does not exist: hold the one
// that matters meanwhile, and leave the old pool behind, as its threads cannot be joined.
void survive_fork() {
  pthread_atfork([] { pool_mutex.lock(); }, [] { pool_mutex.unlock(); },
                 [] {
                   new std::shared_ptr<Pool>(std::move(pool));
                   pool_mutex.unlock();
                 });
}

std::shared_ptr<Pool> current_pool() {
  static std::once_flag once;
  std::call_once(once, survive_fork);
  std::lock_guard<std::mutex> lock(pool_mutex);
  if (!pool) pool = std::make_shared<Pool>(threads() - 1);
  return pool;
}

}  // namespace

void set_threads(int count) {
  std::shared_ptr<Pool> old;  // ends, once nobody uses it, after the lock
  std::lock_guard<std::mutex> lock(pool_mutex);
  if (wanted.exchange(count) != count) old = std::move(pool);
}

int threads() {
  const int count = wanted.load();
  return count > 0 ? count : cores();
}

void parallel_for(std::size_t count, const std::function<void(std::size_t)>& body) {
  if (count == 0) return;
  if (count == 1 || threads() == 1) {
    for (std::size_t i = 0; i < count; ++i) body(i);
    return;
  }
  current_pool()->run(count, body);
}

}  // namespace freemerge
