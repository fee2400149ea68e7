"""What a report says. Its pictures are in test_report_pictures.py."""

import io
import json
import math
from types import SimpleNamespace
from unittest import mock

import pytest
from report_rows import CE, HEM, cells, classification, one
from rich.console import Console
from scipy import stats

from hem_ext.harness import metrics
from hem_ext.harness.losses import LOSSES
from hem_ext.harness.report import SHARED, TUNED, active, forest, grid, pictures, results, tables, words, write
from hem_ext.harness.tasks import TASKS, Metric
from hem_ext.harness.tasks.base import digest

SHIFTED = [0.91, 0.93, 0.96]  # CE and 0.01, 0.02, 0.03


def written(folder, protocols, title="Comparison"):
    """The report, and what was printed, without pictures, which take long."""
    printed = io.StringIO()
    with (
        mock.patch.object(pictures, "draw", return_value=[]),
        mock.patch.object(active, "draw", return_value=None),
        mock.patch.object(forest, "draw", lambda questions: forest.make_lines(questions) or None),
        mock.patch("hem_ext.harness.report.save"),
    ):
        write(folder, protocols, Console(file=printed, width=100), title)
    return (folder / "report.md").read_text(encoding="utf-8"), printed.getvalue()


def table(text, heading="## classification"):
    """Loss -> texts, of the first table after a heading, whose columns are under ``""``."""
    lines = text[text.index(heading + "\n") :].split("\n\n| ")[1].split("\n\n")[0].splitlines()
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {"": head[1:], **{row[0]: row[1:] for row in rows}}


def every_metric(text, where=""):
    found = table(text, f"### classification: every metric{where}")
    return {loss: dict(zip(found[""], row, strict=True)) for loss, row in found.items() if loss}


# --- differences ----------------------------------------------------------------------------------------------


def test_the_difference_by_hand(tmp_path):
    # 0.01, 0.02 and 0.03 more than cross-entropy: mean 0.02, standard error 0.01 / sqrt(3), and Student's t with two
    # degrees of freedom is 4.303 at 97.5 %. Its distribution has a closed form: p = 1 - t / sqrt(t^2 + 2).
    text, _ = written(tmp_path, one(classification("ce", CE) + classification("hem", SHIFTED)))
    t = 0.02 / (0.01 / math.sqrt(3))
    p = 1 - t / math.sqrt(t**2 + 2)
    assert (0.02 - 4.303 * 0.01 / math.sqrt(3), p) == pytest.approx((-0.0048, 0.0742), abs=1e-4)
    assert table(text) == {
        "": ["accuracy", "difference to ce [95% interval]", "p (Holm)"],
        "ce": ["0.913", "—", "—"],
        "hem": ["0.933", "+0.020 [-0.005, +0.045]", "0.074"],
    }


def test_p_is_corrected_by_holm_for_the_losses_of_the_table(tmp_path):
    tried = {"hem": HEM, "mm": [0.92, 0.92, 0.95], "focal": [0.90, 0.93, 0.90]}
    rows = classification("ce", CE) + [row for loss, values in tried.items() for row in classification(loss, values)]
    found = table(written(tmp_path, one(rows))[0])
    raw = {loss: stats.ttest_rel(values, CE).pvalue for loss, values in tried.items()}
    order = sorted(raw, key=raw.get)
    by_hand, most = {}, 0.0
    for times, loss in zip((3, 2, 1), order, strict=True):
        most = max(most, min(1, times * raw[loss]))
        by_hand[loss] = f"{most:.3f}"
    assert {loss: found[loss][2] for loss in tried} == by_hand
    assert f"{raw[order[0]]:.3f}" not in by_hand.values(), "a correction would not be seen"


def test_the_difference_is_over_the_seeds_that_both_have(tmp_path):
    rows = classification("ce", [0.1, *CE]) + classification("hem", SHIFTED, first_seed=1)
    text, _ = written(tmp_path, one(rows))
    assert table(text)["hem"][1] == "+0.020 [-0.005, +0.045]"
    assert "seeds 0 to 3 of ce; 1 to 3 of hem" in text


def test_a_metric_that_one_has_and_another_has_not():
    rows = classification("ce", CE) + cells("classification", "hem", {"accuracy": HEM, "auroc": HEM})
    made = results.make_results(rows)
    assert results.differences(made, "auroc") == results.differences(made, "ece") == {}
    assert list(results.differences(made, "accuracy")) == ["hem"]


def test_one_network_is_tested_once(tmp_path):
    rows = classification("ce", CE) + classification("hem", SHIFTED) + classification("hem+", SHIFTED)
    text, _ = written(tmp_path, one(rows))
    assert table(text)["hem"][2] == table(text)["hem+"][2] == "0.074"
    assert text.count("`hem` (and `hem+`, the same network here)") == 2  # in the list on top, and in the section
    # One seed of one metric tells them apart.
    rows = [*rows[:-1], rows[-1] | {"value": 0.11}]
    text, _ = written(tmp_path, one(rows))
    assert "the same network here" not in text
    assert table(text)["hem"][2] == table(text)["hem+"][2] == "0.148"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("seeds", "said"), [(1, "1 seed"), (3, "3 seeds")])
def test_no_test_of_one_seed_or_without_spread(tmp_path, seeds, said):
    # With the same difference everywhere a test would claim to be sure.
    rows = classification("ce", [0.9, 0.9 + 1e-15, 0.9][:seeds]) + classification("hem", [0.95] * seeds)
    text, _ = written(tmp_path, one(rows))
    assert table(text)["hem"][1:] == ["+0.050", "—"]
    assert f"By accuracy, `hem` is not tested against `ce` (+0.050, {said})." in text
    assert every_metric(text)["hem"]["accuracy"] == ("**0.950**" if seeds == 1 else "**0.950 ± 0.000**")


