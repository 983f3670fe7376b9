"""What the tests of scores in the vLLM engine do inside their processes.

Every function returns plain values. The engines have so few blocks for keys and values that requests are preempted and
computed again. Prompts are computed in chunks where answers are greedy: vLLM's CPU build fails on a chunk of a request
that has a seed ("CPU Generator does not use offset").
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reward_heads import make_head
from tiny_models import make_model, make_tokenizer
from transformers import AutoModelForCausalLM
from vllm_runs import SIZES, message, move_weights, plain, prepare_process, requests_for

from megatron_srft import config as configuration
from megatron_srft.config import RunConfig, SamplingConfig
from megatron_srft.hidden_reward import BaseModel, RewardHead
from megatron_srft.rollout import Request, build_engine
from megatron_srft.rollout.vllm.states import Rows, StateReader
from megatron_srft.sample import Completion, Prompt, TrainingSequence

TOKENS = 40
LAYERS = 3
BLOCK = 32
CACHE_BYTES = 12 * 2 * LAYERS * BLOCK * 2 * 32 * 4
"""Of 12 blocks: keys and values of 2 heads of 32 float32."""

ENGINE = {
    "kv_cache_memory_bytes": CACHE_BYTES,
    "block_size": BLOCK,
    "max_num_batched_tokens": 1024,
    "max_num_seqs": 16,
    "enforce_eager": True,
}
SAMPLING = SamplingConfig(max_response_tokens=TOKENS)


def write_model(family: str, folder: Path) -> Path:
    return make_model(family, folder, tied=family == "qwen2", num_hidden_layers=LAYERS, **SIZES)


def run_config(folder: Path | str, **engine: Any) -> RunConfig:
    return configuration.from_dict(
        {
            "model": {"path": str(folder)},
            "parallel": {"distributed_optimizer": False, "tensor": engine.get("tensor_parallel_size", 1)},
            "batch": {"tokens_per_microbatch": 1000},
            "data": {"max_prompt_tokens": 80},
            "rollout": {"kind": "vllm", "max_response_tokens": TOKENS, "vllm": ENGINE | engine},
        }
    ).resolved()


def make_heads(base: BaseModel) -> dict[str, RewardHead]:
    return {
        "all layers": make_head(base),
        "some layers, rms": make_head(base, (0, 2), 1, normalisation="rms"),
        "last layer, no gate": make_head(base, (base.num_layers,), 2, gate=False),
    }


def make_prompts() -> list[Prompt]:
    """Of 1, 40 and 70 tokens: less than a block, and prefixes of more than one."""
    numbers, tokenizer, out = np.random.default_rng(3), make_tokenizer(), []
    for length in (1, 40, 70):
        text = "".join(numbers.choice(list("abcdefgh0123+= "), size=length))
        token_ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
        out.append(Prompt(id=f"p{length}", text=text, token_ids=token_ids, answer="1", source="test"))
    return out


def as_sequences(requests: list[Request], completions: list[Completion]) -> list[TrainingSequence]:
    return [
        TrainingSequence(
            token_ids=np.concatenate([request.prompt.token_ids, completion.token_ids]),
            prompt_length=len(request.prompt.token_ids),
            is_demonstration=False,
            advantages=np.zeros(len(completion.token_ids), np.float32),
            correct=False,
            group=0,
        )
        for request, completion in zip(requests, completions, strict=True)
    ]


@torch.no_grad()
def stacked(model: Any, head: RewardHead, sequence: TrainingSequence) -> float | None:
    """The head's score of the states that transformers stacks, in float64."""
    ids = torch.from_numpy(sequence.token_ids.astype(np.int64))[None]
    states = torch.stack([state[0] for state in model(ids, output_hidden_states=True).hidden_states])
    states = states[list(head.layers), sequence.prompt_length : -1]
    if head.config.normalisation == "rms":
        states = states / (states.square().mean(dim=-1, keepdim=True) + head.config.epsilon).sqrt()
    gate, reward = torch.einsum("ltd,lgd->gt", states, head.weight.double()) + head.bias.double()[:, None]
    return float((gate.sigmoid() * reward).sum() / gate.sigmoid().sum()) if len(gate) else None


def difference(one: list[float | None], other: list[float | None]) -> float:
    """The largest; infinite where only one of both is None."""
    return max(
        0.0 if a is None and b is None else float("inf") if None in (a, b) else abs(a - b)
        for a, b in zip(one, other, strict=True)
    )


