"""What the CUDA kernels leave out where samples are finished: that they do, and that no bit of a result tells.

Run by ``make emulate``: it takes two more builds.
"""

import kernels
import numpy as np
import pytest

FILE = "csrc/hem/hem_cuda_kernels.cuh"
COUNT = "emulation::widened.fetch_add(1, std::memory_order_relaxed)"
# Counts each element that is looked at a second time in registers, or decoded from its bit; what is looked at a second
# time in memory, the emulator counts by itself.
COUNTED = [
    (FILE, "if (kept(e[i][k], thr[k], T(0))) {", f"if (({COUNT}, kept(e[i][k], thr[k], T(0)))) {{"),
    (FILE, "const bool kept_bit = in_row", f"{COUNT};\nconst bool kept_bit = in_row"),
    (FILE, "values.at[k] = j == c[k].own", f"{COUNT};\nvalues.at[k] = j == c[k].own"),
]
BROKEN = "error_sum != error_sum || y != y ? T(NAN) : "
NOTHING_LEFT_OUT = [
    (FILE, "if (error_sum > 0) {  // else finished, or broken", "if (true) {"),
    (FILE, "/ T(__popcll(bits));", "/ T(bits != 0 ? __popcll(bits) : 1);"),
    (FILE, "if (!(error_sum > 0)) rounds = 0;", ""),
    (FILE, "if (sum[k] > 0) {  // else finished, or broken", "if (true) {"),
    (FILE, "if (!(error_sum > 0)) {  // finished, or broken: no second look", "if (false) {"),
    (FILE, "target, kept_sum / T(count))) {", f"target, {BROKEN}kept_sum / T(count != 0 ? count : 1))) {{"),
    (FILE, "k < kWidth && count != 0; ++k", "k < kWidth; ++k"),
    (FILE, "__any_sync(kFullWarp, any)", "__any_sync(kFullWarp, 1)"),
]
CASES = [  # kernel, logits, size of the targets
    ("narrow_rows", (70, 10), ()),
    ("warp_rows", (9, 65), ()),
    ("warp_rows", (6, 1001), ()),
    ("block_rows", (5, 1029), ()),
    ("pixels", (2, 21, 160), (160,)),
    ("many_class_pixels", (2, 70, 40), (40,)),
    ("upsampled", (2, 33, 3, 4), (6, 20)),
]


@pytest.fixture(scope="module")
def modules():
    """The kernels as they are, and leaving nothing out."""
    return [kernels.load(kernels.build(edits=[*COUNTED, *more])) for more in ([], NOTHING_LEFT_OUT)]


def run(module, kernel, logits, target, **options):
    threads = 32 * ((logits.shape[1] + 15) // 16) if kernel == "pixels" else 64
    bits = (logits.view(np.uint32) >> 16).astype(np.uint16) if options.pop("half", False) else logits
    dtype = "float32" if bits is logits else "bfloat16"
    return kernels.run(module, kernel, dtype, bits, target, threads=threads, **options)


def mostly_finished(shape, size):
    """Random logits, of which the first two thirds of the samples are finished; broken and ignored ones among both."""
    random = np.random.default_rng(0)
    logits, target = random.standard_normal(shape).astype(np.float32), random.integers(0, shape[1], (shape[0], *size))
    by_class = np.moveaxis(logits, 1, -1)  # the same memory
    if by_class[..., 0].shape == target.shape:
        order = np.arange(target.size).reshape(target.shape)
        np.put_along_axis(by_class, target[..., None], np.where(order % 64 < 42, 9.0, 0.0)[..., None], -1)
    else:
        target[:, :4], logits[:, 1, :2] = 1, 9.0
    flat = by_class[..., 0].size
    for n, value in ((3, np.nan), (flat - 2, np.nan), (flat - 1, np.inf)):
        by_class[np.unravel_index(n, by_class.shape[:-1])][n % shape[1]] = value
    target.flat[[1, -3]] = -100
    return logits, target


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(("kernel", "shape", "size"), CASES)
def test_no_bit_tells(modules, kernel, shape, size, reduction, half):
    logits, target = mostly_finished(shape, size)
    weight = np.arange(shape[1]) / 8
    found = [run(m, kernel, logits, target, reduction=reduction, weight=weight, half=half) for m in modules]
    for as_they_are, without in zip(*(result[:2] for result in found), strict=True):
        assert as_they_are.tobytes() == without.tobytes()


@pytest.mark.parametrize(("kernel", "shape", "size"), [case for case in CASES if case[0] in ("warp_rows", "pixels")])
def test_what_is_finished_is_not_decoded(modules, kernel, shape, size):
    """Nor looked at a second time in registers."""
    target = np.zeros((shape[0], *size), dtype=np.int64)
    counted = []
    for module in modules:
        for finished in (True, False):
            logits = np.zeros(shape, dtype=np.float32)
            logits[:, 0] = finished
            module.take_widened()
            run(module, kernel, logits, target)
            counted.append(module.take_widened())
    assert counted[0] == 0
    assert logits.size <= counted[1] <= counted[2] == counted[3]  # the last two with what lies past the samples
