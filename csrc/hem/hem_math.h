// The HEM loss of one sample (Spratling & Schuett, arXiv 2501.12191), one formula per function.
//
// V is a number or a vector of numbers (one sample per lane). The kernels differ in how they walk the
// logits; what they compute is here. With logits y, target class l and margin m:
//
//     e_j  = max(0, y_j - y_l + m)  for j != l,   e_l = 0          error()
//     thr  = mean of e_j over all C classes                        threshold()
//     K    = { j : e_j >= thr and e_j > 0 }                        kept(), or e_j >= cutoff()
//     loss = mean of e_j over K                                    sum over K / |K|, 0 when K is empty
//
// thr and K are constants to autograd, so the gradient is 1/|K| at every j in K and -1 at l.
//
// Included inside the includer's namespace, which may be one of several in a build (see cpu_isa.h).

// What error() takes the positive part of. A NaN among the three stays NaN, so that a broken row is never
// mistaken for a finished one.
template <class V>
HEM_HOST_DEVICE V signed_error(V logit, V target_logit, V margin) {
  return logit - target_logit + margin;
}

template <class V>
HEM_HOST_DEVICE V error(V logit, V target_logit, V margin) {
  return positive_part(signed_error(logit, target_logit, margin));
}

// A division, not a product with 1/C. Rounding may put the mean above every error (all of them equal,
// say), and then nothing would be kept: the largest error bounds it.
template <class V>
HEM_HOST_DEVICE V threshold(V error_sum, V num_classes, V largest_error) {
  return minimum(error_sum / num_classes, largest_error);
}

// The second comparison leaves a finished sample, whose errors and mean are all 0, with nothing kept.
template <class V>
HEM_HOST_DEVICE auto kept(V error, V threshold, V zero) {
  return (error >= threshold) & (error > zero);
}

// Both comparisons in one. A mean may underflow to 0, hence `smallest`, the least number that compares above
// 0.
template <class V>
HEM_HOST_DEVICE V cutoff(V threshold, V smallest) {
  return maximum(threshold, smallest);
}
