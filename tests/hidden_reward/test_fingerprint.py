"""Fingerprints of weights and prompts: the same for the same, and another for anything else."""

import dataclasses
import hashlib

import pytest
import torch
from reward_heads import TINY, make_head, other
from tiny_models import make_model, make_tokenizer

from megatron_srft.config import DataConfig
from megatron_srft.hidden_reward import WeightsWatch, head_fingerprint, prompt_fingerprint, weights_fingerprint
from megatron_srft.weights.folder import HfFolder

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.arange(4, dtype=torch.bfloat16),
    "c": torch.tensor(1.5),
}


def test_the_hash_is_of_names_types_shapes_and_bytes():
    parts = []
    for header, content in (
        (b'["a", "float32", [2, 3]]\n', TENSORS["a"].numpy().tobytes()),
        (b'["b", "bfloat16", [4]]\n', TENSORS["b"].view(torch.int16).numpy().tobytes()),
        (b'["c", "float32", []]\n', TENSORS["c"].numpy().tobytes()),
    ):
        parts.append(hashlib.sha256(header + content).digest())
    assert weights_fingerprint(TENSORS.items()) == hashlib.sha256(b"".join(sorted(parts))).hexdigest()


def test_order_and_strides_do_not_matter():
    apart = torch.zeros(3, 2)
    apart.t().copy_(TENSORS["a"])
    assert weights_fingerprint(reversed(TENSORS.items())) == weights_fingerprint(TENSORS.items())
    assert weights_fingerprint([*TENSORS.items()][1:] + [("a", apart.t())]) == weights_fingerprint(TENSORS.items())


@pytest.mark.parametrize(
    "change",
    [
        {"a": TENSORS["a"].reshape(3, 2)},
        {"a": TENSORS["a"].double()},
        {"a": -TENSORS["a"]},
        {"b": TENSORS["b"].view(torch.float16)},
        {"d": TENSORS["c"]},
    ],
)
def test_anything_else_is_another_model(change):
    assert weights_fingerprint((TENSORS | change).items()) != weights_fingerprint(TENSORS.items())


def test_models_of_two_seeds_differ(tmp_path):
    def found(seed):
        folder = HfFolder(make_model("llama", tmp_path / str(seed), seed=seed, tokenizer=False))
        return weights_fingerprint((name, folder.tensor(name)) for name in folder.shapes())

    assert found(0) != found(1)


def test_prompts_of_another_form_have_another_fingerprint():
    tokenizer, config = make_tokenizer(), DataConfig()
    found = [prompt_fingerprint(config, tokenizer)]
    assert found[0] == prompt_fingerprint(DataConfig(max_prompt_tokens=7), make_tokenizer())
    for change in ({"prompt_template": "{prompt}\n"}, {"system_prompt": "s"}, {"generation_prefix": "<think>"}):
        found.append(prompt_fingerprint(dataclasses.replace(config, **change), tokenizer))
    tokenizer.chat_template = "{{ messages[0].content }}"
    found.append(prompt_fingerprint(config, tokenizer))
    tokenizer.chat_template = "{{ messages[0].content }}\n"
    found.append(prompt_fingerprint(config, tokenizer))
    assert len(set(found)) == len(found)
    assert prompt_fingerprint(DataConfig(chat_template="never"), tokenizer) == found[0]
    tokenizer.add_tokens(["new"])
    assert prompt_fingerprint(DataConfig(chat_template="never"), tokenizer) != found[0]


def test_weights_are_hashed_while_they_pass():
    weights = {"b": torch.arange(3.0), "a": torch.ones(2, 2, dtype=torch.bfloat16)}
    watch = WeightsWatch()
    assert [name for name, _ in watch.passing(weights.items())] == ["b", "a"]
    assert watch.fingerprint() == weights_fingerprint(weights.items())


def test_a_head_is_known_by_what_its_scores_depend_on():
    own = head_fingerprint(make_head())
    named = dataclasses.replace(make_head(training={"epoch": 3}, base=other(name="elsewhere")), source="a copy")
    assert head_fingerprint(named) == own
    others = [
        make_head(seed=1),
        make_head(base=other(TINY, fingerprint="e" * 64)),
        make_head(normalisation="rms"),
        make_head(last_token="included"),
    ]
    assert own not in map(head_fingerprint, others)
