import pytest

from megatron_srft.ops.implementations import reason_against


@pytest.fixture(params=["reference", "native"])
def implementation(request):
    """Every implementation that runs on a CPU; the others have test files of their own."""
    if reason := reason_against(request.param, "cpu"):
        pytest.skip(reason)
    return request.param