def test_a_tiny_p(tmp_path):
    rows = classification("ce", [0.1, 0.1001, 0.1]) + classification("hem", [0.9, 0.9001, 0.9001])
    text, _ = written(tmp_path, one(rows))
    assert table(text)["hem"][2] == "<0.001"
    assert "(p < 0.001, 3 seeds)" in text


def test_numbers_in_words():
    assert [words.digits(value) for value in (-0.0004, 0.0016)] == ["0.000", "0.002"]
    assert [words.signed(value) for value in (-0.0004, -0.0016)] == ["+0.000", "-0.002"]
    assert [words.shown_p(p) for p in (0.00099, 0.001, math.nan)] == ["<0.001", "0.001", "—"]


def test_how_the_numbers_came_about():
    tested, chosen = ({"settings": {"part": part}} for part in ("test", "validation"))
    both = "\n".join(f"- {words.PROTOCOLS[name]}" for name in (SHARED, TUNED))
    assert words.protocol([SHARED, "a", TUNED], [tested]) == f"{words.PROTOCOL}\n{both}\n\n{words.STATISTICS}"
    assert words.protocol(["a"], [tested, chosen]) == f"{words.PROTOCOL}\n{words.ON_VALIDATION}\n{words.STATISTICS}"


# --- verdicts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("differences", "sentence", "short"),
    [
        (
            (0.04, 0.05, 0.06),
            "ahead of `ce` by 0.050 [0.025, 0.075] (p 0.013, 3 seeds)",
            "ahead by 0.050",
        ),
        (
            (-0.04, -0.05, -0.06),
            "behind `ce` by 0.050 [0.025, 0.075] (p 0.013, 3 seeds)",
            "behind by 0.050",
        ),
        (
            (0.001, -0.001, 0.0),
            "level with `ce` (between -0.002 and +0.002, all within ± 0.01; 3 seeds)",
            "level (+0.000)",
        ),
        (
            (0.03, -0.01, 0.01),
            "not told apart from `ce`: between -0.040 and +0.060, which is no evidence either way (p 0.478, 3 seeds)",
            "not told apart (+0.010)",
        ),
        ((0, 0, 0), "the same as `ce` in every seed", "the same"),
        ((math.nan, 0, 0.1), "without a number for every seed", "without a number"),
    ],
)
def test_the_verdict(tmp_path, differences, sentence, short):
    hem = [a + b for a, b in zip(CE, differences, strict=True)]
    text, printed = written(tmp_path, one(classification("ce", CE) + classification("hem", hem)))
    assert f"- By accuracy, `hem` is {sentence}.\n" in text
    assert f"- **classification** (digits), accuracy: `hem` {short}\n" in text.split("## classification")[0]
    assert f"classification (digits), accuracy: hem {short}" in " ".join(printed.split())


def test_what_only_the_correction_does_not_tell_apart(tmp_path):
    # The interval of HEM leaves out 0, but the p is no longer below 0.05 after a correction for two.
    rows = classification("ce", CE) + classification("hem", [0.94, 0.97, 0.97])
    rows += classification("mm", [0.90, 0.92, 0.93]) + classification("focal", [0.93, 0.91, 0.93])
    assert 0.05 / 3 < stats.ttest_rel([0.94, 0.97, 0.97], CE).pvalue < 0.05
    text, _ = written(tmp_path, one(rows))
    assert (
        "is not told apart from `ce`: between +0.018 and +0.075, which leaves out 0 only without the correction" in text
    )


def test_level_is_no_wider_than_the_bound():
    inside, outside = (results.Difference(0, -0.01, high, 0.5, 9) for high in (0.01, 0.0101))
    assert [d.stand(True) for d in (inside, outside)] == ["level", "not told apart"]
    assert inside._replace(low=-0.0101).stand(True) == "not told apart"


def test_without_a_test_as_many_seeds_as_show_that_nothing_differs():
    one, two = (results.Difference(0.0, math.nan, math.nan, math.nan, seeds) for seeds in (1, 2))
    assert [d.stand(True) for d in (one, two, two._replace(mean=0.01))] == ["not tested", "the same", "not tested"]
    assert [two._replace(mean=0.1, p=p).stand(True) for p in (0.049, 0.05)] == ["ahead", "not told apart"]


def test_where_less_is_better(tmp_path, monkeypatch):
    task = SimpleNamespace(metrics={"forgetting": Metric("forgetting", higher_is_better=False)})
    monkeypatch.setitem(TASKS, "continual", task)
    rows = [*cells("continual", "ce", {"forgetting": CE}), *cells("continual", "hem", {"forgetting": HEM})]
    text, _ = written(tmp_path, one(rows))
    assert "By forgetting (less is better), `hem` is behind `ce` by 0.050 [0.025, 0.075]" in text
    assert "forgetting (less is better): `hem` behind by 0.050" in text
    assert table(text, "## continual")[""][0] == "forgetting ↓"


def test_every_variant_of_hem_has_its_verdict(tmp_path):
    rows = (
        classification("ce", CE) + classification("hem", HEM, margin=0.5) + classification("hem", CE[::-1], margin=2.0)
    )
    text, _ = written(tmp_path, one(rows + classification("hem+", SHIFTED)))
    assert [line.split(" is ")[0] for line in text.splitlines() if line.startswith("- By")] == [
        "- By accuracy, `hem margin=0.5`",
        "- By accuracy, `hem margin=2`",
        "- By accuracy, `hem+`",
    ]


