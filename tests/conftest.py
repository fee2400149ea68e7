from importlib.util import find_spec

import hypothesis
import pytest
import torch
from hypothesis.configuration import set_hypothesis_home_dir
from torch.distributed.device_mesh import init_device_mesh

from hem_ext import _native

if _native.library is None:
    # Skipping what needs the library would look like success.
    raise pytest.UsageError(f"the tests need the native library, but {_native.unavailable(torch.device('cpu'))}")

HAS_CUDA = torch.cuda.is_available() and _native.unavailable(torch.device("cuda")) is None
DEVICES = ["cpu", "cuda"] if HAS_CUDA else ["cpu"]
collect_ignore = [] if HAS_CUDA else ["test_cuda.py"]
if find_spec("pytorch_lightning") is None:
    collect_ignore += ["frameworks", "examples/test_frameworks.py"]  # run by `make frameworks`
collect_ignore.append("properties/test_large.py")  # run by `make large`
collect_ignore.append("faults")  # run by `make faults`
collect_ignore.append("emulation/test_finished.py")  # run by `make emulate`
collect_ignore.append("cross")  # run by `make arm`, `make clang` and `make macos`
if find_spec("torchvision") is None:
    collect_ignore.append("examples/test_integrations.py")  # run by `make test-integrations`

# Property tests: the same cases on every run, or with --hypothesis-profile=fuzz new ones, many more of them.
set_hypothesis_home_dir("build/hypothesis")
common = {"deadline": None, "suppress_health_check": list(hypothesis.HealthCheck)}
hypothesis.settings.register_profile("ci", max_examples=250, derandomize=True, **common)
hypothesis.settings.register_profile("fuzz", max_examples=10_000, print_blob=True, **common)
hypothesis.settings.load_profile("ci")


def pytest_addoption(parser):
    parser.addoption("--require-cuda", action="store_true", help="fail where the CUDA kernels cannot run")
    parser.addoption("--no-skips", action="store_true", help="fail where a test was skipped")


def pytest_configure(config):
    if config.getoption("--require-cuda") and not HAS_CUDA:
        reason = _native.unavailable(torch.device("cuda")) or "torch sees no GPU"
        raise pytest.UsageError(f"--require-cuda, but {reason}")


def pytest_report_header():
    return f"CUDA kernels: {'on ' + torch.cuda.get_device_name() if HAS_CUDA else 'no GPU to run them on'}"


def pytest_sessionfinish(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.getoption("--no-skips") and reporter and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=DEVICES)
def device(request):
    """Run on the CPU, and on the GPU where there is one; tensors are made there."""
    torch.set_default_device(request.param)
    yield request.param
    torch.set_default_device(None)


@pytest.fixture(params=[*_native.library.available_cpu_isas(), *DEVICES[1:]])
def kernels(request):
    """Run with the kernels of every instruction set that this processor has, and with those of the GPU."""
    if request.param == "cuda":
        torch.set_default_device("cuda")
        yield request.param
        torch.set_default_device(None)
        return
    before = _native.library.cpu_isa()
    _native.library.select_cpu_isa(request.param)
    yield request.param
    _native.library.select_cpu_isa(before)


@pytest.fixture(params=["native", "reference"])
def backend(request):
    return request.param


@pytest.fixture
def mesh():
    """A device mesh of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()
