"""The examples for Lightning, transformers and MONAI: `make frameworks` installs these and runs this."""

import pytest
import torch


@pytest.mark.parametrize("before", [False, True], ids=["HEM", "cross-entropy"])
@pytest.mark.parametrize("name", ["lightning_module.py", "segformer_trainer.py", "monai_dice.py"])
def test_example(run, text_of, as_it_was, check_fell, name, before):
    check_fell(run(name, text=as_it_was(text_of(name)) if before else None).losses)


def test_segformer_upsampled_as_in_two_steps(run, text_of, double):
    name, marked = "segformer_trainer.py", "compute_loss_func=upsampled"
    text = text_of(name)
    assert marked in text
    upsampled = run(name)
    two_steps = run(name, text=text.replace(marked, "compute_loss_func=two_steps"))
    assert upsampled.trainer.compute_loss_func is upsampled.upsampled
    assert two_steps.trainer.compute_loss_func is two_steps.two_steps
    # Later on the last bit is seen: it grows threefold with each step.
    torch.testing.assert_close(upsampled.losses[:12], two_steps.losses[:12], rtol=1e-6, atol=0)


def test_segformer_in_micro_batches_as_in_one_batch(run, text_of, double):
    name, given = "segformer_trainer.py", "per_device_train_batch_size=8,"
    text = text_of(name).replace("max_steps=20", "max_steps=5")
    assert given in text
    whole = run(name, text=text.replace(given, "per_device_train_batch_size=32,"))
    split = run(name, text=text.replace(given, f"{given} gradient_accumulation_steps=4,"))
    whole, split = (
        [(entry["loss"], entry["grad_norm"]) for entry in found.trainer.state.log_history if "loss" in entry]
        for found in (whole, split)
    )
    # Not the same, for its head normalises by the batch and drops out.
    torch.testing.assert_close(torch.tensor(whole), torch.tensor(split), rtol=0.02, atol=0)