def test_variants_of_hem_in_one_line():
    rows = classification("ce", CE) + classification("hem", HEM) + classification("hem", SHIFTED, margin=2.0)
    rows += [row for margin in (0.5, 2.0) for row in classification("hem+", HEM, margin=margin)]
    (question,) = results.make_questions(one(rows))
    assert words.summary(question) == [
        "accuracy: `hem` (and `hem+ margin=0.5`, `hem+ margin=2`, the same network here) ahead by 0.050; "
        "`hem margin=2` not told apart (+0.020)"
    ]
    said = [words.where(question, "a"), words.where(question, TUNED)]
    (question,) = results.make_questions({"a": rows, SHARED: rows})
    assert [*said, words.where(question, "a"), words.where(question, SHARED)] == [
        "",
        ", own best",
        ", a",
        ", one schedule",
    ]


def test_several_differences_in_short():
    def said(stand, *means):
        found = dict(zip(("MSP", "energy", "max logit"), means, strict=False))
        return words._short(stand, {short: results.Difference(mean, 0, 0, 0, 3) for short, mean in found.items()})

    assert said("ahead", 0.11, 0.02, 0.05) == "ahead by 0.020 to 0.110 (MSP, energy, max logit)"
    assert said("level", -0.002, -0.001) == "level (MSP, energy: -0.001 to -0.002)"
    assert said("level", -0.002) == "level (MSP: -0.002)"


@pytest.mark.parametrize("ends", [(0.0, 0.05), (-0.05, 0.0), (-0.05, 0.05)])
def test_an_interval_that_holds_0_is_no_evidence(ends):
    found = words._phrase(
        results.Difference(0.02, *ends, 0.06, 2), results.Quantity("accuracy", {"accuracy": ""}, True)
    )
    low, high = map(words.signed, ends)
    assert found == (
        f"not told apart from `ce`: between {low} and {high}, which is no evidence either way (p 0.060, 2 seeds)"
    )


@pytest.mark.parametrize(
    "rows", [classification("hem", HEM), classification("ce", CE) + classification("hem", HEM, first_seed=3)]
)
def test_nothing_to_compare(tmp_path, rows):
    text, _ = written(tmp_path, one(rows))
    assert text.count("HEM and `ce` cannot be compared by accuracy: they share no seed.") == 2
    assert "forest.png" not in text


# --- tables ---------------------------------------------------------------------------------------------------


def test_mean_error_and_winner(tmp_path):
    rows = classification("mm", [0.90, 0.93, 0.91]) + classification("hem", HEM) + classification("ce", CE)
    text, printed = written(tmp_path, one(rows))
    found = every_metric(text)
    assert list(found) == ["ce", "hem", "mm"]  # as the harness lists them
    assert found["ce"]["accuracy"] == f"0.913 ± {stats.sem(CE):.3f}"
    assert found["hem"]["accuracy"] == f"**0.963 ± {stats.sem(HEM):.3f}**"
    assert found["hem"]["seeds"] == "3"
    assert found["hem"]["in loss"] == "12.5%"
    assert found["hem"]["linear transfer"] == "—"
    assert "0.963 ± 0.007  +0.050 [+0.025, +0.075]" in printed
    assert max(map(len, printed.splitlines())) <= 100
    assert "3 more metrics in report.md" in printed
    assert "wrote" in printed


def test_less_may_be_better_and_ties_share_the_first_place(tmp_path):
    rows = classification("ce", CE, [0.10, 0.20, 0.30]) + classification("hem", HEM, [0.2001, 0.2, 0.2])
    found = every_metric(written(tmp_path, one(rows + classification("mm", CE, [0.3, 0.3, 0.3])))[0])
    column = {loss: row["calibration error ↓"] for loss, row in found.items()}
    assert column == {"ce": "**0.200 ± 0.058**", "hem": "**0.200 ± 0.000**", "mm": "0.300 ± 0.000"}


def test_nan_wins_nothing_and_is_told(tmp_path):
    rows = classification("ce", CE) + classification("hem", [0.99, math.nan, 0.99])
    text, _ = written(tmp_path, one(rows + classification("mm", [math.nan] * 3)))
    assert {loss: row["accuracy"] for loss, row in every_metric(text).items()} == {
        "ce": f"**0.913 ± {stats.sem(CE):.3f}**",
        "hem": "NaN in 1 of 3",
        "mm": "—",
    }
    assert table(text)["hem"] == ["NaN in 1 of 3", "—", "—"]


def test_two_protocols_side_by_side(tmp_path):
    ce = classification("ce", CE)
    shared = ce + classification("hem", CE[::-1]) + classification("mm", CE)
    tuned = ce + classification("hem", HEM, schedule={"max_lr": 0.3}, margin=0.5)
    text, printed = written(tmp_path, {SHARED: shared, TUNED: tuned})
    found = table(text)
    assert found[""][0] == "one schedule: accuracy"
    assert found[""][3:] == ["own best: accuracy", "difference to ce [95% interval]", "p (Holm)", "at"]
    assert found["ce"] == ["0.913", "—", "—", "0.913", "—", "—", "lr 0.1"]
    p = f"{stats.ttest_rel(HEM, CE).pvalue:.3f}"
    assert found["hem"][3:] == ["0.963", "+0.050 [+0.025, +0.075]", p, "lr 0.3, margin 0.5"]
    assert found["hem"][0] == "0.913"
    assert found["mm"][3:] == ["—", "—", "—", "—"]
    assert list(every_metric(text, ", own best")) == ["ce", "hem"]
    assert list(every_metric(text, ", one schedule")) == ["ce", "hem", "mm"]
    assert "- By accuracy, own best, `hem` is ahead of `ce` by 0.050" in text
    assert "accuracy: `hem`, one schedule: not told apart (+0.000); own best: ahead by 0.050\n" in text
    assert "classification, own best" in printed
    for sentence in words.PROTOCOLS.values():
        assert sentence in text


