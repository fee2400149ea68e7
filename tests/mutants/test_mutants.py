"""That every mutant still applies; ``make mutants`` sees that the tests notice them."""

from collections import Counter
from pathlib import Path

import pytest

from tests.mutants.mutants import MUTANTS, ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_it_applies(mutant):
    assert mutant.applied() != (ROOT / mutant.file).read_text("utf-8")
    for test in mutant.tests:
        path, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}(" in Path(ROOT, path).read_text("utf-8"), f"there is no {test}"


def test_names_are_their_own():
    assert max(Counter(mutant.name for mutant in MUTANTS).values()) == 1
