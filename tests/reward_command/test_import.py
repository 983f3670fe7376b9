"""`megatron-srft reward import`: a state dict of the released code scores as there, on transformers' states."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from megatron_srft import cli
from megatron_srft.hidden_reward import load_head

PROMPT, RESPONSES = "3+4=", ["7", "5+8", "71234567"]
WIDTH, VOCABULARY = 32, 99


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("import")
    make_model("qwen2", folder / "model", num_hidden_layers=2)
    row = {"id": "a", "prompt": PROMPT, "responses": RESPONSES, "correct": [True, False, False]}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def publish(folder: Path, inputs: int, rows: int = 2) -> torch.nn.Linear:
    torch.manual_seed(inputs + rows)
    linear = torch.nn.Linear(inputs, rows)
    name = "fused_layer" if rows == 2 else "reward_layer"
    torch.save({f"{name}.{key}": value for key, value in linear.state_dict().items()}, folder / "head.pt")
    return linear.double()


@torch.no_grad()
def released_scores(folder: Path, linear: torch.nn.Linear, layers: list[int], how: str) -> list[float]:
    """As the released code has it: concatenate the layers' states, or take the logits; gate, reward, weighted mean."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64), make_tokenizer()
    prompt, scores = tokenizer(PROMPT)["input_ids"], []
    for text in RESPONSES:
        ids = torch.tensor([[*prompt, *tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        output = model(ids, output_hidden_states=True)
        states = [model.model.norm(h) if how == "apply_norm" else h for h in output.hidden_states]
        features = output.logits if how == "logits" else torch.cat([states[layer] for layer in layers], dim=-1)
        values = linear(features[0, len(prompt) :])
        gate = values[:, 0].sigmoid() if values.shape[1] == 2 else torch.ones(len(values))
        scores.append(float((gate * values[:, -1]).sum() / gate.sum()))
    return scores


@pytest.mark.parametrize(
    ("name", "inputs", "rows", "options", "layers", "how"),
    [
        ("all", 3 * WIDTH, 2, "", [0, 1, 2], ""),
        ("some", 2 * WIDTH, 1, "--layers 2 0", [2, 0], ""),
        ("normed", 3 * WIDTH, 2, "--apply-norm", [0, 1, 2], "apply_norm"),
        ("logits", VOCABULARY, 2, "--logits", [2], "logits"),
    ],
)
def test_an_imported_head_scores_as_the_released_code(folder, name, inputs, rows, options, layers, how, capsys):
    linear = publish(folder, inputs, rows)
    with contextlib.chdir(folder):
        assert cli.main(f"reward import model head.pt --output {name} {options}".split()) == 0
        assert cli.main(f"reward score model {name} rows.jsonl --output {name}.jsonl".split()) == 0
    head = load_head(folder / name)
    assert head.layers == tuple(sorted(layers)) and head.config.gate == (rows == 2)
    assert "last token included" in capsys.readouterr().out
    found = json.loads((folder / f"{name}.jsonl").read_text())["scores"]["swift"]
    np.testing.assert_allclose(found, released_scores(folder, linear, layers, how), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("model head.pt --output model", "is there already"),
        ("model missing.pt --output new", "missing.pt"),
        ("model head.pt --output new", "name the layers and the base"),
        ("model head.pt --output new --layers 3", "within 0"),
        ("model head.pt --output new --logits --layers 1", "leave them away"),
        ("model rows.jsonl --output new", "safe to read"),
        ("nowhere head.pt --output new", "does not exist"),
    ],
)
def test_what_does_not_fit_is_one_sentence(folder, arguments, words, capsys):
    publish(folder, WIDTH)
    with contextlib.chdir(folder):
        assert cli.main(["reward", "import", *arguments.split()]) == 2
    assert words in capsys.readouterr().err
    assert not (folder / "new").exists()
