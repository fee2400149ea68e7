import torch
from matplotlib import image

from hem_ext.harness import plots
from hem_ext.harness.training import Epoch


def test_segmentations_shows_image_truth_and_predictions(tmp_path):
    labels = torch.zeros(2, 16, 16, dtype=torch.int64)
    labels[:, 4:12, 4:12] = 2
    columns = {"truth": labels, "cross-entropy": labels * 0, "HEM": labels}
    plots.segmentations(tmp_path / "s.png", torch.rand(2, 1, 16, 16), columns, ["background", "a", "b"])
    picture = image.imread(tmp_path / "s.png")
    orange = plots.plt.get_cmap("tab10").colors[1]
    share = (abs(picture[..., :3] - orange).max(-1) < 0.02).mean(0)  # of every column of pixels
    quarter = picture.shape[1] // 4
    shows = [share[i * quarter : (i + 1) * quarter].max() > 0.2 for i in range(4)]
    assert shows == [False, True, False, True]


def test_learning_curves_has_a_row_for_every_task(tmp_path):
    history = [Epoch(1.0, 0.5, 0.1 * i, 0.2, 1.0, 0.1) for i in range(4)]
    runs = {"one": {"ce": [history], "hem": [history, history]}}
    plots.learning_curves(tmp_path / "1.png", runs, {"one": "accuracy"})
    runs["two"] = runs["one"]
    plots.learning_curves(tmp_path / "2.png", runs, {"one": "accuracy", "two": "mean_iou"})
    one, two = (image.imread(tmp_path / f"{n}.png") for n in (1, 2))
    assert two.shape[0] == 2 * one.shape[0]
    assert two.shape[1] == one.shape[1]
