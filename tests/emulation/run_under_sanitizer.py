"""Run every CUDA kernel once, on the host, in a library built under a sanitizer: ``run_under_sanitizer.py LIBRARY``.

Without torch, which no sanitizer knows. What a sanitizer finds it prints, and it ends the process.
"""

import sys
from pathlib import Path

import kernels
import numpy as np

CASES = [
    ("narrow_rows", (300, 10), 128),  # more than one tile for a block
    ("narrow_rows", (3, 64), 128),
    ("warp_rows", (5, 257), 64),
    ("block_rows", (3, 1029), 64),
    ("pixels", (1, 33, 40), 96),
    ("pixels", (2, 5, 37), 64),
    ("many_class_pixels", (1, 70, 5), 32),
    ("upsampled", (2, 33, 2, 3), 64),
]
UPSAMPLED = (5, 7)
SHARES = [  # kernels of class_parallel_hem_loss, and those that take their gradient back
    ("warp_rows", "narrow_rows", (5, 70), (0, 33)),
    ("block_rows", "block_rows", (3, 1029), (0, 500)),
    ("pixels", "pixels", (2, 40, 37), (0, 3)),
]


def main(library: Path) -> None:
    module, random = kernels.load(library), np.random.default_rng(0)
    for kernel, shape, threads in CASES:
        target = random.integers(0, shape[1], (shape[0], *(UPSAMPLED if kernel == "upsampled" else shape[2:])))
        target.flat[1] = -100
        for dtype, storage in kernels.STORAGE.items():
            if storage is np.uint16:
                logits = random.integers(0, 2**16, shape, dtype=storage)  # NaN and infinity among them
            else:
                logits = random.standard_normal(shape).astype(storage)
            width = 1 if shape[-1] % 4 else 0
            for reduction in ("mean", "none"):
                _, _, fine = kernels.run(
                    module, kernel, dtype, logits, target, threads=threads, width=width, blocks=2, offset=width,
                    reduction=reduction,
                )  # fmt: skip
                assert fine
    for kernel, backward, shape, begins in SHARES:
        target = random.integers(0, shape[1], (shape[0], *shape[2:]))
        target.flat[1] = -100
        for dtype, storage in kernels.STORAGE.items():
            logits = random.integers(0, 2**14, shape).astype(storage)  # of the halves, numbers below 2
            own = random.standard_normal(target.shape)
            *_, fine = kernels.run_shares(module, kernel, backward, dtype, logits, own, target, begins, pad=1)
            assert fine


if __name__ == "__main__":
    main(Path(sys.argv[1]))