def test_the_lines_of_two_protocols():
    shared = classification("ce", CE) + classification("hem", HEM, margin=0.5) + classification("mm", CE)
    tuned = classification("ce", CE) + classification("hem", HEM, margin=0.25) + classification("focal", CE)

    def lines(**protocols):
        (question,) = results.make_questions(protocols)
        return [(name, list(line)) for name, line in question.lines().items()]

    # One of a loss has its name alone, so that both stand on one line.
    together = [("ce", ["a", "b"]), ("hem", ["a", "b"]), ("focal", ["b"]), ("mm", ["a"])]
    together.sort(key=lambda line: list(LOSSES).index(line[0]))
    assert lines(a=shared, b=tuned) == together
    assert lines(a=shared, b=tuned, c=tuned)[0] == ("ce", ["a", "b", "c"])
    assert ("hem margin=0.5", ["a"]) in lines(a=shared)
    several = lines(a=shared + classification("hem", CE, margin=0.25), b=tuned)
    found = [line for line in several if line[0].startswith("hem")]
    assert found == [("hem margin=0.25", ["a"]), ("hem margin=0.5", ["a"]), ("hem", ["b"])]


def test_one_protocol_needs_no_name(tmp_path):
    text, _ = written(tmp_path, one(classification("ce", CE) + classification("hem", HEM)), title="The paper's tasks")
    assert text.startswith("# The paper's tasks\n")
    assert "one schedule" not in text
    assert words.PROTOCOLS[TUNED] not in text
    alone, _ = written(tmp_path, {TUNED: classification("ce", CE) + classification("hem", HEM, margin=0.5)})
    assert table(alone)["hem"][3] == "margin 0.5"


def test_scores_side_by_side(tmp_path, monkeypatch):
    declared = {
        f"{where}_auroc {score}": Metric(f"{where} AUROC, {title}")
        for where in ("near", "far")
        for score, title in (("msp", "MSP"), ("energy", "energy"))
    }
    task = SimpleNamespace(metrics={**declared, "accuracy": Metric("accuracy")}, judged_by=tuple(declared))
    monkeypatch.setitem(TASKS, "ood", task)
    ce = dict.fromkeys(task.metrics, CE)
    hem = {**ce, "near_auroc msp": HEM, "near_auroc energy": [0.86, 0.89, 0.88], "far_auroc energy": SHIFTED}
    shared = cells("ood", "ce", ce) + cells("ood", "hem", hem)
    text, _ = written(tmp_path, {SHARED: shared, TUNED: cells("ood", "ce", ce)})
    near, far = text.split("## ood\n")[1].split("- By")[0].strip().split("\n\nfar AUROC, and below it ")
    assert near.startswith(
        "near AUROC, and below it the difference to ce [95% interval] and p (Holm):\n\n| loss | protocol | MSP"
    )
    p = f"{stats.ttest_rel(HEM, CE).pvalue:.3f}"
    assert f"| hem | one schedule | 0.963<br>+0.050 [+0.025, +0.075]<br>p {p} | 0.877<br>-0.037" in near
    assert "| ce | own best | 0.913 | 0.913 | — |" in near
    assert "0.933<br>+0.020 [-0.005, +0.045]<br>p 0.074" in far
    assert "  - near AUROC: `hem`, one schedule: ahead by 0.050 (MSP), not told apart (energy: -0.037)\n" in text
    assert "- By near AUROC, one schedule, `hem` is with MSP ahead of `ce` by 0.050" in text
    assert "; with energy not told apart from `ce`" in text


def judged(protocols):
    """The lines of the only table of the only question, and what is above them."""
    (question,) = results.make_questions(protocols)
    above, _, below = tables.judged_table(question, *question.quantities).rpartition("\n\n")
    return above, below.splitlines()


def test_a_table_as_it_is_written():
    ce = classification("ce", CE)
    of_a, of_b = (f"{name}: accuracy | difference to ce [95% interval] | p (Holm)" for name in "ab")
    assert judged({"a": ce + classification("hem", HEM), "b": ce}) == (
        "",
        [
            f"| loss | {of_a} | {of_b} |",
            "| :-- | --: | --: | --: | --: | --: | --: |",
            "| ce | 0.913 | — | — | 0.913 | — | — |",
            "| hem | 0.963 | +0.050 [+0.025, +0.075] | 0.013 | — | — | — |",
        ],
    )


def test_a_table_of_several_scores_as_it_is_written(monkeypatch):
    declared = {
        f"auroc {name}": Metric(f"AUROC, {title}", higher_is_better=False)
        for name, title in (("msp", "MSP"), ("energy", "energy"))
    }
    monkeypatch.setitem(TASKS, "ood", SimpleNamespace(metrics=declared, judged_by=tuple(declared)))
    values = dict.fromkeys(declared, CE)
    ce = cells("ood", "ce", values)
    hem, other = (cells("ood", "hem", values | {"auroc msp": HEM}, margin=margin) for margin in (0.5, 0.25))
    of_hem = "0.963<br>+0.050 [+0.025, +0.075]<br>p 0.013 | 0.913<br>+0.000<br>p —"
    above = "AUROC ↓, and below it the difference to ce [95% interval] and p (Holm):"
    # One protocol has no name, and settings that are nobody's own best no column.
    alone = ["| loss | MSP | energy |", "| :-- | --: | --: |", "| ce | 0.913 | 0.913 |"]
    assert judged({"a": ce + hem}) == (above, [*alone, f"| hem margin=0.5 | {of_hem} |"])
    assert judged({"a": ce, "b": ce + hem})[1] == [
        "| loss | protocol | MSP | energy |",
        "| :-- | --: | --: | --: |",
        "| ce | a | 0.913 | 0.913 |",
        "| ce | b | 0.913 | 0.913 |",
        f"| hem | b | {of_hem} |",
    ]
    assert judged({TUNED: ce + hem})[1][2:] == ["| ce | 0.913 | 0.913 | — |", f"| hem | {of_hem} | margin 0.5 |"]
    assert judged({SHARED: ce + other, TUNED: ce + hem})[1] == [
        "| loss | protocol | MSP | energy | at |",
        "| :-- | --: | --: | --: | --: |",
        "| ce | one schedule | 0.913 | 0.913 | — |",
        "| ce | own best | 0.913 | 0.913 | — |",
        f"| hem | one schedule | {of_hem} | — |",
        f"| hem | own best | {of_hem} | margin 0.5 |",
    ]


