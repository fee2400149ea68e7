"""The examples for torchvision, timm and segmentation_models.pytorch: `make test-integrations` installs these."""

from pathlib import Path

import pytest
import torch
from torch import nn

EXAMPLES = {
    "torchvision_segmentation.py": [[]],
    "torchvision_upsampled.py": [[]],
    "timm_train.py": [[], ["--mixup", "0.8", "--cutmix", "1.0"]],
    "smp_unet.py": [[]],
}


@pytest.mark.parametrize("before", [False, True], ids=["HEM", "cross-entropy"])
@pytest.mark.parametrize(
    ("name", "arguments"), [(name, arguments) for name, lines in EXAMPLES.items() for arguments in lines]
)
def test_example(run, text_of, as_it_was, check_fell, name, arguments, before):
    check_fell(run(name, *arguments, text=as_it_was(text_of(name)) if before else None).losses)


def test_torchvision_upsampled_as_in_two_steps(run, double):
    upsampled, two_steps = (run(f"torchvision_{name}.py").losses for name in ("upsampled", "segmentation"))
    torch.testing.assert_close(upsampled, two_steps, rtol=1e-6, atol=0)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_mixing_as_its_page_says(library):
    page = (Path(__file__).parents[2] / "docs" / "mix.md").read_text(encoding="utf-8")
    code = page.partition(f"\n## {library}\n")[2].partition("```python\n")[2].partition("```")[0]
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
    names = {"model": model, "batches": [(torch.rand(16, 3, 8, 8), torch.randint(10, (16,)))]}
    exec(code, names)
    assert names["targets"].shape == (16, 10)
    assert model[1].weight.grad.abs().sum() > 0
