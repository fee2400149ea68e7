// Uninitialised scratch memory, aligned to a cache line: on the stack while it is small.
//
// Included inside the includer's namespace (see cpu_isa.h), after <cstddef> and <new>.

template <class T, size_t kOnStack>
class AlignedBuffer {
 public:
  explicit AlignedBuffer(size_t count)
      : heap_(count > kOnStack ? static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64}))
                               : nullptr) {}
  ~AlignedBuffer() {
    if (heap_ != nullptr) ::operator delete(heap_, std::align_val_t{64});
  }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;

  T* data() { return heap_ != nullptr ? heap_ : stack_; }

 private:
  T* heap_;
  alignas(64) T stack_[kOnStack];
};