@pytest.mark.parametrize("number", [8, 9])
def test_the_table_of_every_metric_as_it_is_written(monkeypatch, number):
    declared = {f"m{i}": Metric(f"number {i}", higher_is_better=i > 0) for i in range(number)}
    monkeypatch.setitem(TASKS, "ood", SimpleNamespace(metrics=declared))
    rows = [
        row
        for loss, value in (("ce", 0.5), ("hem", 0.25))
        for row in cells("ood", loss, {m: [value] for m in declared})
    ]
    (question,) = results.make_questions(one(rows))
    found = tables.metrics_table(question, question.protocols[SHARED]).splitlines()
    others = [f"number {i}" for i in range(1, number)]
    if number > 8:  # too wide
        assert found == [
            "| loss | ce | hem |",
            "| :-- | --: | --: |",
            "| number 0 ↓ | 0.500 | **0.250** |",
            *(f"| {name} | **0.500** | 0.250 |" for name in others),
            "| seeds | 1 | 1 |",
            "| in loss | 12.5% | 12.5% |",
        ]
    else:
        assert found == [
            f"| loss | number 0 ↓ | {' | '.join(others)} | seeds | in loss |",
            f"| :-- |{' --: |' * (number + 2)}",
            f"| ce | 0.500 |{' **0.500** |' * (number - 1)} 1 | 12.5% |",
            f"| hem | **0.250** |{' 0.250 |' * (number - 1)} 1 | 12.5% |",
        ]


def printed(rows, width=100):
    (question,) = results.make_questions(one(rows))
    file = io.StringIO()
    Console(file=file, width=width).print(tables.console(question, SHARED))
    return file.getvalue().splitlines()


def test_the_table_of_a_terminal_as_it_is_printed():
    assert printed(classification("ce", CE) + classification("hem", HEM)) == [
        "classification                                                 ",
        "                                                               ",
        " loss       accuracy   difference to ce [95%]  p (Holm)  seeds ",
        " ───────────────────────────────────────────────────────────── ",
        " ce    0.913 ± 0.009                        —         —      3 ",
        " hem   0.963 ± 0.007  +0.050 [+0.025, +0.075]     0.013      3 ",
        "                                                               ",
        "                  3 more metrics in report.md                  ",
    ]
    # Names are what is broken where there is not the width, and nothing is left out.
    narrow = printed(classification("ce", CE) + classification("hem", HEM, margin=0.5), width=68)
    assert [line.rstrip() for line in narrow[6:8]] == [" margin=0.", " 5"]


@pytest.mark.parametrize(
    ("number", "said"), [(1, ""), (2, "1 more metric in report.md"), (3, "2 more metrics in report.md")]
)
def test_a_terminal_says_what_it_leaves_out(monkeypatch, number, said):
    declared = {f"m{i}": Metric(f"number {i}") for i in range(number)}
    monkeypatch.setitem(TASKS, "ood", SimpleNamespace(metrics=declared))
    *_, last = printed(cells("ood", "ce", dict.fromkeys(declared, CE)))
    assert last.strip() == said


def test_values_that_no_task_declares():
    rows = classification("ce", CE) + cells("classification", "hem", {"accuracy": CE, "other": HEM})
    (question,) = results.make_questions(one(rows))
    assert tables.other_values(question, question.protocols[SHARED]).splitlines() == [
        "| value | ce | hem |",
        "| :-- | --: | --: |",
        "| other | — | 0.963 ± 0.007 |",
    ]
    (question,) = results.make_questions(one(classification("ce", CE)))
    assert tables.other_values(question, question.protocols[SHARED]) == ""


def test_seeds_in_words():
    def said(**seeds):
        of = [results.Result(name, name, {}, {}, cells=dict.fromkeys(found)) for name, found in seeds.items()]
        return tables.seeds(of)

    assert said(ce=[2, 0, 1], hem=[0, 1, 2]) == "seeds 0 to 2"
    assert said(ce=[0, 1]) == "seeds 0, 1"
    assert said(ce=[0, 1, 3]) == "seeds 0, 1, 3"
    assert said(ce=[7], hem=[0, 1, 2], mm=[7]) == "seeds 7 of ce, mm; 0 to 2 of hem"


def test_the_best_is_so_as_a_number():
    rows = classification("ce", [9.5] * 3) + classification("hem", [10.5] * 3)
    (question,) = results.make_questions(one(rows))
    (best,) = tables.best(question.metrics, question.protocols[SHARED], "accuracy")
    assert best.name == "hem"


def test_many_metrics_have_a_line_each(tmp_path, monkeypatch):
    declared = {f"m{i}": Metric(f"number {i}") for i in range(9)}
    monkeypatch.setitem(TASKS, "ood", SimpleNamespace(metrics=declared))
    rows = [*cells("ood", "ce", dict.fromkeys(declared, CE)), *cells("ood", "hem", dict.fromkeys(declared, HEM))]
    found = table(written(tmp_path, one(rows))[0], "### ood: every metric")
    assert found[""] == ["ce", "hem"]
    assert found["number 8"] == [f"0.913 ± {stats.sem(CE):.3f}", f"**0.963 ± {stats.sem(HEM):.3f}**"]


