"""README and the pages of docs/: their examples run, and what they say of calls, errors and files is so."""

import doctest
import inspect
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from torch import nn

import hem_ext
from hem_ext import HEMLoss, hem_loss
from hem_ext.harness import cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# The others hold parts of a program, which the tests of what they are about put together.
WITH_EXAMPLES = ["README.md", *(f"docs/{name}.md" for name in (
    "index", "quickstart", "loss", "margin", "migrating", "segmentation"))]  # fmt: skip
LINES = {
    "loss = torch.nn.functional.cross_entropy(logits, target)\n": torch.nn.functional.cross_entropy,
    "loss = hem_ext.hem_loss(logits, target)\n": hem_loss,
}
"""What README and the site begin with: the line, and the one in its place."""


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def section(page, heading):
    _, found, rest = text_of(page).partition(f"\n## {heading}\n")
    assert found
    return rest.partition("\n## ")[0]


@pytest.mark.parametrize("page", WITH_EXAMPLES)
def test_examples(page, monkeypatch):
    monkeypatch.setattr("builtins.print", lambda *_: None)
    names = {"torch": torch, "hem_ext": hem_ext, "logits": torch.randn(4, 3), "target": torch.tensor([0, 2, 1, 0])}
    examples = re.findall(r"^```python\n(.*?)^```$", text_of(page), re.M | re.S)
    assert examples
    for code in examples:
        if ">>>" in code:
            test = doctest.DocTestParser().get_doctest(code, names, page, page, 0)
            failures = []
            runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
            runner.run(test, out=failures.append, clear_globs=False)
            assert not failures, "".join(failures)
            names = test.globs
        else:
            exec(compile(code, page, "exec"), names)
        if code in LINES:
            torch.testing.assert_close(names["loss"], LINES[code](names["logits"], names["target"]))
    if page in ("README.md", "docs/index.md"):
        assert set(LINES) <= set(examples)
    if page == "docs/quickstart.md":
        assert names["accuracy"] > 0.95
        assert names["active"] < 0.1 * len(names["train"])


def test_the_quick_start_does_not_settle_without_its_schedule(monkeypatch):
    monkeypatch.setattr("builtins.print", lambda *_: None)
    code = section("docs/quickstart.md", "A training").partition("```python\n")[2].partition("```")[0]
    with_schedule = [line for line in code.splitlines(keepends=True) if "schedule" in line]
    assert len(with_schedule) == 2
    names = {}
    exec("".join(line for line in code.splitlines(keepends=True) if line not in with_schedule), names)
    assert names["optimizer"].param_groups[0]["lr"] == 0.03
    assert names["active"] > 0.1 * len(names["train"])


def test_every_example_is_of_a_page_that_is_tested():
    elsewhere = ["distributed.md", "linear.md", "mix.md", "selective.md", "upsample.md"]
    found = {f"docs/{path.name}" for path in DOCS.glob("*.md") if "```python" in path.read_text(encoding="utf-8")}
    assert found <= {*WITH_EXAMPLES, *(f"docs/{name}" for name in elsewhere)}


def test_pages_install_alike():
    told = re.compile(r"^It is on no package index yet\..*?^```sh\n.*?^```\n.*?\.\n\n", re.M | re.S)
    readme, *others = (told.findall(text_of(page)) for page in ("README.md", "docs/quickstart.md", "docs/building.md"))
    assert "python -m hem_ext.info" in readme[0]
    assert others == [readme] * 2


def commands():
    """What pages tell to type, a line each."""
    for page in ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in DOCS.glob("*.md"))]:
        text = text_of(page)
        blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S)
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
        for line in "".join(blocks).replace("\\\n", " ").splitlines() + re.findall(r"`([^`]+)`", prose):
            yield shlex.split(" ".join(line.split()), comments=True) if line.count("'") % 2 == 0 else []


def test_commands_train_pixels_with_hem_at_a_rate_that_suits_it():
    found = [words for words in commands() if "train segmentation" in " ".join(words)]
    assert len(found) == 5
    assert [words for words in found if "--max-lr" not in words] == []


def test_commands_are_there():
    app = typer.main.get_command(cli.app)
    targets = set(re.findall(r"^([\w-]+):", text_of("Makefile"), re.M))
    found = set()
    for program, *words in (line for line in commands() if len(line) > 1):
        # `hem-ext needs the harness extra` is what an error says.
        if program == "hem-ext" and words[0] not in ("COMMAND", "needs") and "..." not in words:
            app.commands[words[0]].make_context(words[0], words[1:])  # raises for what is no option
        elif program == "make" and not any("=" in word for word in words):
            assert set(words) <= targets, words
        elif program == "python" and words[0].startswith("bench/"):
            assert (ROOT / words[0]).exists(), words
        else:
            continue
        found.add(program)
    assert found == {"hem-ext", "make", "python"}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "bench/README.md", "csrc/README.md"])
