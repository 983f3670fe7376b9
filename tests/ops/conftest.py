import pytest

from megatron_srft.ops.implementations import IMPLEMENTATIONS, reason_against

ON_A_CPU = ("reference", "native")
"""triton has test files of its own there."""


def pytest_generate_tests(metafunc):
    """A test that takes `implementation`, and does not say which, runs with each that its device may have."""
    said = any(mark.args[0] == "implementation" for mark in metafunc.definition.iter_markers("parametrize"))
    if "implementation" in metafunc.fixturenames and not said:
        names = IMPLEMENTATIONS if _device(metafunc.definition) == "cuda" else ON_A_CPU
        metafunc.parametrize("implementation", names, indirect=True)


@pytest.fixture
def implementation(request):
    if reason := reason_against(request.param, _device(request.node)):
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def _device(item) -> str:
    return "cuda" if item.get_closest_marker("gpu") else "cpu"
