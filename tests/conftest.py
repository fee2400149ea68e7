import pytest
import torch

from hem_ext import _native

if _native.library is None:
    # Skipping what needs the library would look like success.
    raise pytest.UsageError(f"the tests need the native library, but {_native.unavailable(torch.device('cpu'))}")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=_native.library.available_cpu_isas())
def isa(request):
    """Run on every instruction set that this processor has."""
    before = _native.library.cpu_isa()
    _native.library.select_cpu_isa(request.param)
    yield request.param
    _native.library.select_cpu_isa(before)


@pytest.fixture(params=["native", "reference"])
def backend(request):
    return request.param
