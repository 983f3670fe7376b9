"""The local engine against transformers: its generate(), and its logits on whole sequences."""

import gc
import weakref

import numpy as np
import pytest
import torch
from tiny_models import make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from megatron_srft.config import ModelConfig, RunConfig, SamplingConfig
from megatron_srft.rollout import Request, build_engine, load_local_engine, load_tokenizer
from megatron_srft.rollout.engine import RolloutError
from megatron_srft.rollout.local import Decoding, prefill_chunks

CPU = torch.device("cpu")
ENDS = list(range(1, 97, 8))
"""End tokens of these tests: random models would hardly ever hit a single one."""


def make_engine(folder, rows=64, ends=None):
    engine = load_local_engine(ModelConfig(path=str(folder)), make_tokenizer(), CPU, rows)
    if ends:
        engine.end_token_ids = frozenset(ends)
    return engine


def one_each(prompts, samples=1):
    return [Request(prompt=p, sample=s, seed=7, step=3) for p in prompts for s in range(samples)]


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama3", "mistral"])
@pytest.mark.parametrize("rows", [5, 64])
def test_greedy_is_generate_token_for_token(folders, prompts, family, rows):
    reference = AutoModelForCausalLM.from_pretrained(folders[family])
    reference.generation_config.eos_token_id = ENDS
    sampling = SamplingConfig(temperature=0.0, max_response_tokens=24)
    completions = make_engine(folders[family], rows, ENDS).generate(one_each(prompts), sampling)
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.from_numpy(prompt.token_ids.astype(np.int64))[None]
        out = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        assert completion.token_ids.tolist() == out[0, ids.shape[1] :].tolist(), prompt.id
    assert {c.finish_reason for c in completions} == {"stop", "length"}


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
@pytest.mark.parametrize("options", [dict(), dict(temperature=0.7, top_k=20, top_p=0.9), dict(temperature=0.0)])
def test_logprobs_are_those_of_the_whole_sequence(folders, prompts, family, options):
    reference = AutoModelForCausalLM.from_pretrained(folders[family])
    sampling = SamplingConfig(max_response_tokens=20, **options)
    completions = make_engine(folders[family], 7, ENDS).generate(one_each(prompts), sampling)
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt.token_ids, completion.token_ids]).astype(np.int64))
        with torch.no_grad():
            logits = reference(ids[None]).logits[0, len(prompt.token_ids) - 1 : -1]
        expected = (logits / (sampling.temperature or 1)).log_softmax(-1)
        expected = expected[torch.arange(len(logits)), ids[len(prompt.token_ids) :]]
        np.testing.assert_allclose(completion.rollout_logprobs, expected.numpy(), atol=1e-5)
        assert completion.rollout_logprobs.dtype == np.float32


