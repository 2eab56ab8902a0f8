#include "freemerge/threads.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
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
  explicit Pool(int workers) : pid_(getpid()) {
    for (int i = 0; i < workers; ++i) threads_.emplace_back([this] { serve(); });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  // After fork() the workers exist in the parent only.
  bool of_this_process() const { return pid_ == getpid(); }

  void run(std::size_t count, const std::function<void(std::size_t)>& body) {
    auto job = std::make_shared<Job>(count, body);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      jobs_.push_back(job);
    }
    wake_.notify_all();
    job->work();
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

  pid_t pid_;
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
int wanted = 0;

std::shared_ptr<Pool> current_pool() {
  std::lock_guard<std::mutex> lock(pool_mutex);
  if (pool && !pool->of_this_process()) new std::shared_ptr<Pool>(std::move(pool));  // leaked: its threads cannot be joined here
  if (!pool) pool = std::make_shared<Pool>(threads() - 1);
  return pool;
}

}  // namespace

void set_threads(int count) {
  std::lock_guard<std::mutex> lock(pool_mutex);
  if (count == wanted) return;
  wanted = count;
  pool.reset();
}

int threads() { return wanted > 0 ? wanted : cores(); }

void parallel_for(std::size_t count, const std::function<void(std::size_t)>& body) {
  if (count == 0) return;
  if (count == 1 || threads() == 1) {
    for (std::size_t i = 0; i < count; ++i) body(i);
    return;
  }
  current_pool()->run(count, body);
}

}  // namespace freemerge
