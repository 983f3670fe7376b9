"""The installed vLLM against what rollout/vllm/interface.py takes it for. The behaviour is in test_engine.py."""

from vllm_server_runs import KEY, write_server_run

from megatron_srft import config as configuration
from megatron_srft.rollout.servers import guard, routes, serve
from megatron_srft.rollout.vllm import versions

NATIVE = {"max_num_seqs": 12, "enable_prefix_caching": False, "hf_overrides": {"rope_theta": 5.0}}


def test_the_installed_version_is_one_of_the_supported():
    versions.require_vllm()


def test_everything_that_is_called_is_there():
    assert versions.broken_contract() == []


def test_what_is_missing_would_be_named(monkeypatch):
    broken = {"vllm.LLM.sing": (), "vllm.SamplingParams": ("seed", "mood"), "vllm.v9.engine.Engine": ()}
    monkeypatch.setattr(versions, "CONTRACT", broken)
    assert versions.broken_contract() == ["vllm.LLM.sing", "vllm.SamplingParams(mood=)", "vllm.v9.engine.Engine"]


def test_servers_have_what_the_engine_on_servers_uses():
    assert versions.broken_contract(routes.CONTRACT) == []


def test_vllm_understands_the_servers_command_line(tmp_path):
    """With vLLM's own parser: what it makes of it is what was meant."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    config = configuration.load(write_server_run(tmp_path, [8123], rollout={"stop": ["#"], "vllm": NATIVE}))
    line = serve.command(config, "127.0.0.1", 8123)
    assert line[1:3] == ["-m", routes.MODULE]
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(line[3:])
    wanted = {
        "model": config.model.path,
        "host": "127.0.0.1",
        "port": 8123,
        "dtype": "float32",
        "max_model_len": 16 + 24,
        "skip_tokenizer_init": False,
        "generation_config": "vllm",
        "load_format": "dummy",
        "worker_extension_cls": routes.EXTENSION,
        "enable_scale_out": True,
        "middleware": [guard.MIDDLEWARE],
        **NATIVE,
    }
    assert {name: getattr(parsed, name) for name in wanted} == wanted
    assert parsed.weight_transfer_config.backend == "srft_tcp"
    assert serve.environment(config)[guard.VARIABLE] == KEY
    assert not any(KEY in part for part in line)
