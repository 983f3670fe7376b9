"""Skips these tests where vLLM is not installed."""

import pytest

from megatron_srft.rollout.vllm_interface import installed_version


def pytest_collection_modifyitems(items):
    if installed_version() is None:
        skip = pytest.mark.skip(reason="vLLM is not installed; make test-vllm installs its CPU build")
        for item in items:
            if "rollout/vllm" in str(item.path):
                item.add_marker(skip)