def scored(folder: str, layout: dict[str, Any], other_engines: bool = False) -> dict[str, Any]:
    """Scores of every head, beside those of the trainer and of transformers, before and after an update."""
    from megatron_srft.trainer import parallel
    from megatron_srft.trainer.trainer import Trainer

    prepare_process()
    config = run_config(folder, **layout)
    groups = parallel.start(config.parallel, seed=1)
    trainer = Trainer(config, groups)
    engine = build_engine(config, make_tokenizer(), parallel.device(), groups.world, scored=True)
    requests, found = requests_for(make_prompts(), 8), {"differences": {}, "scores": {}, "preempted": 0}
    count_preemptions(engine.llm, found)
    heads = make_heads(trainer.base_model())
    engine.update_weights(trainer.hf_weights(), 0)
    without = engine.generate(requests, SAMPLING)
    found["without"] = [c.hidden_score for c in without]
    for version in range(2):
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
        reference.load_state_dict({n: t.double() for n, t in trainer.hf_weights()}, strict=False)
        reference.tie_weights()
        for name, head in heads.items():
            engine.score_with(head)
            completions = engine.generate(requests, SAMPLING)
            found["unchanged"] = found.get("unchanged", True) and (version or plain(completions) == plain(without))
            scores = [c.hidden_score for c in completions]
            sequences = as_sequences(requests, completions)
            trainer.reward_head = head
            measured = [stats.hidden_score for stats in trainer.measure(sequences)]
            expected = [stacked(reference, head, sequence) for sequence in sequences]
            found["scores"][name, version] = scores
            found["differences"][name, version] = difference(scores, measured), difference(scores, expected)
        if version == 0:
            move_weights(trainer.models)
            engine.update_weights(trainer.hf_weights(), 1)
    found["chunks"] = in_chunks(engine, reference, requests, heads["all layers"])
    found["lengths"] = [len(c.token_ids) for c in without]
    one = engine.generate(requests, SamplingConfig(max_response_tokens=1))
    found["one token"] = [c.hidden_score for c in one]
    found["included"] = message(engine.score_with, make_head(trainer.base_model(), last_token="included"))
    found["other model"] = message(engine.score_with, make_head())
    engine.score_with(heads["all layers"])
    found["mixed up"] = mixed_up(engine, requests)
    found |= faults(engine, requests, heads["all layers"])
    engine.close()
    if other_engines:
        found["compiled"] = compiled(folder)
    parallel.stop()
    return found


def in_chunks(engine: Any, reference: Any, requests: list[Request], head: RewardHead) -> tuple[int, float]:
    """Of greedy answers whose prompts are computed 16 tokens at a time: the most in one pass, and the difference."""
    engine.score_with(head)
    engine.llm.reset_prefix_cache()
    settings = engine.llm.llm_engine.engine_core.engine_core.scheduler.scheduler_config
    settings.long_prefill_token_threshold = 16
    (reader,) = engine.llm.collective_rpc(lambda worker: worker.srft_reader)
    counts, expect = [], reader.expect
    reader.expect = lambda rows: (counts.extend(rows.counts), expect(rows))
    completions = engine.generate(requests, SamplingConfig(max_response_tokens=TOKENS, temperature=0.0))
    settings.long_prefill_token_threshold = 0
    expected = [stacked(reference, head, sequence) for sequence in as_sequences(requests, completions)]
    return max(counts), difference([c.hidden_score for c in completions], expected)


def mixed_up(engine: Any, requests: list[Request]) -> str:
    """What is said when a pass's rows are taken for those of other requests."""
    (reader,) = engine.llm.collective_rpc(lambda worker: worker.srft_reader)
    expect = reader.expect
    reader.expect = lambda rows: expect(Rows(rows.requests[::-1], rows.counts[::-1]))
    said = message(engine.generate, requests, SAMPLING)
    reader.expect = expect
    return said


def faults(engine: Any, requests: list[Request], head: RewardHead) -> dict[str, str]:
    """What is said when a layer is not read, when the buffers are left alone, and when others load over them."""
    said = {}
    for name, fault in {"silent": unmark, "untouched": detach, "overwritten": overwrite}.items():
        engine.score_with(head)
        (reader,) = engine.llm.collective_rpc(lambda worker: worker.srft_reader)
        fault(reader)
        said[name] = message(engine.generate, requests, SAMPLING)
    return said


def unmark(reader: StateReader) -> None:
    reader.sums.marks[2] = 0


def detach(reader: StateReader) -> None:
    reader.sums = copy.deepcopy(reader.sums)


def overwrite(reader: StateReader) -> None:
    reader.sums.weight.zero_()


def count_preemptions(llm: Any, found: dict[str, Any]) -> None:
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    preempt = scheduler._preempt_request

    def counted(*arguments, **named):
        found["preempted"] += 1
        return preempt(*arguments, **named)

    scheduler._preempt_request = counted


def compiled(folder: str) -> dict[str, Any]:
    """The same with a compiled model, before and after an update."""
    from megatron_srft.trainer import parallel

    torch._dynamo.config.disable = False
    found, requests = {"differences": []}, requests_for(make_prompts(), 4)
    engine = build_engine(run_config(folder, enforce_eager=False), make_tokenizer(), parallel.device(), scored=True)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    for version in range(2):
        engine.update_weights(((n, p.detach().float()) for n, p in reference.named_parameters()), version)
        for head in make_heads(engine.base).values():
            engine.score_with(head)
            completions = engine.generate(requests, SAMPLING)
            expected = [stacked(reference, head, sequence) for sequence in as_sequences(requests, completions)]
            found["differences"].append(difference([c.hidden_score for c in completions], expected))
        move_weights([reference])
    found |= faults(engine, requests, make_head(engine.base))
    engine.close()
    return found
