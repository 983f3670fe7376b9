"""What is refused about rollout.kind vllm before vLLM is asked, and that it is not needed for anything else."""

import subprocess
import sys

import pytest

from megatron_srft.config import ConfigError, as_local, from_dict
from megatron_srft.rollout.vllm import versions


def config(vllm=None, **rollout):
    return from_dict({"rollout": {"kind": "vllm", "vllm": vllm or {}, **rollout}})


def test_native_arguments_pass_through_under_their_own_names():
    rollout = config({"max_num_seqs": 12, "tensor_parallel_size": 2}).rollout
    assert rollout.vllm == {"max_num_seqs": 12, "tensor_parallel_size": 2}
    assert rollout.engine_ranks == 2
    assert config().rollout.engine_ranks == 1


@pytest.mark.parametrize(
    ("vllm", "rollout", "words"),
    [
        ({"dtype": "float16"}, {}, "rollout.vllm.dtype is reserved: model.dtype says it"),
        ({"distributed_executor_backend": "ray"}, {}, "reserved: torchrun starts"),
        ({"tensor_parallel_size": 0}, {}, "tensor_parallel_size must be a whole number of at least 1, not 0"),
        ({"tensor_parallel_size": "2"}, {}, "not '2'"),
        ({}, {"checksum_every": -1}, "rollout.checksum_every must be a number of at least 0"),
        ({}, {"sync_timeout": 0}, "rollout.sync_timeout must be a number of at least 1"),
        ({}, {"temperature": 0.7, "top_p": 0.9}, "before top_p and top_k, which training needs"),
        ({}, {"max_concurrent_sequences": 3}, "unknown key rollout.max_concurrent_sequences"),
    ],
)
def test_mistakes_are_told_with_their_key(vllm, rollout, words):
    with pytest.raises(ConfigError) as caught:
        config(vllm, **rollout)
    assert words in str(caught.value)


def test_the_section_itself_is_named_when_it_is_no_mapping():
    with pytest.raises(ConfigError, match=r"^rollout\.vllm"):
        from_dict({"rollout": {"kind": "vllm", "vllm": 3}})


@pytest.mark.parametrize("rollout", [{"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}])
def test_log_probs_that_vllm_has_are_not_refused(rollout):
    config(**rollout)


def test_a_missing_or_unknown_version_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(versions, "installed_version", lambda: None)
    with pytest.raises(ConfigError, match=r"pip install 'megatron-srft\[vllm\]'"):
        versions.require_vllm()
    monkeypatch.setattr(versions, "installed_version", lambda: "0.31.1")
    with pytest.raises(ConfigError, match="0.31.1 is installed"):
        versions.require_vllm()


def test_nothing_else_imports_vllm():
    code = "import sys, megatron_srft.rollout, megatron_srft.session; print('vllm' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split()[-1] == "False"


def test_a_command_that_only_samples_locally_keeps_the_runs_sampling():
    local = as_local(config({"max_num_seqs": 9}, max_response_tokens=77, stop=["#"], top_k=5).rollout)
    assert (local.kind, local.max_response_tokens, local.stop, local.top_k) == ("local", 77, ("#",), 5)
    assert as_local(local) is local