@pytest.mark.parametrize("rows", [1, 3, 10])
def test_the_number_of_rows_changes_nothing(folders, prompts, rows):
    sampling = SamplingConfig(max_response_tokens=16)
    wide = make_engine(folders["qwen2"], 64, ENDS).generate(one_each(prompts, 3), sampling)
    narrow = make_engine(folders["qwen2"], rows, ENDS).generate(one_each(prompts, 3), sampling)
    for a, b in zip(wide, narrow, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        np.testing.assert_allclose(a.rollout_logprobs, b.rollout_logprobs, atol=1e-5)
    assert len({tuple(c.token_ids) for c in wide[-3:]}) == 3, "samples of one prompt differ"


def test_end_tokens_close_a_completion_and_stay_out_of_its_text(folders, prompts):
    engine = make_engine(folders["qwen2"], 8, ENDS)
    completions = engine.generate(one_each(prompts, 2), SamplingConfig(max_response_tokens=16))
    for completion in completions:
        *body, last = completion.token_ids.tolist()
        assert not set(body) & set(ENDS)
        assert (completion.finish_reason == "stop") == (last in ENDS)
        assert completion.finish_reason == "stop" or len(completion.token_ids) == 16
        assert completion.text == engine.tokenizer.decode(completion.token_ids, skip_special_tokens=True)


def test_a_stop_string_ends_the_text(folders, prompts):
    engine = make_engine(folders["llama3"])
    free = engine.generate(one_each(prompts), SamplingConfig(max_response_tokens=30))
    stop = free[4].text[6:9]
    stopped = engine.generate(one_each(prompts), SamplingConfig(max_response_tokens=30, stop=("no such", stop)))
    assert stopped[4].text == free[4].text[: free[4].text.index(stop) + 3]
    assert stopped[4].finish_reason == "stop"
    for a, b in zip(free, stopped, strict=True):
        assert a.token_ids[: len(b.token_ids)].tolist() == b.token_ids.tolist()
        assert (stop in a.text) == (len(b.token_ids) < len(a.token_ids))


def test_each_prompt_is_run_once_for_all_its_samples(folders, prompts):
    engine, lengths = make_engine(folders["qwen2"]), []

    def note(module, arguments, options):
        if options["input_ids"].shape[1] > 1:
            lengths.append(len(options["input_ids"]))

    engine.model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    engine.generate(one_each(prompts[1:], 4), SamplingConfig(max_response_tokens=4))
    assert sum(lengths) == len(prompts) - 1


def test_a_cache_that_grows_and_gives_up_rows_changes_nothing(folders, prompts, monkeypatch):
    sampling = SamplingConfig(max_response_tokens=150)
    ends = [1, 50, 51]
    roomy = make_engine(folders["qwen3"], 5, ends).generate(one_each(prompts), sampling)
    monkeypatch.setattr("megatron_srft.rollout.local.FIRST_SLOTS", 2)
    tight = make_engine(folders["qwen3"], 5, ends).generate(one_each(prompts), sampling)
    assert [c.token_ids.tolist() for c in roomy] == [c.token_ids.tolist() for c in tight]
    assert max(len(c.token_ids) for c in roomy) > 100


def test_the_cache_is_freed_without_the_garbage_collector(folders, prompts):
    decoding = Decoding(make_engine(folders["qwen2"]), one_each(prompts), SamplingConfig(max_response_tokens=3))
    gc.disable()
    try:
        with torch.inference_mode():
            decoding.run()
        keys = weakref.ref(decoding.cache.layers[0].keys)
        assert keys() is not None
        del decoding
        assert keys() is None
    finally:
        gc.enable()


def test_prefills_hold_every_group_within_the_budget(monkeypatch):
    monkeypatch.setattr("megatron_srft.rollout.local.PREFILL_TOKENS", 20)
    lengths = np.array([1, 6, 11, 3, 3, 31])
    chunks = prefill_chunks([[0], [1], [2], [3, 4], [5]], lengths)
    assert chunks == [[[5]], [[2], [1]], [[3, 4]]]


def test_new_weights_are_used_and_counted(folders, prompts):
    config = RunConfig(model=ModelConfig(path=str(folders["qwen2"])))
    source = AutoModelForCausalLM.from_pretrained(folders["qwen2"])
    engine, sampling = build_engine(config, make_tokenizer(), CPU), SamplingConfig(max_response_tokens=12)
    engine.update_weights(source.state_dict().items(), 1)
    first = engine.generate(one_each(prompts), sampling)
    loaded = make_engine(folders["qwen2"]).generate(one_each(prompts), sampling)
    assert [c.token_ids.tolist() for c in first] == [c.token_ids.tolist() for c in loaded]
    assert {c.policy_version for c in first} == {1}
    other = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in source.named_parameters()}
    assert "lm_head.weight" not in other, "tied: the embedding alone must do"
    engine.update_weights(other.items(), 2)
    second = engine.generate(one_each(prompts), sampling)
    assert {c.policy_version for c in second} == {2}
    assert all(a.token_ids.tolist() != b.token_ids.tolist() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {"model.layers.9.mlp.up_proj.weight": torch.zeros(1)}, "layers.9.mlp.up_proj.weight' does not"),
        (lambda w: {k: v for k, v in w.items() if "layers.2.mlp.up" not in k}, "1 weights .*layers.2.mlp.up_proj"),
        (lambda w: w | {"model.norm.weight": torch.ones(31)}, r"norm.weight' has shape \(31,\), .* needs \(32,\)"),
    ],
)
def test_wrong_weights_are_refused(folders, prompts, change, message):
    engine = make_engine(folders["llama3"])
    weights = change(dict(engine.model.state_dict()))
    with pytest.raises(ValueError, match=message):
        engine.update_weights(weights.items(), 1)
    with pytest.raises(AssertionError):
        engine.generate(one_each(prompts), SamplingConfig())


def test_requests_beyond_the_models_positions_are_refused(folders, prompts):
    engine = make_engine(folders["qwen2"])
    with pytest.raises(ValueError, match="p11 has 23 tokens.*512 positions.*rollout.max_response_tokens"):
        engine.generate(one_each(prompts[11:]), SamplingConfig(max_response_tokens=490))
    assert len(engine.generate(one_each(prompts[11:]), SamplingConfig(max_response_tokens=489))) == 1


def test_bfloat16_weights_give_float32_logprobs(folders, prompts):
    config = ModelConfig(path=str(folders["qwen3"]), dtype="bfloat16")
    engine = load_local_engine(config, make_tokenizer(), CPU, 8)
    assert engine.model.dtype == torch.bfloat16
    for completion in engine.generate(one_each(prompts), SamplingConfig(max_response_tokens=6)):
        assert completion.rollout_logprobs.dtype == np.float32
        assert np.isfinite(completion.rollout_logprobs).all()


@pytest.mark.parametrize("options", [dict(), dict(top_k=5), dict(temperature=0.0)])
def test_weights_that_are_not_finite_end_the_run_with_a_sentence(folders, prompts, options):
    engine = make_engine(folders["qwen2"])
    engine.model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(RolloutError, match="12 of 12 completions have log-probs that are not finite"):
        engine.generate(one_each(prompts), SamplingConfig(max_response_tokens=3, **options))


def test_a_tokenizer_that_transformers_reads_otherwise_than_its_file_is_told(tmp_path, caplog):
    """With a config of Qwen2's, transformers cuts text into words as Qwen2 does, and loses this vocabulary's spaces."""
    for family in ("qwen2", "mistral"):
        load_tokenizer(ModelConfig(path=str(make_model(family, tmp_path / family, num_hidden_layers=1))))
    (told,) = [record.getMessage() for record in caplog.records if "transformers reads" in record.getMessage()]
    assert str(tmp_path / "qwen2" / "tokenizer.json") in told
    assert "(14 instead of 19; in text again: 'Sox^2+12y=345.')" in told


def test_a_damaged_tokenizer_is_named(folders, tmp_path):
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folders["qwen2"] / name).read_bytes())
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="its tokenizer cannot be read .*copy its files anew"):
        load_tokenizer(ModelConfig(path=str(tmp_path)))


def test_weights_that_differ_are_named(folders):
    engine = make_engine(folders["llama3"])
    weights = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    assert engine.unlike(weights.items()) == []
    weights["model.layers.2.mlp.up_proj.weight"][3, 5] += 1e-3
    assert engine.unlike(weights.items()) == ["model.layers.2.mlp.up_proj.weight"]