def test_extra_values_and_settings(tmp_path):
    rows = [*cells("segmentation", "ce", {"mean_iou": CE, "iou 0": CE, "iou 1": HEM})]
    rows += [*cells("segmentation", "logitnorm", {"mean_iou": CE, "iou 0": HEM, "iou 1": CE}, tau=0.1)]
    text, printed = written(tmp_path, one(rows))
    ce, hem = f"0.913 ± {stats.sem(CE):.3f}", f"0.963 ± {stats.sem(HEM):.3f}"
    assert table(text, "### segmentation: every other value") == {
        "": ["ce", "logitnorm tau=0.1"],
        "iou 0": [ce, hem],
        "iou 1": [hem, ce],
    }
    assert "iou 0" not in printed
    for line in (
        "- data: digits",
        "- judged on: test",
        "- model: small",
        "- schedule: epochs 3, batch_size 64, max_lr 0.1, policy one-cycle",
        "- options: transfer True, data_options (num_train 60)",
        "- `ce`: no constants",
        "- `logitnorm`: tau 0.1",
        "- run with: torch 2.13.0, hem_ext 0.1.0, on cpu (x86_64)",
        "seeds 0 to 2",
    ):
        assert line in text.splitlines()
    assert "validation: " not in text
    assert "mixed precision" not in text


def test_settings_as_they_are_written():
    ce = classification("ce", CE)
    shared = ce + classification("hem", HEM) + classification("hem", HEM, margin=0.5)
    own = ce + classification("hem", HEM, schedule={"max_lr": 0.3}, margin=0.25)
    more = {"data_root": "/data", "validation": 0.25, "mixed_precision": "bf16"}
    own = [row | {"settings": row["settings"] | more, "torch": f"2.1{row['seed']}.0"} for row in own]
    schedule = "epochs 3, batch_size 64, max_lr 0.1, policy one-cycle"
    total = f"{LOSSES['hem'].constants()['total']:g}"
    versions = [f"torch 2.{minor}.0, hem_ext 0.1.0, on cpu (x86_64)" for minor in (13, 10, 11, 12)]

    (question,) = results.make_questions({"a": shared, TUNED: own})
    assert tables.settings(question).splitlines() == [
        "- data: digits",
        "- judged on: test",
        "- model: small",
        f"- schedule, a: {schedule}",
        f"- schedule, own best: {schedule}; or {schedule.replace('0.1', '0.3')}",
        "- options: transfer True, data_options (num_train 60)",
        "- `ce`: no constants",
        f"- `hem`, a: margin by its rule, total {total}; or margin 0.5, total {total}",
        f"- `hem`, own best: margin 0.25, total {total}",
        f"- run with, a: {versions[0]}",
        f"- run with, own best: {'; or '.join(versions[1:])}",
        "- data root, own best: /data",
        "- validation, own best: 0.25",
        "- mixed precision, own best: bf16",
    ]


def test_settings_that_differ_by_protocol(tmp_path):
    tuned = classification("ce", CE, schedule={"max_lr": 0.3}) + classification("hem", HEM, margin=0.5)
    text, _ = written(tmp_path, {SHARED: classification("ce", CE) + classification("hem", CE), TUNED: tuned})
    shared = "epochs 3, batch_size 64, max_lr 0.1, policy one-cycle"
    assert f"- schedule, one schedule: {shared}\n" in text
    assert f"- schedule, own best: {shared.replace('0.1', '0.3')}; or {shared}\n" in text
    assert "- `hem`, own best: margin 0.5, total 2000\n" in text
    assert "- data: digits\n" in text


def test_numbers_of_validation_are_called_so(tmp_path):
    sentence = "The numbers below are of validation images"
    rows = classification("ce", CE)
    assert sentence not in written(tmp_path, one(rows))[0]
    assert sentence in written(tmp_path, one(classification("ce", CE, part="validation")))[0]
    text, _ = written(tmp_path, one(rows))
    assert "test images\nare looked at once" in text
    assert "not the draw of the images" in text


EPOCH = {"active": 1.0, "kept": 1.0, "logit_gap": 0.0, "logit_scale": 1.0, "seconds": 1.0, "metrics": {}}


