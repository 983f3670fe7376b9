"""Skips these tests where vLLM is not installed, and gives them time where it is."""

import pytest
import spawning

from megatron_srft.rollout.vllm.versions import installed_version


@pytest.fixture(scope="module", autouse=True)
def patience():
    """vLLM takes long to import and to start, and much longer on a machine that does other things."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spawning, "TIMEOUT_SECONDS", 1500)
        yield


def pytest_collection_modifyitems(items):
    if installed_version() is None:
        skip = pytest.mark.skip(reason="vLLM is not installed; make vllm installs its CPU build")
        for item in items:
            if "rollout/vllm" in str(item.path):
                item.add_marker(skip)
