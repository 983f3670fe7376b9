"""The installed vLLM against what rollout/vllm_interface.py takes it for. The behaviour is in test_engine.py."""

from megatron_srft.rollout import vllm_interface as interface


def test_the_installed_version_is_one_of_the_supported():
    interface.require_vllm()


def test_everything_that_is_called_is_there():
    assert interface.broken_contract() == []


def test_what_is_missing_would_be_named(monkeypatch):
    broken = {"vllm.LLM.sing": (), "vllm.SamplingParams": ("seed", "mood"), "vllm.v9.engine.Engine": ()}
    monkeypatch.setattr(interface, "CONTRACT", broken)
    assert interface.broken_contract() == ["vllm.LLM.sing", "vllm.SamplingParams(mood=)", "vllm.v9.engine.Engine"]
