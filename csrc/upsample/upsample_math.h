// Bilinear interpolation along one dimension, as torch.nn.functional.interpolate has it.
//
// Output i lies at x = (i + 1/2) * in / out - 1/2, cut off at 0, or with align_corners at i * (in - 1) / (out
// - 1). With k = floor(x) it is input[k] * (1 - w) + input[k + 1] * w, w = x - k. At the last input, and
// behind it, it is that input: w is 0, and input[k + 1], which is not there, counts as input[k]. So does it
// where in and out are one size, and what does not count may be NaN.
//
// Included inside the includer's namespace, after <cmath>.

template <class T>
struct Source {
  int64_t index;
  T weight;  // of the input behind `index`
};

struct Footprint {
  int64_t begin, end;
};

template <class T>
struct Resize {
  int64_t in, out;
  bool align_corners;

  HEM_HOST_DEVICE T scale() const {
    if (!align_corners) return static_cast<T>(in) / static_cast<T>(out);
    return out > 1 ? static_cast<T>(in - 1) / static_cast<T>(out - 1) : T(0);
  }

  HEM_HOST_DEVICE Source<T> source(int64_t i) const {
    const T half = align_corners ? T(0) : T(0.5);
    const T x = std::fma(scale(), static_cast<T>(i) + half, -half);  // rounded once, as torch's
    const int64_t whole = x > 0 ? static_cast<int64_t>(x) : 0, index = whole < in ? whole : in - 1;
    const T weight = x > 0 ? x - static_cast<T>(index) : T(0);
    return {index, weight < 1 ? weight : T(1)};
  }

  // From `index` to the input behind it.
  HEM_HOST_DEVICE int step() const { return in == out ? 0 : 1; }

  // Outputs among which are all that input k touches, and few others.
  HEM_HOST_DEVICE Footprint footprint(int64_t k) const {
    const T step = scale(), half = align_corners ? T(0) : T(0.5);
    if (!(step > 0)) return {0, out};
    // Rounding moves an output by far less than one.
    const T first = (static_cast<T>(k - 1) + half) / step - half - T(1);
    const T last = (static_cast<T>(k + 1) + half) / step - half + T(2);
    const int64_t begin = k == 0 || first < 0 ? 0 : static_cast<int64_t>(first);
    const int64_t end = k == in - 1 || last > static_cast<T>(out) ? out : static_cast<int64_t>(last);
    return {begin < out ? begin : out, end};
  }
};
