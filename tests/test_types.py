"""What the package says of its types: that it does, and of the library, what is there. `make lint` checks the rest."""

import ast
from importlib.resources import files

from hem_ext import _native


def test_the_package_is_typed():
    assert files("hem_ext").joinpath("py.typed").is_file()


def test_the_stubs_name_what_the_library_has():
    stubs = ast.parse(files("hem_ext").joinpath("_C.pyi").read_text(encoding="utf-8"))
    functions = {node.name for node in stubs.body if isinstance(node, ast.FunctionDef)}
    values = {node.target.id for node in stubs.body if isinstance(node, ast.AnnAssign)}
    assert functions | values == {name for name in dir(_native.library) if not name.startswith("_")}
