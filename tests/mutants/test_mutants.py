"""That every mutant still applies; ``make mutants`` sees that the tests notice them."""

from collections import Counter
from pathlib import Path

import pytest

from tests.mutants import python
from tests.mutants.mutants import MUTANTS, ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_it_applies(mutant):
    assert mutant.applied() != (ROOT / mutant.file).read_text("utf-8")
    for test in mutant.tests:
        path, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}(" in Path(ROOT, path).read_text("utf-8"), f"there is no {test}"


def test_names_are_their_own():
    assert max(Counter(mutant.name for mutant in MUTANTS).values()) == 1


def test_what_is_explained_is_there():
    for function, old, _ in python.explained():
        found = [name for name in python.APPLIED | python.CHOSEN if function.startswith(f"hem_ext.{name}.")]
        module = max(found, key=len)  # a package's own, unless it is of a module in it
        name = function.rpartition(".")[2]
        text = " ".join((ROOT / python.file_of(module)).read_text("utf-8").split())
        assert f"def {name}(" in text, function
        assert " ".join(old.split()) in text, (function, old)


def test_a_change_is_told_by_its_text():
    diff = "--- a\n+++ a\n def f():\n-    return (\n-        1\n+    return (\n+        2\n     )"
    name = "hem_ext.hem.xǁHEMLossǁ__init____mutmut_12"
    assert python.change_of(name, diff) == ("hem_ext.hem.HEMLoss.__init__", "return ( 1", "return ( 2")
    assert python.function_of("hem_ext.linear.x__chunks__mutmut_3") == "hem_ext.linear._chunks"


def test_decorators_are_put_behind_their_functions():
    source = """
@f
@g(1)
def a():
    pass

class B:
    @staticmethod
    def c(): ...
    @property
    def d(self): ...
"""
    expected = """
def a():
    pass
a = f(g(1)(a))

class B:
    @staticmethod
    def c(): ...
    def d(self): ...
    d = property(d)
"""
    assert python.undecorated(source) == expected
