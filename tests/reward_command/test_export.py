"""`megatron-srft reward export`: the classifier against transformers' own, and what is refused before vLLM is asked."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from reward_heads import base_of, make_head
from tiny_models import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from megatron_srft import cli
from megatron_srft.config import DataConfig
from megatron_srft.hidden_reward import prompt_fingerprint, save_head
from megatron_srft.weights.folder import HfFolder, read_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    make_model("llama", folder / "model", num_hidden_layers=2)
    base = base_of(folder / "model")
    heads = {"last": make_head(base, (2,)), "two": make_head(base, (1, 2))}
    heads["rms"] = make_head(base, (2,), normalisation="rms")
    prompts = prompt_fingerprint(DataConfig(), make_tokenizer())
    for name, head in heads.items():
        save_head(replace(head, config=replace(head.config, prompt_format=prompts)), folder / name)
    return folder


def export(folder, head):
    return cli.main(
        ["reward", "export", *(str(folder / name) for name in ("model", head)), "--output", str(folder / f"{head}-out")]
    )


def test_the_folder_has_gate_and_reward_in_the_place_of_the_lm_head(folder, capsys):
    assert export(folder, "last") == 0
    assert "labels gate and reward of every token, last token excluded" in capsys.readouterr().out
    written, source = HfFolder(folder / "last-out"), HfFolder(folder / "model")
    assert set(source.shapes()) - set(written.shapes()) == {"lm_head.weight"}
    config = read_config(folder / "last-out")
    assert config["architectures"] == ["LlamaForSequenceClassification"] and config["num_labels"] == 2
    assert config["id2label"] == {"0": "gate", "1": "reward"} and config["dtype"] == "float32"
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 40, (1, 9)))
    with torch.no_grad():
        found = AutoModelForTokenClassification.from_pretrained(folder / "last-out")(ids).logits[0]
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        states = model(ids, output_hidden_states=True).hidden_states[-1][0]
    expected = states @ written.tensor("score.weight").T + written.tensor("score.bias")
    torch.testing.assert_close(found, expected)
    assert (folder / "last-out" / "tokenizer.json").is_file()


@pytest.mark.parametrize("head", ["two", "rms"])
def test_a_head_that_reads_more_than_the_last_layer_is_refused_by_the_other_way(folder, head, capsys):
    assert export(folder, head) == 2
    said = capsys.readouterr().err
    assert (
        "vLLM classifies tokens by layer 2 as it is" in said and "`megatron-srft generate --engine vllm --head`" in said
    )
    assert not (folder / f"{head}-out").exists()
    arguments = [str(folder / name) for name in ("model", head, "no.jsonl")]
    assert cli.main(["best-of-n", *arguments, "--engine", "vllm"]) == 2
    assert cli.main(["reward", "score", *arguments, "--engine", "vllm", "--output", str(folder / "s.jsonl")]) == 2
    assert capsys.readouterr().err.count("vLLM classifies tokens by layer 2 as it is") == 2


def test_an_output_that_is_there_is_left_alone(folder, capsys):
    (folder / "there").mkdir(exist_ok=True)
    status = cli.main(
        ["reward", "export", str(folder / "model"), str(folder / "last"), "--output", str(folder / "there")]
    )
    assert status == 2 and "is there already" in capsys.readouterr().err
