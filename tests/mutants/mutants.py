"""What the tests have to notice: pieces of the code, each with what it is replaced by and the tests that see it.

Run by ``make mutants``; that every piece is still there, by ``make test``.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Mutant(NamedTuple):
    name: str
    file: str
    old: str  # exactly once in the file
    new: str
    tests: tuple[str, ...]
    survives: str = ""
    """Why it makes no difference that a test could see, where it makes none."""
    needs: str = ""
    """What torch has to find in the processor to run it at all."""

    def applied(self) -> str:
        """The text of the file with it."""
        text = (ROOT / self.file).read_text("utf-8")
        found = text.count(self.old)
        if found != 1:
            raise ValueError(f"the mutant {self.name!r} replaces what is {found} times in {self.file}: {self.old!r}")
        return text.replace(self.old, self.new)


def of_hem(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/test_hem.py::test_{name}" for name in names)


def of_emulation(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/emulation/test_emulation.py::test_{name}" for name in names)


def of(file: str, *names: str) -> tuple[str, ...]:
    return tuple(f"tests/{file}.py::test_{name}" for name in names)


MATH, CUDA = "csrc/hem/hem_math.h", "csrc/hem/hem_cuda_kernels.cuh"
KERNELS, SAMPLES = "csrc/hem/hem_cpu_kernels.inl", "csrc/hem/hem_cpu_samples.inl"
ERRORS = "csrc/hem/hem_cpu_errors.inl"
GLUE, CPU_GLUE = "csrc/hem/hem_torch.h", "csrc/hem/hem_cpu_torch.h"
UPSAMPLE, CUDA_UPSAMPLE = "csrc/upsample/upsample_cpu_kernels.inl", "csrc/upsample/upsample_cuda_kernels.cuh"
PLACES = "csrc/upsample/upsample_math.h"
SHARES, CUDA_SHARES = "csrc/parallel/parallel_cpu_kernels.inl", "csrc/parallel/parallel_cuda_kernels.cuh"
# Narrow rows, wide ones, of 512 classes and more, pixels.
ORACLE = of_hem(*(f"matches_the_oracle[baseline-shape{i}-dtype0]" for i in (5, 8, 10, 12, 13, 16, 18)))
EMULATED = of_emulation(
    *(f"matches_the_oracle[narrow_rows-shape{i}-float32]" for i in (1, 3)),
    *(f"matches_the_oracle[warp_rows-shape{i}-float32]" for i in (5, 6)),
    "matches_the_oracle[block_rows-shape9-float32]",
    *(f"matches_the_oracle[pixels-shape{i}-float32]" for i in (13, 14)),
)
RACES = ("tests/emulation/test_sanitizers.py::test_kernels_are_clean[thread]",)
SHARED = of(
    "test_share",
    *(
        f"matches_the_oracle[baseline-{lie}-shape{i}-begins{i}-dtype0]"
        for lie, i in (("as_given", 0), ("as_given", 1), ("as_given", 2), ("as_given", 6), ("as_channels_last", 5))
    ),
)
SHARED_ON_CUDA = of_emulation("classes_that_are_shared_out")
BY_LINE = of("cross/test_cross", "same_bits_as_the_library[gcc-baseline]")
RATIOS = of("test_upsample", "any_ratio")
GUARDED = of("test_guard_pages", "every_op_stays_inside_its_tensors")
EVERY_ISA = of_hem("every_instruction_set_and_thread_count_gives_the_same_bits")
LANES, LANES_X86, LINES = "csrc/common/lanes.h", "csrc/common/lanes_x86.h", "csrc/common/lines.h"


def of_oracle(isa: str, shape: int, dtype: int = 0) -> tuple[str, ...]:
    return of_hem(f"matches_the_oracle[{isa}-shape{shape}-dtype{dtype}]")


FORMULAS = [
    Mutant(
        "the largest error no longer bounds the mean", MATH,
        "return minimum(error_sum / num_classes, largest_error);",
        "return (void)largest_error, error_sum / num_classes;",
        of_hem("a_mean_above_every_error_still_keeps_the_largest"),
    ),
    Mutant(
        "what is cut off may be 0", MATH,
        "return maximum(threshold, smallest);",
        "return (void)smallest, threshold;",
        of_hem("finished_samples_do_not_pull_the_mean_down"),
    ),
    Mutant(
        "errors are below 0", MATH,
        "return positive_part(signed_error(logit, target_logit, margin));",
        "return signed_error(logit, target_logit, margin);",
        (*ORACLE, *EMULATED[:1]),
    ),
    Mutant(
        "CUDA drops an error that is the mean", MATH,
        "return (error >= threshold) & (error > zero);",
        "return (error > threshold) & (error > zero);",
        of_emulation("an_error_equal_to_the_mean_is_kept"),
    ),
    Mutant(
        "CUDA keeps errors of 0", MATH,
        "return (error >= threshold) & (error > zero);",
        "return (void)zero, error >= threshold;",
        of_emulation("a_mean_that_underflows_keeps_no_class_without_an_error"),
    ),
]  # fmt: skip

CPU = [
    Mutant(
        "an error that is the mean is dropped", SAMPLES,
        "const auto k = e >= cut;", "const auto k = e > cut;",
        of_hem("an_error_equal_to_the_mean_is_kept"),
    ),
    Mutant(
        "an error that is the mean is dropped in wide rows", ERRORS,
        "const auto k = signed_e >= least;", "const auto k = signed_e > least;",
        of_hem("an_error_equal_to_the_mean_is_kept"),
    ),
    Mutant(
        "errors are below 0 in wide rows", ERRORS,
        "sum.add(v, positive_part(signed_e));", "sum.add(v, signed_e);",
        ORACLE,
    ),
    Mutant(
        "the cut may be 0 in wide rows", ERRORS,
        "return thr > smallest ? thr : smallest;", "return (void)smallest, thr;",
        of_hem("a_mean_that_underflows_keeps_no_class_without_an_error"),
    ),
    Mutant(
        "the target counts in pixels", ERRORS,
        "const V e = drop(V::equal(target, static_cast<int32_t>(j)), error(logits, y, m));",
        "const V e = error(logits, y, m);\n    (void)j;",
        ORACLE,
    ),
    Mutant(
        "the last classes of narrow rows count twice", ERRORS,
        "if (last + k >= j && last + k < classes)", "if (last + k < classes)",
        ORACLE,
    ),
    Mutant(
        "narrow rows are loaded with what lies behind the last one", ERRORS,
        "if (block.count - at < kLanes || classes < kColumns) {", "if (classes < kColumns) {",
        GUARDED,
    ),
    Mutant(
        "the gradient of the last row is written with what lies behind it", KERNELS,
        "if (room - j >= kCount) {", "if (room > 0) {",
        GUARDED,
    ),
    Mutant(
        "finished rows among others are not written", LINES,
        "if (zeros_ != to_) finish();", "",
        of_hem("finished_rows_between_others"),
    ),
    Mutant(
        "finished rows at the end are not written", KERNELS,
        "  out.finish();\n", "",
        of_hem("finished_rows_between_others"),
    ),
    Mutant(
        "few rows that have not finished lie among what was there", KERNELS,
        "if (cleared) memset(to, 0, rows * classes * sizeof(Storage));", "",
        of_hem("finished_rows_between_others"),
    ),
    Mutant(
        "finished rows lie among what was there where more have not", KERNELS,
        "memset(to, 0, classes * sizeof(Storage));", "(void)cleared;",
        of_hem("finished_rows_between_others"),
    ),
    Mutant(
        "lines begin before the gradient", LINES,
        "    if (others_ > 0) {", "    if (others_ < 0) {",
        BY_LINE,
    ),
    Mutant(
        "zeros do not fill the line that they begin in", LINES,
        "memset(lines_ + held_, 0, rest * sizeof(Storage));", "",
        BY_LINE,
    ),
    Mutant(
        "what a full line leaves is lost", LINES,
        "memcpy(lines_, lines_ + full, kLine);", "",
        BY_LINE,
    ),
    Mutant(
        "the target lies where it would in the first piece of a row", KERNELS,
        "targets[at + i] - range.first - j;", "targets[at + i] - range.first;",
        BY_LINE,
    ),
    Mutant(
        "rows of each other are loaded across with AVX2", LANES_X86,
        "return _mm256_insertf128_ps(_mm256_castps128_ps256(load_four(p)), load_four(p + 4 * stride), 1);",
        "return _mm256_insertf128_ps(_mm256_castps128_ps256(load_four(p)), load_four(p + stride), 1);",
        EVERY_ISA, needs="AVX2",
    ),
    Mutant(
        "rows of each other are loaded across with AVX-512", LANES_X86,
        "v = _mm512_insertf32x4(v, load_four(p + 8 * stride), 2);",
        "v = _mm512_insertf32x4(v, load_four(p + 12 * stride), 2);",
        EVERY_ISA, needs="AVX512",
    ),
    Mutant(
        "the target counts in wide rows", ERRORS,
        "~(has_target ? uint64_t{1} << at_target : 0)", "~uint64_t{0}",
        ORACLE,
    ),
    Mutant(
        "the target counts in rows of 512 classes", ERRORS,
        "left >= kGroup && !has_target && classes >= kPredictable", "left >= kGroup && classes >= kPredictable",
        ORACLE,
    ),
    Mutant(
        "a class too many at the end of a wide row", ERRORS,
        "& ((1u << n) - 1u);", "& ((2u << n) - 1u);",
        ORACLE,
    ),
    Mutant(
        "bits of the first word alone in pixels", KERNELS,
        "V::load_ints(words + w * stride)", "((void)stride, V::load_ints(words))",
        ORACLE,
    ),
    Mutant(
        "bits of the first word alone in rows", KERNELS,
        "count_kept(words + i * num_words, num_words, 1)", "count_kept(words + i * num_words, 1, 1)",
        ORACLE,
    ),
    Mutant(
        "the last pixels get what comes down to the first", KERNELS,
        "(scale, block.position + at, labels,", "(scale, block.position, labels,",
        of_hem("the_gradient_scales_with_grad_loss"),
    ),
    Mutant(
        "broken samples have a gradient that is none", KERNELS,
        "V::equal(count, static_cast<int32_t>(range.of))", "V::equal(count, static_cast<int32_t>(range.of) + 1)",
        of_hem("a_broken_row_is_nan_and_alone"),
    ),
    Mutant(
        "finished wide rows are counted", KERNELS,
        "if (a.count_all || loss > 0)", "if (a.count_all || loss >= 0)",
        of_hem("finished_samples_do_not_pull_the_mean_down"),
    ),
    Mutant(
        "wide rows take infinity for a loss", KERNELS,
        "if (is_nan || !(loss <= largest_finite<T>())) {", "if (is_nan) {",
        of_hem("a_broken_row_is_nan_and_alone"),
    ),
    Mutant(
        "wide rows do not ask whether the target is NaN", KERNELS,
        "stats.sum != stats.sum || target_logit != target_logit", "stats.sum != stats.sum",
        of_hem("a_broken_row_is_nan_and_alone", "one_class"),
        survives="they have 65 classes or more, and a target that is NaN makes all the others' errors NaN",
    ),
    Mutant(
        "32 bits to the row of a wide one", KERNELS,
        "static_cast<const Storage*>(a.input) + (block.inner + i) * layout.inner_stride;",
        "static_cast<const Storage*>(a.input) + static_cast<int32_t>((block.inner + i) * layout.inner_stride);",
        of_hem("logits_that_lie_far_apart"),
    ),
    Mutant(
        "32 bits to the row of a narrow one", ERRORS,
        "const Storage* rows = first + at * layout.inner_stride;",
        "const Storage* rows = first + static_cast<int32_t>(at * layout.inner_stride);",
        of_hem("logits_that_lie_far_apart"),
    ),
    Mutant(
        "32 bits to an image", KERNELS,
        "static_cast<const Storage*>(a.input) + block.outer * layout.outer_stride +",
        "static_cast<const Storage*>(a.input) + static_cast<int32_t>(block.outer * layout.outer_stride) +",
        of_hem("logits_that_lie_far_apart"),
    ),
    Mutant(
        "32 bits to the target of a pixel", KERNELS,
        "to_float(first[i * layout.inner_stride + t * layout.class_stride]);",
        "to_float(first[i * layout.inner_stride + static_cast<int32_t>(t * layout.class_stride)]);",
        of_hem("logits_that_lie_far_apart"),
    ),
    Mutant(
        "no fence behind streamed stores", KERNELS,
        "if (streamed) end_streaming();", "",
        of_hem("a_gradient_that_is_written_past_the_caches"),
        survives="a thread that is waited for ends with a locked instruction, which on x86 is such a fence too",
    ),
    Mutant(
        "zeros past the caches leave out what lies before a line", LINES,
        "memset(p, 0, before);", "",
        BY_LINE,
    ),
    Mutant(
        "zeros past the caches leave out what lies behind the last line", LINES,
        "  if (bytes > 0) memset(p, 0, bytes);", "  if (bytes >= kLine) memset(p, 0, bytes);",
        BY_LINE,
    ),
    Mutant(
        "a target that is NaN is not asked for", SAMPLES,
        "(V::bits(is_nan(error_sum)) | V::bits(is_nan(y))) & valid", "((void)y, V::bits(is_nan(error_sum))) & valid",
        of_hem("one_class"),
    ),
    Mutant(
        "infinity is a loss", SAMPLES,
        "is_broken | (~finite & valid)", "((void)finite, is_broken)",
        of_hem("a_broken_row_is_nan_and_alone"),
    ),
    Mutant(
        "finished samples are counted", SAMPLES,
        "keep(loss > V::broadcast(0), weight)", "weight",
        of_hem("finished_samples_do_not_pull_the_mean_down"),
    ),
    Mutant(
        "ignored samples are counted", SAMPLES,
        "weight[i] = target[i] < 0 ? T(0) : T(1);", "weight[i] = T(1);",
        ORACLE,
    ),
    Mutant(
        "ignored samples have the weight of class 0", SAMPLES,
        "if (target[i] >= 0) weight[i] = weights[target[i]];", "weight[i] = weights[target[i] < 0 ? 0 : target[i]];",
        ORACLE,
    ),
    Mutant(
        "an ignored label that is a class is one", SAMPLES,
        "to[i] = (good & !ignored) ?", "to[i] = good ?",
        of_hem("target_dtypes"),
    ),
    Mutant(
        "a class behind the last one", SAMPLES,
        "static_cast<uint64_t>(target) < uint64_t(classes)", "static_cast<uint64_t>(target) <= uint64_t(classes)",
        of("properties/test_hostile", "a_target_that_is_no_class"),
    ),
    Mutant(
        "what nothing counts is divided by 0 in backward", SAMPLES,
        "common_ = denominator > 0 ? grads_[0] / denominator : T(0);", "common_ = grads_[0] / denominator;",
        of_hem("finished_and_ignored_samples_give_zero_not_nan"),
    ),
    Mutant(
        "what nothing counts is divided by 0", CPU_GLUE,
        "call.divides() && total.weight > 0 ?", "call.divides() ?",
        of_hem("finished_and_ignored_samples_give_zero_not_nan"),
    ),
    Mutant(
        "batchmean is mean", CPU_GLUE,
        "args.count_all = call.reduction == Reduction::kBatchMean;", "args.count_all = false;",
        of_hem("finished_samples_do_not_pull_the_mean_down"),
    ),
    Mutant(
        "the last pixels are loaded with what lies behind them", ERRORS,
        "return V::load_first(p, rest);", "return (void)rest, V::load(p);",
        GUARDED,
    ),
    Mutant(
        "the last classes of a wide row are loaded with what lies behind them", ERRORS,
        "visit_rivals(v, V::load_first(row + first + v * kLanes, n), n);",
        "visit_rivals(v, V::load(row + first + v * kLanes), n);",
        GUARDED,
    ),
    Mutant(
        "the last columns are blended with what lies behind them", UPSAMPLE,
        "(above * V::load_first(a + k, rest) + below * V::load_first(b + k, rest)).store(to + k);",
        "(void)rest, (above * V::load(a + k) + below * V::load(b + k)).store(to + k);",
        GUARDED,
    ),
    Mutant(
        "memory that is a byte short is read", "csrc/common/torch_glue.h",
        "if (extent > 0 && needed > held) {", "if (extent > 0 && held == 0) {",
        of("properties/test_hostile", "memory_that_is_a_byte_short", "targets_with_gaps_that_are_a_byte_short"),
    ),
    Mutant(
        "strides of grad_loss are not looked at", GLUE,
        "per_sample, labels, as_contiguous(\"grad_loss\", grad_loss)};", "per_sample, labels, grad_loss};",
        of_hem("strides_of_grad_loss"),
    ),
    Mutant(
        "strides of targets are not looked at", GLUE,
        "return as_contiguous(\"target\", target);", "return target;",
        of_hem("targets_that_are_not_contiguous"),
    ),
    Mutant(
        "stores past the caches to where none may go", CPU_GLUE,
        "return stride * size % kLine == 0;", "return stride * size % kLine >= 0;",
        of_hem("a_large_gradient_that_is_not_aligned"),
    ),
    Mutant(
        "pixels are in the sum of those beside them", ERRORS,
        "stats[3] = stats_of_set(d, trees[3]);", "stats[3] = stats_of_set(d, trees[2]);",
        EVERY_ISA, needs="AVX512",
    ),
    Mutant(
        "the second set of pixels has the logits of the first", ERRORS,
        "b.visit(load(row + kLanes), j, to + set);", "b.visit(load(row), j, to + set);",
        EVERY_ISA, needs="AVX2",
    ),
    Mutant(
        "chunks that no sum is as long as", SAMPLES,
        "constexpr int64_t kChunk = 64;", "constexpr int64_t kChunk = 1 << 20;",
        of_hem("the_mean_is_a_tree_sum"),
    ),
    Mutant(
        "no tree over the chunks of a wide row", ERRORS,
        "if ((group + 1) % (kChunk / 4) == 0) sum.end_chunk();", "(void)group;",
        of_hem("the_mean_is_a_tree_sum"),
    ),
    Mutant(
        "channels_last: the second word of a pixel lies where that of the next one does", SAMPLES,
        "return {a.mask + inner * num_words, 1, num_words, lanes};",
        "return {a.mask + inner * num_words, num_words, 1, lanes};",
        of_oracle("baseline", 8),
    ),
    Mutant(
        "channels_last: sixteen pixels write where the first of their block do", SAMPLES,
        "if (a.layout.rows) return {a.mask + inner * num_words,",
        "if (a.layout.rows) return {a.mask + block.inner * num_words,",
        of_oracle("baseline", 5),
    ),
    Mutant(
        "the last of four sixteens of pixels says whether all are finished", KERNELS,
        "finished &= c[k].finished;", "finished = c[k].finished;",
        of_hem("finished_pixels_beside_others"), needs="AVX2",
    ),
    Mutant(
        "sixteen pixels are finished where one is", KERNELS,
        "if (V::bits(active) == 0) return", "if (V::bits(active) != 0xffffu) return",
        of_oracle("baseline", 18),
    ),
    Mutant(
        "sixteen samples are finished though one is broken", SAMPLES,
        "if ((V::bits(stats.largest > V::broadcast(0)) | is_broken) ==",
        "if (V::bits(stats.largest > V::broadcast(0)) ==",
        of_hem("one_class"),
    ),
    Mutant(
        "what fills up the last sixteen samples counts", SAMPLES,
        "target[i] = -1;\n", "target[i] = 0;\n",
        of_oracle("baseline", 16),
    ),
    Mutant(
        "a tail of pixels writes sixteen words", SAMPLES,
        "if (to.lane_stride == 1 && to.lanes == kLanes) {", "if (to.lane_stride == 1) {",
        of_oracle("baseline", 19),
    ),
    Mutant(
        "the last pixel of a tail gets no gradient", KERNELS,
        "memcpy(p, lane, rest * sizeof(Storage));", "memcpy(p, lane, (rest - 1) * sizeof(Storage));",
        of_oracle("baseline", 16),
    ),
    Mutant(
        "the last lane of a tail is 0", LANES,
        "memcpy(copy, p, n * sizeof(Storage));", "memcpy(copy, p, (n - 1) * sizeof(Storage));",
        of_oracle("baseline", 10),
    ),
    Mutant(
        "the last lane of a tail is 0 with AVX2", LANES_X86,
        "const Mask m = mask_from_bits((1u << n) - 1u);", "const Mask m = mask_from_bits((1u << (n - 1)) - 1u);",
        EVERY_ISA, needs="AVX2",
    ),
    Mutant(
        "the last lane of a tail is 0 with AVX-512", LANES_X86,
        "static_cast<__mmask16>((1u << n) - 1u);", "static_cast<__mmask16>((1u << (n - 1)) - 1u);",
        EVERY_ISA, needs="AVX512",
    ),
    Mutant(
        "every vector has the mask of the first", LANES,
        "memcpy(&v, kBits + k * kEach, sizeof(v));", "(void)k, memcpy(&v, kBits, sizeof(v));",
        ORACLE,
    ),
    Mutant(
        "a lane's bit is its neighbour's in the upper half with AVX2", LANES_X86,
        "const __m256i high = _mm256_slli_epi32(low, 8);", "const __m256i high = _mm256_slli_epi32(low, 9);",
        EVERY_ISA, needs="AVX2",
    ),
    Mutant(
        "the upper half has the targets of the lower one with AVX2", LANES_X86,
        "_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.hi, all))};\n  }\n  static Mask has_bit",
        "_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.lo, all))};\n  }\n  static Mask has_bit",
        EVERY_ISA, needs="AVX2",
    ),
    Mutant(
        "bfloat16 with AVX2 lies in the order of packing", LANES_X86,
        "_mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8)", "_mm256_packus_epi32(a, b)",
        EVERY_ISA, needs="AVX2",
    ),
    Mutant(
        "the lower half is added to itself with AVX-512", LANES_X86,
        "_mm512_extractf32x8_ps(a.v, 1)", "_mm512_extractf32x8_ps(a.v, 0)",
        EVERY_ISA, needs="AVX512",
    ),
    Mutant(
        "lanes are added up in another order", LANES,
        "lane[i] += lane[i + width];", "lane[i] = lane[2 * i] + lane[2 * i + 1];",
        EVERY_ISA, needs="AVX2",
    ),
    Mutant(
        "a word of 32 bits has none", LANES,
        "return IntVector((n + (n >> 16)) & 0x3fu);", "return IntVector((n + (n >> 16)) & 0x1fu);",
        of_hem("a_broken_row_is_nan_and_alone"),
    ),
    Mutant(
        "half of the bits are counted with AVX2", LANES_X86,
        "_mm256_shuffle_epi8(of_nibble, _mm256_and_si256(_mm256_srli_epi16(a, 4), low))",
        "_mm256_and_si256(_mm256_srli_epi16(a, 4), _mm256_setzero_si256())",
        EVERY_ISA, needs="AVX2",
    ),
    Mutant(
        "four bits are counted as three with AVX-512", LANES_X86,
        "_mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));",
        "_mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 3));",
        EVERY_ISA, needs="AVX512",
    ),
    Mutant(
        "bfloat16 rounds ties up", "csrc/common/half.h",
        "(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16", "(bits + 0x8000u) >> 16",
        of_hem("a_gradient_is_rounded_as_torch_rounds"),
    ),
    Mutant(
        "float16 rounds ties up", "csrc/common/half.h",
        "(bits - (112u << 23) + 0x0fffu + ((bits >> 13) & 1u)) >> 13", "(bits - (112u << 23) + 0x1000u) >> 13",
        of_hem("a_gradient_is_rounded_as_torch_rounds"),
    ),
    Mutant(
        "the maximum with 0 loses a NaN", "csrc/common/lanes_x86.h",
        "{_mm256_max_ps(_mm256_setzero_ps(), a.lo),", "{_mm256_max_ps(a.lo, _mm256_setzero_ps()),",
        of_hem("a_broken_row_is_nan_and_alone"),
    ),
    Mutant(
        "a tree that is a chain", "csrc/common/lanes.h",
        "for (uint32_t n = count_++; n & 1u; n >>= 1) x = levels_[level++] + x;",
        "if (count_ != 0) x = levels_[0] + x;\n    count_ = 1;",
        of_hem("the_mean_is_a_tree_sum", "equal_errors_are_all_kept"),
    ),
]  # fmt: skip

UPSAMPLED = [
    Mutant(
        "nothing stands for the column behind the last", UPSAMPLE,
        "if (last == a.columns.in) {", "if (false) {",
        RATIOS,
    ),
    Mutant(
        "the column behind the last gets lost in backward", UPSAMPLE,
        "from[(width - 1) * padded + j] += from[width * padded + j];", "(void)j;",
        RATIOS,
    ),
    Mutant(
        "the next column touched is the next there is", UPSAMPLE,
        "const bool is_next = columns.index[x] == column + 1;", "const bool is_next = true;",
        RATIOS,
    ),
    Mutant(
        "bits of the first word alone when upsampled", UPSAMPLE,
        "count_kept(words + x, num_words, layout.inner)", "count_kept(words + x, 1, layout.inner)",
        RATIOS,
    ),
    Mutant(
        "a band without the row above it", UPSAMPLE,
        "int64_t above = first > 0 ? first - 1 : 0;", "int64_t above = first;",
        RATIOS,
    ),
    Mutant(
        "places before the first input", PLACES,
        "x > 0 ? x - static_cast<T>(index) : T(0);", "x - static_cast<T>(index);",
        RATIOS,
    ),
    Mutant(
        "CUDA does not look at the last pixels that an input touches", PLACES,
        "/ step - half + T(2);", "/ step - half;",
        of_emulation("upsampled"),
    ),
    Mutant(
        "CUDA lets the last input lose what is behind it", CUDA_UPSAMPLE,
        "return k == in - 1 ? T(1) : T(1) - source.weight;", "return (void)in, T(1) - source.weight;",
        of_emulation("upsampled"),
    ),
    Mutant(
        "CUDA gives an input what its neighbours have", CUDA_UPSAMPLE,
        "if (row.index != i && row.index + upsample.rows.step() != i) continue;", "",
        of_emulation("upsampled"),
    ),
    Mutant(
        "CUDA finds the target in every word", CUDA_UPSAMPLE,
        "c.own / 32 == w && c.own >= 0 ? static_cast<int>(c.own % 32) : -1;",
        "c.own >= 0 ? static_cast<int>(c.own % 32) : -1;",
        of_emulation("upsampled"),
    ),
    Mutant(
        "CUDA interpolates an axis that keeps its size", PLACES,
        "return in == out ? 0 : 1;", "return 1;",
        of_emulation("an_axis_that_keeps_its_size_is_not_interpolated"),
    ),
    Mutant(
        "an axis that keeps its size is interpolated", "csrc/upsample/upsample_cpu_kernels.h",
        "return in == out;", "return false;",
        of("properties/test_hostile", "an_axis_that_keeps_its_size_is_not_interpolated"),
    ),
    Mutant(
        "memory that is not aligned to its elements is read", "csrc/common/torch_glue.h",
        "if (reinterpret_cast<uintptr_t>(data) % size != 0) {", "if (false) {",
        of("properties/test_hostile", "memory_that_is_not_aligned"),
    ),
    Mutant(
        "memory that was given back is read", "csrc/common/torch_glue.h",
        "if (extent > 0 && needed > held) {", "if (extent < 0 && needed > held) {",
        of("properties/test_hostile", "memory_that_was_given_back"),
    ),
]  # fmt: skip

ON_CUDA = [
    Mutant(
        "narrow rows do not ask whether the target is NaN", CUDA,
        "if (error_sum != error_sum || y != y) loss = T(NAN);\n      }",
        "if (error_sum != error_sum) loss = T(NAN);\n      }",
        of_emulation("one_class"),
    ),
    Mutant(
        "CUDA's pixels do not ask whether the target is NaN", CUDA,
        "if (sum[k] != sum[k] || y[k] != y[k]) loss = T(NAN);", "if (sum[k] != sum[k]) loss = T(NAN);",
        of_emulation("one_class"),
    ),
    Mutant(
        "pixels of many classes do not ask whether the target is NaN", CUDA,
        "tally->add(a, position, target, error_sum != error_sum || y != y ? T(NAN) : T(0));",
        "tally->add(a, position, target, error_sum != error_sum ? T(NAN) : T(0));",
        of_emulation("one_class"),
    ),
    Mutant(
        "the target counts in CUDA's narrow rows", CUDA,
        "const T e = j == target ? T(0) : error<T>(widen(row[j]), y, margin);\n          sum[j & 3] += e;",
        "const T e = error<T>(widen(row[j]), y, margin);\n          sum[j & 3] += e;",
        EMULATED,
    ),
    Mutant(
        "the target counts in CUDA's wide rows", CUDA,
        "j + k < classes && j + k != target;", "j + k < classes;",
        EMULATED,
    ),
    Mutant(
        "the target counts in CUDA's pixels", CUDA,
        "target[k] >= 0 && target[k] != j;", "target[k] >= 0;",
        EMULATED,
    ),
    Mutant(
        "an element too few at the end of a tile", CUDA,
        "i = head + vectors * kWidth + threadIdx.x; i < n;", "i = head + vectors * kWidth + threadIdx.x; i < n - 1;",
        of_emulation("matches_the_oracle[narrow_rows-shape2-float32]"),
    ),
    Mutant(
        "CUDA counts ignored samples", CUDA,
        "if (a.count_all || (finite && sample_loss > 0)) weight += w;\n    }",
        "}\n    if (a.count_all || (finite && sample_loss > 0)) weight += target < 0 ? 1 : a.weight[target];",
        of_emulation("reductions_and_grids"),
    ),
    Mutant(
        "CUDA divides by 0 what nothing counts", CUDA,
        "divides && weight > 0 ? sum / weight : sum", "divides ? sum / weight : sum",
        of_emulation("nothing_that_is_counted"),
    ),
    Mutant(
        "CUDA divides by 0 in backward", CUDA,
        "g = denominator > 0 ? *a.grad_loss / denominator : T(0);", "g = *a.grad_loss / denominator;",
        of_emulation("nothing_that_is_counted"),
    ),
    Mutant(
        "CUDA's backward knows no weight", CUDA,
        "if (a.weight != nullptr) g *= a.weight[target];", "",
        of_emulation("reductions_and_grids"),
    ),
    Mutant(
        "bits of the first word alone in CUDA's wide rows", CUDA,
        "count += __popc(words[w]);", "count += __popc(words[0]);",
        EMULATED,
    ),
    Mutant(
        "bits of the first word alone in CUDA's pixels", CUDA,
        "load_words(w, word);", "load_words(0, word);",
        EMULATED,
    ),
    Mutant(
        "a misaligned row loses the bits that cross a word", CUDA,
        "words[w] >> row.shift | words[w + 1] << (32 - row.shift);", "words[w] >> row.shift;",
        of_emulation("misaligned_rows"),
    ),
    Mutant(
        "nothing behind the last word of a misaligned row", CUDA,
        "if (team.rank == 0) words[rounds * team.size * kWidth / 32] = 0;", "",
        of_emulation("a_misaligned_row_that_fills_its_words"),
    ),
    Mutant(
        "32 bits to a wide row", CUDA,
        "static_cast<const Storage*>(a.input) + position * a.layout.inner_stride;",
        "static_cast<const Storage*>(a.input) + static_cast<int>(position * a.layout.inner_stride);",
        of_emulation("rows_that_lie_far_apart"),
    ),
    Mutant(
        "CUDA rounds ties to bfloat16 up", "csrc/common/device.cuh",
        "(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16", "(bits + 0x8000u) >> 16",
        of_emulation("a_gradient_is_rounded_as_torch_rounds"),
    ),
    Mutant(
        "wide rows are looked at twice on CUDA when they are finished", CUDA,
        "if (!(error_sum > 0)) rounds = 0;", "",
        of_emulation("what_is_finished_is_not_looked_at_twice"),
    ),
    Mutant(
        "no barrier before pixels read each other's sums", CUDA,
        "    __syncthreads();\n    T thr[kWidth];", "    T thr[kWidth];",
        RACES,
    ),
    Mutant(
        "no barrier before pixels write their second sums", CUDA,
        "    __syncthreads();\n\n    for (int k = 0; k < kWidth; ++k) {", "    for (int k = 0; k < kWidth; ++k) {",
        RACES,
    ),
    Mutant(
        "no barrier before a block takes its next rows", CUDA,
        "all_bits(classes, w);\n      }\n    }\n    __syncthreads();",
        "all_bits(classes, w);\n      }\n    }",
        RACES,
    ),
]  # fmt: skip

HEM, REFERENCE, ARGUMENTS = "hem_ext/hem.py", "hem_ext/reference.py", "hem_ext/arguments.py"
PARALLEL = [
    Mutant(
        "the target of a share counts", SHARES,
        "is_here ? static_cast<int32_t>(own) : INT32_MAX;", "((void)is_here, INT32_MAX);",
        SHARED,
    ),
    Mutant(
        "samples whose target is before a share are ignored in it", SHARES,
        "const bool is_here = own >= 0 && own < a.hem.layout.classes;",
        "const bool is_here = own < a.hem.layout.classes;",
        SHARED,
    ),
    Mutant(
        "the errors of samples that are ignored", SHARES,
        "drop(ignored, stats.sum).store(sum.at + at);", "stats.sum.store(sum.at + at);",
        of("test_share", "a_bad_target_reads_nothing_that_is_not_there"),
    ),
    Mutant(
        "the mean of the classes of a share", SHARES,
        "threshold(V::load(sum.at + at), V::broadcast(T(a.classes)),",
        "threshold(V::load(sum.at + at), V::broadcast(T(classes)),",
        SHARED,
    ),
    Mutant(
        "the mean of the classes of a share in wide rows", SHARES,
        "cutoff_of(sum.at[i], T(a.classes), largest.at[i])", "cutoff_of(sum.at[i], T(classes), largest.at[i])",
        SHARED,
    ),
    Mutant(
        "finished rows of a share are looked at again", SHARES,
        "if (samples.target[i] >= 0 && largest.at[i] > 0) {", "if (samples.target[i] >= 0) {",
        of("test_share", "what_is_finished_is_not_looked_at_again"),
    ),
    Mutant(
        "finished pixels of a share are looked at again", SHARES,
        "if (V::bits(V::load(largest.at + at) > V::broadcast(0)) != 0) return false;", "return false;",
        of("test_share", "what_is_finished_is_not_looked_at_again"),
    ),
    Mutant(
        "the gradient of a share has the target where that of all has it", KERNELS,
        "own[i] = targets[i] - static_cast<int32_t>(range.first);", "own[i] = targets[i];",
        SHARED,
    ),
    Mutant(
        "pixels of a share are divided by what they keep in it", KERNELS,
        "V::load_ints(counts + i);", "count_pixels<T>(words + i, range.words, inner);",
        SHARED,
    ),
    Mutant(
        "the last pixels of a share are divided by what the first keep", KERNELS,
        "i < rest ? counts[at + i] : 0;", "i < rest ? counts[i] : 0;",
        SHARED,
    ),
    Mutant(
        "CUDA has the target of a share where that of all is", CUDA_SHARES,
        "own = target - a.first;", "own = target;",
        SHARED_ON_CUDA,
    ),
    Mutant(
        "CUDA has the mean of the classes of a share", CUDA_SHARES,
        "T(a.classes), largest);", "T(a.hem.layout.classes), largest);",
        SHARED_ON_CUDA,
    ),
    Mutant(
        "CUDA looks at finished samples of a share again", CUDA_SHARES,
        "finished = !(largest > 0);", "finished = false;",
        of_emulation("a_share_of_what_is_finished_is_looked_at_once"),
    ),
    Mutant(
        "CUDA keeps what lies behind the last class of a share", CUDA_SHARES,
        "const T e = j < classes ?", "const T e = j <= classes ?",
        SHARED_ON_CUDA,
    ),
    Mutant(
        "CUDA adds up the kept of a warp's lanes once for each", CUDA_SHARES,
        "if (lane != 0) continue;", "if (lane > 1) continue;",
        SHARED_ON_CUDA,
    ),
    Mutant(
        "CUDA takes a sample of a share for broken by the classes there", CUDA,
        "if (count == a.range.of) return", "if (count == a.layout.classes) return",
        SHARED_ON_CUDA,
    ),
    Mutant(
        "CUDA divides the gradient of a share's rows by what they keep in it", CUDA,
        "a.range.counts == nullptr ? __popcll(bits) : a.range.counts[position];", "__popcll(bits);",
        SHARED_ON_CUDA,
    ),
]  # fmt: skip

IN_PYTHON = [
    Mutant(
        "autograd is not told of overwritten logits", HEM,
        "torch.autograd.graph.increment_version(grad_input)", "pass",
        of("test_overwrite_input", "a_second_backward"),
    ),
    Mutant(
        "overwritten logits are differentiated", HEM,
        'if torch.is_grad_enabled():\n        raise RuntimeError("overwrite_input=True leaves',
        'if False:\n        raise RuntimeError("overwrite_input=True leaves',
        of("test_overwrite_input", "create_graph"),
    ),
    Mutant(
        "logits with gaps are overwritten", HEM,
        "if rows is None or _has_gaps(input, rows):", "if rows is None:",
        of("test_overwrite_input", "logits_that_must_not_be_written"),
    ),
    Mutant(
        "second derivatives are rounded to the logits", HEM,
        "_DTYPE_CODES[grad_loss.dtype], reduction, rows)", "_DTYPE_CODES[grad_grad_input.dtype], reduction, rows)",
        of_hem("the_double_backward_is_not_rounded_to_the_logits"),
    ),
    Mutant(
        "negated logits are read as their memory is", "hem_ext/_torch.py",
        "if x.is_neg() or not _data_address(x):", "if not _data_address(x):",
        of_hem("tensors_that_are_not_what_they_hold"),
    ),
    Mutant(
        "the reference drops an error that is the mean", REFERENCE,
        "kept = (fixed >= torch.minimum(", "kept = (fixed > torch.minimum(",
        of_hem("an_error_equal_to_the_mean_is_kept"),
    ),
    Mutant(
        "errors are below 0 in the reference", REFERENCE,
        "(y - y_target + m).clamp(min=0)", "(y - y_target + m)",
        of_hem("reference_matches_the_oracle"),
    ),
    Mutant(
        "no largest error bounds the mean of the reference", REFERENCE,
        "torch.minimum(mean, fixed.amax(class_dim, keepdim=True))", "mean",
        of_hem("a_mean_above_every_error_still_keeps_the_largest"),
    ),
    Mutant(
        "the reference keeps errors of 0", REFERENCE,
        " & (fixed > 0)\n", "\n",
        of_hem("an_error_of_0_is_not_kept"),
    ),
    Mutant(
        "the target counts in the reference", REFERENCE,
        ".clamp(min=0).masked_fill(is_target, 0.0)", ".clamp(min=0)",
        of_hem("reference_matches_the_oracle"),
    ),
    Mutant(
        "the reference does not ask whether the target is NaN", REFERENCE,
        "mean.isnan().squeeze(class_dim) | y_target.isnan().squeeze(class_dim)", "mean.isnan().squeeze(class_dim)",
        of_hem("one_class"),
    ),
    Mutant(
        "the reference counts ignored samples", REFERENCE,
        "counted = ~ignored if", "counted = torch.ones_like(ignored) if",
        of_hem("reference_matches_the_oracle"),
    ),
    Mutant(
        "the reference divides by 0 what nothing counts", REFERENCE,
        "return total / arguments.or_one(denominator)", "return total / denominator",
        of_hem("finished_and_ignored_samples_give_zero_not_nan"),
    ),
    Mutant(
        "processes divide by what all of them count, once too often", REFERENCE,
        "return total / group.size()", "return total",
        of("test_upsample", "shares_of_a_batch"),
    ),
    Mutant(
        "any margin takes the short way", ARGUMENTS,
        "and 0.0 <= margin <= _LARGEST_MARGIN", "and 0.0 <= margin",
        of("test_arguments", "a_wrong_argument_is_named"),
    ),
    Mutant(
        "an ignored label past the end of int64", ARGUMENTS,
        "if not -(2**63) <= ignore_index < 2**63:", "if not -(2**63) <= ignore_index <= 2**63:",
        of("properties/test_hostile", "an_ignore_index_that_no_target_can_be"),
    ),
    Mutant(
        "a class behind the last one of the reference", ARGUMENTS,
        "(labels >= num_classes)", "(labels > num_classes)",
        of("properties/test_hostile", "a_target_that_is_no_class"),
    ),
    Mutant(
        "no weight may be 0", ARGUMENTS,
        "bad = ~(values >= 0) | values.isinf()", "bad = ~(values > 0) | values.isinf()",
        of_hem("class_tensors_are_buffers", "reference_matches_the_oracle"),
    ),
    Mutant(
        "ignored rows are multiplied by 0", "hem_ext/linear.py",
        "return h if c.skip_finished else h.masked_fill(", "return h if True else h.masked_fill(",
        of("properties/test_hostile", "hidden_of_ignored_rows_is_in_no_gradient"),
    ),
    Mutant(
        "broken rows are finished", "hem_ext/linear.py",
        "active = losses != 0\n    return", "active = losses > 0\n    return",
        of("test_linear", "a_broken_row_reaches_every_gradient"),
    ),
    Mutant(
        "the first classes of a range", KERNELS,
        "words + i * num_words + range.first_word;", "words + i * num_words;",
        of("test_linear", "the_gradient_of_some_classes_is_a_part_of_that_of_all"),
    ),
    Mutant(
        "a target before the range", KERNELS,
        "if (at_target >= 0 && at_target < count)", "if (at_target < count)",
        of("test_linear", "the_gradient_of_some_classes_is_a_part_of_that_of_all"),
    ),
    Mutant(
        "a row is broken by the bits of a range", KERNELS,
        "static_cast<int32_t>(range.of)", "static_cast<int32_t>(32 * range.words)",
        of("test_share", "broken_samples"),
    ),
    Mutant(
        "the last classes alone reach hidden", "hem_ext/linear.py",
        "beta=min(first, 1)", "beta=0",
        of("test_linear", "some_classes_of_all_rows_at_a_time"),
    ),
    Mutant(
        "mixtures of one class are two", "hem_ext/mix.py",
        "share = lam.masked_fill(a == b, 1.0)", "share = lam",
        of("test_mix", "one_class_alone_is_the_plain_loss"),
    ),
    Mutant(
        "channels_last is forgotten", "hem_ext/upsample.py",
        "channels_last = not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last)",
        "channels_last = False",
        of("test_upsample", "memory_formats"),
    ),
    Mutant(
        "kernels refuse a share while the others wait", "hem_ext/parallel.py",
        "        if is_native:\n            _check_for_kernels", "        if False:\n            _check_for_kernels",
        of("test_parallel", "what_is_wrong_is_told_in_every_process"),
    ),
    Mutant(
        "a plain run is told at a line of ours", "hem_ext/_native.py",
        'startswith(("hem_ext.", "torch."))', 'startswith("torch.")',
        of("test_parallel", "a_device_without_kernels_is_told"),
    ),
    Mutant(
        "a mean over the classes of one process", "hem_ext/parallel.py",
        "torch.minimum(errors[0] / share.num_classes,", "torch.minimum(errors[0] / input.shape[1],",
        of("test_share", "the_same_in_plain_pytorch"),
    ),
    Mutant(
        "a broken share has the bits of more classes than there are", "hem_ext/parallel.py",
        "every[-1] = 2 ** (num_here % 32) - 1", "every[-1] = -1",
        of("test_share", "broken_samples"),
    ),
    Mutant(
        "the share that has no target is not told that it is NaN", "hem_ext/parallel.py",
        "(total.isnan() | target_logits.isnan() | ~losses.isfinite())", "(total.isnan() | ~losses.isfinite())",
        of("test_parallel", "one_class_of_all"),
    ),
]  # fmt: skip

MUTANTS = [*FORMULAS, *CPU, *UPSAMPLED, *ON_CUDA, *PARALLEL, *IN_PYTHON]