def test_links_lead_to_files_and_headings(page):
    # Of the pages in docs/, Sphinx sees to it.
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in slugs, link


def test_every_argument_of_cross_entropy_is_compared():
    cells = re.findall(r"^\| ([^|]+) \|", section("docs/migrating.md", "Every argument"), re.M)
    compared = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    arguments = {
        *inspect.signature(torch.nn.functional.cross_entropy).parameters,
        *inspect.signature(nn.CrossEntropyLoss.__init__).parameters,
    } - {"self"}
    assert compared == arguments
    ours = {*inspect.signature(hem_loss).parameters, *inspect.signature(HEMLoss).parameters} - compared
    beside = section("docs/migrating.md", "Every argument").partition("What `HEMLoss` has beside them:")[2]
    assert {name for name in re.findall(r"`(\w+)`", beside) if name in ours} == ours


def test_a_checkpoint_of_cross_entropy_is_loaded_as_the_page_says():
    words, remedy = re.findall(
        r"`(Missing key[^`]+|model\.load_state_dict[^`]+)`", section("docs/migrating.md", "What else changes")
    )

    class Model(nn.Module):
        def __init__(self, criterion):
            super().__init__()
            self.layer, self.criterion = nn.Linear(4, 3), criterion

    checkpoint = Model(nn.CrossEntropyLoss()).state_dict()
    Model(HEMLoss(margin=0.5)).load_state_dict(checkpoint)
    margins = torch.tensor([0.1, 0.2, 0.3])
    model = Model(HEMLoss(margin=margins))
    with pytest.raises(RuntimeError, match=re.escape(words)):
        model.load_state_dict(checkpoint)
    exec(remedy, {"model": model, "checkpoint": checkpoint})
    torch.testing.assert_close(model.layer.weight, checkpoint["layer.weight"])
    torch.testing.assert_close(model.criterion.margin, margins)


def test_the_reference_has_every_public_name():
    listed = set(re.findall(r"^\.\. auto\w+:: hem_ext\.([\w.]+)$", text_of("docs/api.rst"), re.M))
    public = {name for name in hem_ext.__all__ if not inspect.ismodule(getattr(hem_ext, name))}
    # What examples take from modules is public as well, unless the package has it too.
    for page in ["README.md", *(f"docs/{path.name}" for path in DOCS.glob("*.md"))]:
        found = re.findall(r"^from hem_ext\.(\w+) import (\w+)$", text_of(page), re.M)
        public |= {f"{module}.{name}" for module, name in found if name not in public}
    assert public - listed == set()


def rows_of(heading):
    """The first column of a table of what fails, under the line that begins with `heading`."""
    part = section("docs/building.md", "Where something fails").partition(f"\n{heading}\n")[2].lstrip("\n")
    rows = [line.split(" | ")[0].removeprefix("| ") for line in part.partition("\n\n")[0].splitlines()[2:]]
    assert rows
    return rows


LOGITS, LABELS = torch.zeros(2, 3), torch.tensor([0, 1])


def needed_elsewhere():
    logits = LOGITS.clone().requires_grad_() * 1
    other = (logits * logits).sum()
    (hem_loss(logits, LABELS, overwrite_input=True)).backward(retain_graph=True)
    other.backward()


def given_back():
    x = LOGITS.clone()
    x.untyped_storage().resize_(8)
    hem_loss(x, LABELS)


