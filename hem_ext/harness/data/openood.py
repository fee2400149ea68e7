"""The unknown images of OpenOOD's benchmarks, as its own download script lays them out. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

from hem_ext.harness.data.base import listed, missing, read_text
from hem_ext.harness.data.pictures import ImageFiles

LAYOUT = (
    "benchmark_imglist/BENCHMARK/test_NAME.txt, whose lines are a path and a label, and the images at these paths in "
    "images_classic/ or, of ImageNet's sets but textures, images_largescale/"
)

_FAR = ("mnist", "svhn", "texture", "places365")
# Our name of the known classes: OpenOOD's of the benchmark, what is near, what is far.
BENCHMARKS = {
    "cifar10": ("cifar10", ("cifar100", "tin"), _FAR),
    "cifar100": ("cifar100", ("cifar10", "tin"), _FAR),
    "image-folder": ("imagenet", ("ssb_hard", "ninco"), ("inaturalist", "textures", "openimage_o")),
}
# Sets of large pictures; the others, textures among them, are in images_classic/.
LARGE_SCALE = ("ssb_hard", "ninco", "inaturalist", "openimage_o")

Sets = dict[str, ImageFiles]


def openood(root: Path, known: str, size: int) -> tuple[Sets, Sets]:
    """What is near and what is far of a benchmark's known classes, each set by OpenOOD's name of it.

    Layout: in `root`, the lists `benchmark_imglist/cifar10/test_cifar100.txt` ..., and the images they name in
    `images_classic/`, or in `images_largescale/` for ImageNet's other than textures.

    Args:
        root: OpenOOD's folder of data.
        known: ``"cifar10"``, ``"cifar100"``, or ``"image-folder"`` for ImageNet-1k.
        size: to which the shorter side of an image is resized, before the middle is cut out.

    Returns:
        Near and far, of items ``(3, size, size)`` in [0, 1] as :class:`ImageFiles` gives them; the label says nothing.

    Raises:
        ValueError: a data set that OpenOOD has no benchmark of, or a list that is not one.
        FileNotFoundError: a list or an image that `root` should hold.

    OpenOOD's own results leave the tenth of CIFAR's test images that it tunes with out of the known ones.

    Source: Zhang et al., arXiv 2306.09301; version 1.5.
    """
    if known not in BENCHMARKS:
        raise ValueError(f"OpenOOD has no benchmark of {known}; it has those of {', '.join(BENCHMARKS)}")
    benchmark, near, far = BENCHMARKS[known]

    def read(names: tuple[str, ...]) -> Sets:
        found = {}
        for name in names:
            folder = root / ("images_largescale" if name in LARGE_SCALE else "images_classic")
            file = root / "benchmark_imglist" / benchmark / f"test_{name}.txt"
            found[name] = ImageFiles(_listed(file, folder), size)
        return found

    return read(near), read(far)


def _listed(file: Path, folder: Path) -> tuple[tuple[str, int], ...]:
    if not file.is_file():
        raise missing(file, LAYOUT)
    found = []
    for line in read_text(file).splitlines():
        # What follows the path is a label, or a dictionary with one; -1 stands for none.
        path, space, _ = line.strip().partition(" ")
        if not space:
            raise ValueError(f"{file}: expected lines of a path and a label, got {line!r}")
        found.append((str(listed(folder, path, file)), -1))
    if not found:
        raise ValueError(f"{file} names no image")
    absent = next((path for path, _ in found if not Path(path).is_file()), None)
    if absent is not None:
        raise missing(Path(absent), LAYOUT)
    return tuple(found)
