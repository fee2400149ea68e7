import pytest
from PIL import Image

from hem_ext.harness import data

CLASSIC = ["mnist", "svhn", "texture", "places365"]


def write(root, benchmark, names):
    """Lists and images as OpenOOD's download script leaves them: two images a set, no two alike."""
    lists = root / "benchmark_imglist" / benchmark
    lists.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        paths = [f"{name}/test/a.png", f"{name}/b.jpg"]
        for path in paths:
            # As OpenOOD's download script does, ImageNet's textures lie with those of CIFAR.
            large = name in ("ssb_hard", "ninco", "inaturalist", "openimage_o")
            file = root / ("images_largescale" if large else "images_classic") / path
            file.parent.mkdir(parents=True, exist_ok=True)
            mode, colour = ("L", 20 * i) if name == "mnist" else ("RGB", (20 * i,) * 3)
            Image.new(mode, (20 + i, 30), colour).save(file)
        (lists / f"test_{name}.txt").write_text(f"{paths[0]} -1\n{paths[1]} {{'label': 7}}\n")


@pytest.mark.parametrize(
    ("known", "its_name", "near", "far"),
    [
        ("cifar10", "cifar10", ["cifar100", "tin"], CLASSIC),
        ("cifar100", "cifar100", ["cifar10", "tin"], CLASSIC),
        (
            "image-folder",
            "imagenet",
            ["ssb_hard", "ninco"],
            ["inaturalist", "textures", "openimage_o"],
        ),
    ],
)
def test_a_benchmark(tmp_path, known, its_name, near, far):
    write(tmp_path, its_name, near + far)
    found = data.openood(tmp_path, known, size=16)
    assert [list(sets) for sets in found] == [near, far]
    for i, name in enumerate(near + far):
        images = {**found[0], **found[1]}[name]
        assert len(images) == 2
        for image, label in images:
            assert label == -1
            assert image.shape == (3, 16, 16)
            assert image.mean().item() == pytest.approx(20 * i / 255, abs=0.01)


def test_a_broken_image(tmp_path):
    write(tmp_path, "cifar10", ["cifar100", "tin", *CLASSIC])
    (tmp_path / "images_classic" / "svhn" / "b.jpg").write_bytes(b"")
    _, far = data.openood(tmp_path, "cifar10", size=16)
    with pytest.raises(ValueError, match=r"svhn/b.jpg is broken, or no picture: its format is not known"):
        far["svhn"][1]


def test_what_is_wrong_is_said(tmp_path):
    with pytest.raises(
        ValueError, match="OpenOOD has no benchmark of digits; it has those of cifar10, cifar100, image"
    ):
        data.openood(tmp_path, "digits", size=8)
    with pytest.raises(FileNotFoundError, match=r"test_cifar100.txt is missing; expected benchmark_imglist/BENCHMARK/"):
        data.openood(tmp_path, "cifar10", size=32)
    write(tmp_path, "cifar10", ["cifar100", "tin", *CLASSIC])
    (tmp_path / "images_classic" / "svhn" / "b.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"svhn/b.jpg is missing; expected benchmark_im.*/svhn holds test$"):
        data.openood(tmp_path, "cifar10", size=32)
    file = tmp_path / "benchmark_imglist" / "cifar10" / "test_tin.txt"
    file.write_text("tin/test/a.png\n")
    with pytest.raises(ValueError, match=r"test_tin.txt: expected lines of a path and a label, got 'tin/test/a.png'"):
        data.openood(tmp_path, "cifar10", size=32)
    for path in ("../images_classic/svhn/b.jpg", str(tmp_path / "images_classic" / "svhn" / "b.jpg")):
        file.write_text(f"{path} -1\n")
        with pytest.raises(ValueError, match=rf"test_tin.txt names '{path}'; expected paths that stay in .*classic$"):
            data.openood(tmp_path, "cifar10", size=32)
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"test_tin.txt is not a text in UTF-8: "):
        data.openood(tmp_path, "cifar10", size=32)
    file.write_text("")
    with pytest.raises(ValueError, match=r"test_tin.txt names no image"):
        data.openood(tmp_path, "cifar10", size=32)