class SavesItsMemory(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.view(2, 3) * 1
        ctx.save_for_backward(y)
        return y.data


def saved_unseen():
    made = torch.zeros(6, requires_grad=True)
    hem_loss(SavesItsMemory.apply(made), LABELS, overwrite_input=True)


def behind_a_header():
    memory = bytearray(1 + LOGITS.nbytes)
    hem_loss(torch.frombuffer(memory, dtype=LOGITS.dtype, offset=1).view_as(LOGITS), LABELS)


CALLS = {
    "is not aligned to its elements of": behind_a_header,
    "is not allocated: its storage was resized to": given_back,
    "which is neither a class in": lambda: hem_loss(LOGITS, LABELS + 254),
    "use .argmax(1) where they are one-hot": lambda: hem_loss(LOGITS, torch.eye(3)[:2]),
    "use .long() where they are class indices": lambda: hem_loss(LOGITS, LABELS.float()),
    "label_smoothing must be 0": lambda: HEMLoss(label_smoothing=0.1),
    "did you mean margin=": lambda: HEMLoss(0.5),
    "needs logits whose memory nobody else holds": saved_unseen,
    "would put the gradient over a leaf that requires it": lambda: hem_loss(
        LOGITS.clone().requires_grad_(), LABELS, overwrite_input=True
    ),
    "one of the variables needed for gradient computation has been modified by an inplace operation": needed_elsewhere,
    "has no gradient of its own": lambda: torch.ops.hem_ext.hem_forward(
        LOGITS.clone().requires_grad_(), LABELS, None, 0.2, None, -100, 1, True
    ),
}


@pytest.mark.parametrize("words", CALLS)
def test_what_a_call_says_is_on_the_page(words):
    assert f"`{words}`" in rows_of("When calling:")
    with pytest.raises((IndexError, RuntimeError, TypeError, ValueError), match=re.escape(words)):
        CALLS[words]()


def test_what_the_page_says_is_said():
    assert {row.strip("`") for row in rows_of("When calling:") if row.startswith("`")} == set(CALLS)
    sources = "".join(
        path.read_text(encoding="utf-8") for path in [ROOT / "setup.py", *(ROOT / "hem_ext").glob("*.py")]
    )
    for row in rows_of("When building, or importing:")[1:]:  # the first is pip's
        assert row.strip("`") in sources, row


def test_the_readme_says_of_speed_and_memory_what_the_tables_say():
    text = text_of("docs/performance.md")
    tables = [re.search(rf"<!-- begin {name} -->(.*?)<!-- end", text, re.S)[1] for name in ("speed", "memory")]
    speed, memory = (
        [[cell.strip(" B") for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
        for table in tables
    )

    def of_pixels(table, column):
        i = table[0].index(column)
        found = [float(row[i]) for row in table[2:] if row[1].count(",") == 3]
        assert len(found) == 6
        return min(found), max(found)

    said = " ".join(text_of("README.md").split())
    times = [of_pixels(speed, column) for column in ("CE", "HEM in PyTorch")]
    assert "`cross_entropy` takes {:.0f} to {:.0f} times the time of `hem_loss`".format(*times[0]) in said
    assert "HEM in plain PyTorch {:.0f} to {:.0f} times".format(*times[1]) in said
    ours, theirs = (of_pixels(memory, f"kept, {loss}") for loss in ("HEM", "CE"))
    assert "HEM keeps {:.1f} to {:.1f} bytes per logit".format(*ours) in said
    assert "`cross_entropy` keeps {:.1f} to {:.1f}".format(*theirs) in said


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{n}.md" for n in ("migrating", "building", "segmentation"))])
def test_pages_advise_the_same_rate(page):
    advice = (
        "With SGD start at a third of the learning rate that suits cross-entropy, in segmentation at a tenth or less"
    )
    assert advice in " ".join(text_of(page).split())


def test_what_is_known_of_adamw_is_what_the_trainings_say():
    found = section("docs/migrating.md", "What else changes")
    rows = [line for line in text_of("docs/selective.md").splitlines() if "`small-vit`" in line and "| HEM |" in line]
    differences = [re.search(r"cross-entropy: (\S+)", row)[1] for row in rows]
    assert " and ".join(differences) in " ".join(found.split())


@pytest.mark.parametrize(
    ("page", "headings"),
    [
        ("docs/migrating.md", ["classification"]),
        ("docs/segmentation.md", ["segmentation", "Samples that are still active"]),
        ("docs/understanding.md", ["corruption", "imbalanced", "continual", "segmentation"]),
    ],
)
def test_numbers_in_words_are_those_of_the_report(page, headings):
    report = "".join(section("docs/paper/report.md", heading) for heading in headings)
    numbers = re.findall(r"\b0\.\d{3}\b", re.sub(r"^```.*?^```$", "", text_of(page), flags=re.M | re.S))
    assert numbers
    assert [number for number in numbers if number not in report] == []


@pytest.mark.parametrize(("task", "loss", "words"), [
    ("classification", "ce", "above\n  cross-entropy's {:.0f}:"),
    ("classification", "hem", "rival ends at {:.0f}, above"),
    ("classification", "hem total=500", "HEM's gap ends at {:.0f}, below"),
    ("imbalanced", "hem", "it ends at {:.0f} where the margin is 1.6"),
    ("imbalanced", "hem total=500", "and at {:.0f} in the long tail"),
])  # fmt: skip
def test_logit_gaps_in_words_are_those_of_the_curves(task, loss, words):
    tested = {row["cell"] for row in rows_of_file("results.jsonl", f'"{task}"') if row["settings"]["part"] == "test"}
    curves = [row for row in rows_of_file("curves.jsonl", f'"{task}"') if row["loss"] == loss and row["cell"] in tested]
    assert sorted(row["seed"] for row in curves) == list(range(10))
    epochs = {"classification": 16, "imbalanced": 64}[task]  # what comes after them is the training of a probe
    gap = sum(row["history"][epochs - 1]["logit_gap"] for row in curves) / 10
    assert words.format(gap) in text_of("docs/understanding.md")


def rows_of_file(name, words):
    with (DOCS / "paper" / name).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if words in line]
