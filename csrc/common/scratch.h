// Working memory of one task: aligned pieces of a buffer that the thread keeps between tasks, so that a hot loop asks
// the system for nothing. Not reentrant: a task that holds a Scratch runs no other task on its thread.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace dnl {

class Scratch {
 public:
  static constexpr int64_t kAlign = 64;

  explicit Scratch(int64_t bytes) {
    struct Free {
      void operator()(char* p) const { std::free(p); }
    };
    static thread_local std::unique_ptr<char, Free> buffer;
    static thread_local int64_t size = 0;
    if (bytes > size) {
      buffer.reset();
      const int64_t rounded = (bytes + kAlign - 1) / kAlign * kAlign;
      buffer.reset(static_cast<char*>(std::aligned_alloc(kAlign, rounded)));
      size = buffer ? rounded : 0;
      if (!buffer) throw std::bad_alloc();
    }
    next_ = buffer.get();
#if defined(DNL_POISON_SCRATCH)  // NaN in every element: a build for tests that must not read what they did not write
    for (int64_t i = 0; i < bytes; i++) next_[i] = char(0xff);
#endif
  }

  // Bytes that take<T>(count) uses.
  template <class T>
  static int64_t bytes(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + kAlign - 1) / kAlign * kAlign;
  }
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += bytes<T>(count);
    return piece;
  }

 private:
  char* next_;
};

}  // namespace dnl