def timed(folder, rows, seconds):
    """Rows whose cells left curves: loss -> seconds of each seed's two epochs, None where there are no curves."""
    cells_of = {(row["loss"], row["seed"]): row["cell"] for row in rows}
    lines = [
        {"cell": cells_of[loss, seed], "history": [{**EPOCH, "seconds": part * time} for part in (0.25, 0.75)]}
        for loss, times in seconds.items()
        for seed, time in enumerate(times)
        if time is not None
    ]
    (folder / "curves.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return rows


def test_the_time_of_training_beside_that_of_cross_entropy(tmp_path):
    rows = classification("ce", CE) + classification("hem", HEM) + classification("hem", HEM, selective=True)
    rows += classification("mm", CE) + classification("focal", CE)
    times = {"ce": [2, 4, 8], "hem": [3, 4, 4], "hem selective": [1, 3, 16], "mm": [None, 2, None]}
    text, _ = written(tmp_path, one(timed(tmp_path, rows, times)))
    found = every_metric(text)
    assert {loss: row["time"] for loss, row in found.items()} == {
        "ce": "1.00",
        "hem": "1.00",  # of 1.5, 1 and 0.5
        "hem selective": "0.75",  # of 0.5, 0.75 and 2
        "mm": "0.50",
        "focal": "—",
    }
    assert list(found) == ["ce", "hem", "hem selective", "mm", "focal"]
    assert f"\n\n{words.TIMES}\nseeds 0 to 2" in text
    assert table(text)["hem selective"][0] == "0.963"
    assert "- By accuracy, `hem selective` is ahead of `ce` by 0.050" in text


def test_times_are_held_against_cross_entropy_of_the_same_schedule(tmp_path):
    rates = ({"max_lr": rate} for rate in (0.1, 0.3, 0.5))
    slow, fast, other = ([classification(loss, CE, schedule=rate) for loss in ("ce", "hem")] for rate in rates)
    rows = [row for of in (*slow, *fast, other[1]) for row in of]
    history = {"ce-0.1": 2.0, "ce-0.3": 4.0, "hem-0.1": 1.0, "hem-0.3": 1.0, "hem-0.5": 1.0}
    curves = {
        row["cell"]: {"history": [{"seconds": history[f"{row['loss']}-{row['settings']['schedule']['max_lr']}"]}]}
        for row in rows
    }
    made = results.make_results(rows)
    assert results.relative_times(made, curves) == {
        "ce max_lr=0.1": 1.0,
        "ce max_lr=0.3": 1.0,
        "hem max_lr=0.1": 0.5,
        "hem max_lr=0.3": 0.25,
    }
    del curves[rows[1]["cell"]]
    assert [results.histories(result, curves) for result in made[:2]] == [
        [[{"seconds": 2.0}]] * 2,
        [[{"seconds": 4.0}]] * 3,
    ]


@pytest.mark.parametrize("without", ["selective cells", "curves"])
def test_no_times_without(tmp_path, without):
    rows = classification("ce", CE) + classification("hem", HEM, selective=without == "curves")
    if without != "curves":
        timed(tmp_path, rows, {"ce": [2, 4, 8], "hem": [3, 4, 4]})
    text, _ = written(tmp_path, one(rows))
    assert all("time" not in row for row in every_metric(text).values())
    assert words.TIMES not in text


# --- what is read ---------------------------------------------------------------------------------------------


def without(line, *names):
    """The line less one of its names, for each."""
    return [{name: value for name, value in line.items() if name != left_out} for left_out in names]


def test_rows_that_are_not_whole_are_left_out(tmp_path):
    row = classification("ce", [0.9])[0]
    row["cell"] = digest(row["settings"])
    assert not {"task", "seed"} - row["settings"].keys()
    whole = [row, row | {"value": math.nan}, row | {"value": -(2**63) + 1, "loss_share": 2**63 - 1}]
    bad = [
        *without(row, *results.TEXTS, "seed", "of", "value", "loss_share", "settings"),
        *({**row, name: 3} for name in results.TEXTS),
        *({**row, name: "3"} for name in ("seed", "of", "value", "loss_share", "settings")),
        *({**row, name: value} for name in ("value", "loss_share") for value in (True, 2**63, -(2**63), None)),
        *({**row, "settings": row["settings"] | {name: 3}} for name in ("task", "seed", "model")),
        *({**row, name: value} for name, value in (("task", "ood"), ("seed", 7), ("cell", "0"))),
        *(
            row | {"cell": digest(settings), "settings": settings}
            for settings in without(row["settings"], "task", "seed")
        ),
        *([], 3, None, "row", ["settings"]),
    ]
    file = tmp_path / "results.jsonl"
    file.write_text("\n".join(map(json.dumps, [*bad, *whole, *bad])) + f"\n{'[' * 10**5}\n{json.dumps(row)[:-1]}")
    assert repr(list(results.read_lines(tmp_path, "results"))) == repr(whole)
    (tmp_path / "results-1.jsonl").write_text(json.dumps(row))
    (tmp_path / "curves.jsonl").write_text(json.dumps(row))
    assert repr(list(results.read_lines(tmp_path, "results"))) == repr([row, *whole])


def test_curves_that_are_not_whole_are_left_out(tmp_path):
    epoch = {**EPOCH, "metrics": {"accuracy": 0.5}}
    line = {"cell": "1", "history": [epoch, epoch]}
    bad_epochs = [
        *without(epoch, *EPOCH),
        *({**epoch, name: value} for name in EPOCH for value in ("3", None)),
        *(epoch | {"metrics": {"accuracy": value}} for value in ("0.5", None, True)),
        *([], 3, None, ["metrics"]),
    ]
    bad = [
        *({**line, "history": [epoch, bad_epoch]} for bad_epoch in bad_epochs),
        *without(line, "cell", "history"),
        *({**line, "cell": 3}, line | {"history": []}, line | {"history": {"0": epoch}}, line | {"history": "x"}),
        *([], 3, None, "line", ["cell"]),
    ]
    (tmp_path / "curves.jsonl").write_text("\n".join(map(json.dumps, [*bad, line, *bad])))
    assert list(results.read_lines(tmp_path, "curves")) == [line]
    assert results.read_curves(tmp_path) == {"1": line}


# --- results --------------------------------------------------------------------------------------------------


def test_what_tells_metrics_of_a_quantity_apart_is_the_end_of_their_titles(monkeypatch):
    declared = {
        f"auroc {score}": Metric(f"AUROC, of all, {score}", higher_is_better=False) for score in ("msp", "energy")
    }
    monkeypatch.setitem(TASKS, "ood", SimpleNamespace(metrics=declared, judged_by=tuple(declared)))
    assert results.quantities("ood") == [
        results.Quantity("AUROC, of all", {"auroc msp": "msp", "auroc energy": "energy"}, higher_is_better=False)
    ]


def names(rows, **given):
    return [result.name for result in results.make_results(rows, **given)]


def test_a_sweep_names_what_differs():
    rows = classification("ce", CE, schedule={"max_lr": 0.3}) + classification("ce", CE)
    rows += classification("hem", CE, margin=0.5) + classification("hem", CE, schedule={"max_lr": 0.3}, margin=0.5)
    rows += classification("mm", CE, schedule={"epochs": 9})
    assert names(rows) == [
        "ce max_lr=0.1",
        "ce max_lr=0.3",
        "hem margin=0.5 max_lr=0.1",
        "hem margin=0.5 max_lr=0.3",
        "mm",
    ]
    assert names(rows[::-1]) == names(rows)  # the order in which cells end is chance


def test_in_a_sweep_each_is_held_against_cross_entropy_of_the_same_schedule():
    fast = {"max_lr": 0.3}
    rows = (
        classification("ce", CE)
        + classification("ce", HEM, schedule=fast)
        + classification("mm", CE, schedule={"epochs": 9})
    )
    rows += classification("hem", HEM, margin=0.5) + classification("hem", HEM, schedule=fast, margin=0.5)
    found = results.differences(results.make_results(rows), "accuracy")
    assert {name: round(difference.mean, 3) for name, difference in found.items()} == {
        "hem margin=0.5 max_lr=0.1": 0.05,
        "hem margin=0.5 max_lr=0.3": 0.0,
    }
    # A single one is what all are held against, whatever its schedule.
    alone = results.make_results(classification("ce", CE) + classification("mm", HEM, schedule={"epochs": 9}))
    assert results.differences(alone, "accuracy")["mm"].mean == pytest.approx(metrics.paired(HEM, CE).difference)


def test_settings_are_the_same_in_any_order():
    rows = classification("ce", CE)
    rows[-1]["settings"] = dict(reversed(rows[-1]["settings"].items()))
    assert names(rows) == ["ce"]


def test_results_are_in_the_order_of_their_numbers():
    policies = [row for policy in ("cosine", None) for row in classification("ce", CE, schedule={"policy": policy})]
    assert names(policies) == ["ce policy=None", "ce policy=cosine"]
    rates = [row for rate in (10.0, 9.0) for row in classification("ce", CE, schedule={"max_lr": rate})]
    assert names(rates) == ["ce max_lr=9", "ce max_lr=10"]


def test_a_tuned_loss_is_called_by_its_name():
    rows = classification("ce", CE) + classification("hem", CE, schedule={"max_lr": 0.3}, margin=0.5)
    assert names(rows, tuned=True) == ["ce", "hem"]
    assert names(rows) == ["ce", "hem margin=0.5"]


def test_selective_training_is_a_variant_and_no_setting():
    fast = {"max_lr": 0.3}
    rows = classification("ce", CE) + classification("ce", CE, schedule=fast) + classification("hem", CE)
    rows += classification("hem", CE, selective=True) + classification("hem", HEM, selective=True, schedule=fast)
    assert names(rows) == [
        "ce max_lr=0.1",
        "ce max_lr=0.3",
        "hem",
        "hem selective max_lr=0.1",
        "hem selective max_lr=0.3",
    ]
    compared = results.differences(results.make_results(rows), "accuracy")
    assert {name: round(difference.mean, 3) for name, difference in compared.items()} == {
        "hem": 0.0,
        "hem selective max_lr=0.1": 0.0,
        "hem selective max_lr=0.3": 0.05,
    }


def test_selective_training_has_lines_of_its_own():
    rates = [{"max_lr": rate} for rate in (0.1, 0.3)]
    rows = [
        row
        for way in (False, True)
        for rate in rates
        for row in classification("hem", CE, selective=way, schedule=rate)
    ]
    (question,) = results.make_questions(one(rows))
    figure = grid.draw(question, question.protocols[SHARED], "sweep")
    (axis,) = figure.axes
    lines = {container.get_label(): container.lines[0] for container in axis.containers}
    assert list(lines) == ["hem", "hem selective"]
    plain, selective = lines.values()
    assert plain.get_color() == selective.get_color()
    assert plain.get_linestyle() != selective.get_linestyle()
    assert [list(drawn.get_xdata()) for drawn in (plain, selective)] == [[0.1, 0.3]] * 2


def test_selective_training_at_its_own_best(tmp_path):
    ce = classification("ce", CE)
    shared = ce + classification("hem", CE) + classification("hem", CE, selective=True)
    own = [classification("hem", HEM, selective=selective, schedule={"max_lr": 0.3}) for selective in (False, True)]
    text, _ = written(tmp_path, {SHARED: shared, TUNED: ce + own[0] + own[1]})
    found = table(text)
    assert list(found) == ["", "ce", "hem", "hem selective"]
    for loss in ("hem", "hem selective"):
        assert (found[loss][0], found[loss][3], found[loss][-1]) == ("0.913", "0.963", "lr 0.3")


def test_an_optimizer_that_is_not_said_is_the_default():
    rows = classification("ce", CE) + classification("hem", CE)
    rows += [row for loss in ("ce", "hem") for row in classification(loss, HEM, schedule={"optimizer": "adamw"})]
    assert names(rows) == ["ce optimizer=adamw", "ce optimizer=sgd", "hem optimizer=adamw", "hem optimizer=sgd"]
    assert names(rows) == names(rows[::-1])
    found = results.differences(results.make_results(rows), "accuracy")
    assert {name: difference.mean for name, difference in found.items()} == dict.fromkeys(names(rows)[2:], 0)


def test_questions_are_in_the_order_of_tasks():
    rows = [
        row
        for data in ("mnist-5k", "digits")
        for task in sorted(TASKS)
        for row in cells(task, "ce", {"m": CE}, data=data)
    ]
    assert sorted(TASKS) != list(TASKS)
    asked = [(question.task, question.data) for question in results.make_questions(one(rows))]
    assert asked == [(task, data) for task in TASKS for data in ("digits", "mnist-5k")]


def test_a_task_on_two_data_sets_is_two_questions(tmp_path):
    rows = [row for data in ("digits", "mnist-5k") for row in classification("ce", CE, data=data)]
    rows += classification("hem", HEM, data="mnist-5k") + classification("hem", CE[::-1])
    text, _ = written(tmp_path, one(rows))
    assert table(text, "## classification-mnist-5k")["hem"][0] == "0.963"
    assert table(text, "## classification-digits")["hem"][0] == "0.913"
    assert "- **classification** (mnist-5k), accuracy: `hem` ahead by 0.050\n" in text
