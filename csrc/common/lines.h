// Numbers that are written one behind the other: in place, or a line of the caches at a time past them.
// Included inside a namespace and a target region of an instruction set, after lanes.h. No includes in here.
//
// Both take numbers by `room(count)`, kMost at most, which is where they go, then `add(count)`, and zeros by
// `zeros(count)`. Behind those kBehind more may be written, that count for nothing.

constexpr int64_t kLine = 64;  // bytes

template <class Storage>
class InPlace {
 public:
  static constexpr int64_t kMost = int64_t{1} << 40;
  static constexpr int64_t kBehind = 0;

  InPlace(Storage* to, bool streamed) : to_(to), zeros_(to), streamed_(streamed) {}

  HEM_INLINE Storage* room(int64_t) {
    if (zeros_ != to_) finish();
    return to_;
  }
  HEM_INLINE void add(int64_t count) { zeros_ = to_ += count; }
  HEM_INLINE void zeros(int64_t count) { to_ += count; }

  // Zeros, where many follow each other past the caches, but for the lines that others write to as well, at
  // the end and, with what a vector may have left behind it, at the beginning.
  void finish() {
    constexpr int64_t kMany = 32768;
    char* p = reinterpret_cast<char*>(zeros_);
    int64_t bytes = (to_ - zeros_) * static_cast<int64_t>(sizeof(Storage));
    if (streamed_ && bytes >= kMany) {
      const int64_t before = (-reinterpret_cast<intptr_t>(p) & (kLine - 1)) + 2 * kLine;
      memset(p, 0, before);
      for (p += before, bytes -= before; bytes >= kLine; p += kLine, bytes -= kLine) {
        Lanes<float>::broadcast(0).store_exactly(reinterpret_cast<float*>(p), true);
      }
    }
    if (bytes > 0) memset(p, 0, bytes);  // p is null where there are no rows
    zeros_ = to_;
  }

 private:
  Storage* to_;
  Storage* zeros_;  // from here to there, not written yet
  bool streamed_;
};

template <class Storage>
class ByLine {
 public:
  static constexpr int64_t kMost = 1024;
  static constexpr int64_t kBehind = 2 * kLanes;

  ByLine(Storage* to, bool)
      : held_(static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % kLine / sizeof(Storage))),
        others_(held_),
        to_(to - held_) {}

  HEM_INLINE Storage* room(int64_t count) {
    if (held_ + count > kCapacity) write_lines();
    return lines_ + held_;
  }
  HEM_INLINE void add(int64_t count) { held_ += count; }

  void zeros(int64_t count) {
    const int64_t rest = kPerLine - held_ % kPerLine;
    if (count < rest + kPerLine) {
      memset(room(count), 0, count * sizeof(Storage));
      held_ += count;
      return;
    }
    memset(lines_ + held_, 0, rest * sizeof(Storage));
    held_ += rest;
    write_lines();
    for (count -= rest; count >= kPerLine; count -= kPerLine, to_ += kPerLine) {
      Lanes<float>::broadcast(0).store_exactly(reinterpret_cast<float*>(to_), true);
    }
    memset(lines_, 0, kLine);
    held_ = count;
  }

  // The last line may be others' as well.
  void finish() {
    write_lines();
    memcpy(to_ + others_, lines_ + others_, (held_ - others_) * sizeof(Storage));
  }

 private:
  static constexpr int64_t kPerLine = kLine / static_cast<int64_t>(sizeof(Storage));
  static constexpr int64_t kCapacity = 2 * kMost;

  // Those that are full; what is left comes first.
  void write_lines() {
    const int64_t full = held_ / kPerLine * kPerLine;
    if (full == 0) return;
    int64_t i = 0;
    if (others_ > 0) {
      memcpy(to_ + others_, lines_ + others_, (kPerLine - others_) * sizeof(Storage));
      others_ = 0;
      i = kPerLine;
    }
    for (; i < full; i += kPerLine) {
      Lanes<float>::load(reinterpret_cast<const float*>(lines_ + i))
          .store_exactly(reinterpret_cast<float*>(to_ + i), true);
    }
    memcpy(lines_, lines_ + full, kLine);
    to_ += full;
    held_ -= full;
  }

  int64_t held_;    // numbers in `lines_`
  int64_t others_;  // that come before the first one of ours in its line
  Storage* to_;     // where `lines_` go
  alignas(kLine) Storage lines_[kCapacity + 4 * kLanes];
};
