"""What the tests of the vLLM engine do inside their processes; one process starts as few engines as it can.

Every function returns plain values, which the tests hold against each other. vLLM's CPU build refuses heads of 8, so
the models here have heads of 32.
"""

import contextlib
import copy
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reward_heads import make_head
from runs import write_inputs
from tiny_models import make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from megatron_srft import config as configuration
from megatron_srft.advantages import to_sequences
from megatron_srft.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, SamplingConfig, VllmRolloutConfig
from megatron_srft.deadline import Deadline
from megatron_srft.rollout import Request, build_engine, collect, load_local_engine
from megatron_srft.rollout.replay import ReplayEngine
from megatron_srft.rollout.vllm import interface, worker
from megatron_srft.sample import Completion, Prompt
from megatron_srft.train import train
from megatron_srft.weights.folder import HfFolder

SIZES = {"hidden_size": 128, "intermediate_size": 96, "head_dim": 32}
ENGINE = {"kv_cache_memory_bytes": 64 << 20}
TOKENS = 24
CORRUPTED = "model.layers.1.mlp.down_proj.weight"


def prepare_process() -> None:
    """One thread, and no compiler: vLLM would otherwise compile parts of its sampler for half a minute."""
    torch.set_num_threads(1)
    torch._dynamo.config.disable = True
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"


def write_run(folder: Path, *, family: str = "qwen2", tied: bool = True, **settings: Any) -> Path:
    """Like `runs.write_inputs`, with a model that vLLM's CPU build runs, and GRPO on its completions."""
    rollout = {"kind": "vllm", "max_response_tokens": TOKENS, "vllm": ENGINE} | settings.pop("rollout", {})
    path = write_inputs(folder, objective={"kind": "grpo"}, rollout=rollout, **{"steps": 2, **settings})
    make_model(family, folder / "model", tied=tied, num_hidden_layers=2, **SIZES)
    return path


def make_prompts(count: int = 6) -> list[Prompt]:
    """Prompts of 1, 4, 7, ... characters."""
    numbers, tokenizer = np.random.default_rng(0), make_tokenizer()
    out = []
    for i in range(count):
        text = "".join(numbers.choice(list("abcdefgh0123+= "), size=1 + 3 * i))
        token_ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
        out.append(Prompt(id=f"p{i}", text=text, token_ids=token_ids, answer="1", source="test"))
    return out


def requests_for(prompts: list[Prompt], samples: int = 3) -> list[Request]:
    return [Request(prompt=p, sample=s, seed=7, step=3) for p in prompts for s in range(samples)]


def plain(completions: list[Completion]) -> list[tuple]:
    return [(c.token_ids.tolist(), c.text, c.finish_reason, c.policy_version) for c in completions]


def logprobs(completions: list[Completion]) -> list[np.ndarray]:
    return [c.rollout_logprobs for c in completions]


def reference_logprobs(model: Any, requests: list[Request], completions: list[Completion], temperature: float):
    """Log-probs of the sampled tokens under transformers' own forward of the whole sequence, in float32."""
    out = []
    for request, completion in zip(requests, completions, strict=True):
        prompt = request.prompt.token_ids
        ids = torch.from_numpy(np.concatenate([prompt, completion.token_ids]).astype(np.int64))
        with torch.no_grad():
            logits = model(ids[None]).logits[0, len(prompt) - 1 : -1].float()
        taken = (logits / temperature).log_softmax(-1).gather(-1, ids[len(prompt) :, None])
        out.append(taken[:, 0].numpy())
    return out


def largest_difference(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    return max(float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True))


def message(call, *arguments) -> str:
    """ "Type: text" of what the call raises; empty when it raises nothing."""
    try:
        call(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


# ---------------------------------------------------------------- one rank


def first_step(run: Any) -> None:
    """The lines of `train.train` that come before the first update."""
    groups = run.score(run.roll_out(run.next_prompts()))
    run.measure(to_sequences(groups), 0)


def with_fault(run: Any, fault: Any, *, checksums: bool) -> str:
    """What stops a run that has the fault (a context manager) in its first sync, before anything was updated."""
    run.sampler.synced_version, run.parity.due = None, True
    run.sampler.engine.syncs = 1
    run.sampler.engine.settings = replace(run.sampler.engine.settings, checksum_every=int(checksums))
    with fault:
        return message(first_step, run)


@contextlib.contextmanager
def weights_changed(change: Any):
    """`change` stands between the trainer's tensors and vLLM."""
    load = interface.load
    interface.load = lambda llm, weights: load(llm, change(weights))
    try:
        yield
    finally:
        interface.load = load


def corrupt(weights: Any):
    for name, tensor in weights:
        yield name, tensor * 1.5 if name == CORRUPTED else tensor


@contextlib.contextmanager
def lost_sync():
    """The tensors are taken and go nowhere."""
    load = interface.load
    interface.load = lambda llm, weights: list(weights)
    try:
        yield
    finally:
        interface.load = load


@contextlib.contextmanager
def without_packing():
    """vLLM as it is: the packed copy of a tied output layer stays the old one."""
    pack = worker._pack_again
    worker._pack_again = lambda model: None
    try:
        yield
    finally:
        worker._pack_again = pack


@contextlib.contextmanager
def rope_base(llm: Any, base: float):
    """The engine's table of sines and cosines for another rope_theta."""

    def tables(worker: Any) -> dict[int, torch.Tensor]:
        modules = worker.model_runner.get_model().modules()
        return {id(m): m for m in modules if hasattr(m, "cos_sin_cache")}

    found = list(llm.collective_rpc(tables)[0].values())
    kept = [module.cos_sin_cache.clone() for module in found]
    for module in found:
        table = module.cos_sin_cache
        frequencies = base ** (-torch.arange(0, table.shape[1], 2).float() / table.shape[1])
        angles = torch.arange(len(table)).float()[:, None] * frequencies
        table.copy_(torch.cat([angles.cos(), angles.sin()], dim=-1))
    try:
        yield
    finally:
        for module, table in zip(found, kept, strict=True):
            module.cos_sin_cache.copy_(table)


@contextlib.contextmanager
def naps(engine: Any):
    """Sleep mode, which the CPU build accepts and does not carry out; the calls, and whether the engine had weights."""
    calls: list[tuple] = []
    sleep, wake = interface.sleep, interface.wake
    interface.sleep = lambda llm: (calls.append(("sleep", engine.policy_version)), sleep(llm))
    interface.wake = lambda llm, part: (calls.append(("wake", part)), wake(llm, part))
    engine.sleeps = True
    try:
        yield calls
    finally:
        engine.sleeps = False
        interface.sleep, interface.wake = sleep, wake


def slow_sync(engine: Any, weights: Any) -> list[str]:
    """What the deadline says of a sync that waits too long for its fourth tensor; it would end the process."""
    said: list[str] = []
    end, Deadline._end = Deadline._end, lambda deadline: said.append(deadline.message())

    def late():
        for number, pair in enumerate(weights):
            if number == 3:
                time.sleep(2)
            yield pair

    settings, engine.settings = engine.settings, replace(engine.settings, sync_timeout=1.0)
    engine.update_weights(late(), 4)
    engine.settings, Deadline._end = settings, end
    return said


def alone(path: Path) -> dict[str, Any]:
    """Everything that one rank can show, with one engine, and a second one that is refused."""
    prepare_process()
    from megatron_srft.session import Session
    from megatron_srft.trainer import parallel

    config = configuration.load(path)
    groups = parallel.start(config.parallel, config.seed)
    found: dict[str, Any] = {"faults": {}}
    with Session(config, groups) as run:
        stage = run.remaining_stages()[0]
        run.begin_stage(stage)
        found |= answers(run, config)
        for name, fault in {
            "corrupted": weights_changed(corrupt),
            "lost": lost_sync(),
            "unpacked": without_packing(),
        }.items():
            move_weights(run.trainer.models)
            found["faults"][name, "checksums"] = with_fault(run, fault, checksums=True)
        for name, fault in {
            "corrupted": weights_changed(corrupt),
            "lost": lost_sync(),
            "rope": rope_base(run.sampler.engine.llm, 100.0),
        }.items():
            move_weights(run.trainer.models)
            found["faults"][name, "parity"] = with_fault(run, fault, checksums=False)
        found["faults"]["none"] = with_fault(run, contextlib.nullcontext(), checksums=True)
        run.sampler.engine.tokenizer, tokenizer = make_tokenizer(), run.sampler.engine.tokenizer
        run.sampler.engine.tokenizer.add_tokens(["unheard"])
        found["faults"]["tokenizer"] = message(run.sampler.engine._check_tokenizer)
        run.sampler.engine.tokenizer = tokenizer
        found["slow"] = slow_sync(run.sampler.engine, run.trainer.hf_weights())
        found["faults"]["missing"] = message(run.sampler.engine.update_weights, list(run.trainer.hf_weights())[1:], 9)
        found["head"] = message(run.sampler.engine.score_with, make_head(run.sampler.engine.base))
        found["refused"] = message(run.sampler.engine.generate, requests_for(make_prompts()), config.rollout)
        run.sampler.synced_version, run.parity.due, run.step, run.batches_drawn = None, True, 0, 0
        with naps(run.sampler.engine) as found["naps"]:
            train(run)
        run.sampler.engine.close()
        hf_overrides = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
        wrong = replace(config.rollout, vllm=ENGINE | {"hf_overrides": hf_overrides})
        found["faults"]["rope", "start"] = message(
            build_engine, replace(config, rollout=wrong), tokenizer, parallel.device(), groups.world
        )
        run.sampler.engine = ReplayEngine(Path(path).parent)  # for the session to close
    parallel.stop()
    return found


@torch.no_grad()
def move_weights(models: list) -> None:
    """Another policy, as after an update: every fault is looked for on weights that vLLM has not seen."""
    generator = torch.Generator().manual_seed(5)
    for model in models:
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def answers(run: Any, config: RunConfig) -> dict[str, Any]:
    """Completions of the first weights in several orders and batches, and beside transformers and the local engine."""
    run.sampler.sync()
    requests, engine = requests_for(make_prompts()), run.sampler.engine
    reference = AutoModelForCausalLM.from_pretrained(config.model.path)
    local = load_local_engine(config.model, run.tokenizer, torch.device("cpu"), 64)
    before = torch.get_rng_state()
    sampled = {
        "plain": SamplingConfig(max_response_tokens=TOKENS),
        "cut": SamplingConfig(max_response_tokens=TOKENS, top_p=0.8, top_k=30),
        "greedy": SamplingConfig(max_response_tokens=TOKENS, temperature=0.0),
    }
    found = {name: engine.generate(requests, sampling) for name, sampling in sampled.items()}
    differences = {
        name: largest_difference(logprobs(found[name]), reference_logprobs(reference, requests, found[name], 1.0))
        for name in sampled
    }
    drawn = not torch.equal(before, torch.get_rng_state())
    stop = found["greedy"][9].text[5:7]
    stopping = replace(sampled["greedy"], stop=("no such", stop))
    one_by_one = [engine.generate([request], sampled["plain"])[0] for request in requests]
    return {
        **{name: plain(completions) for name, completions in found.items()},
        "differences": differences,
        "drawn": drawn,
        "reversed": plain(engine.generate(requests[::-1], sampled["plain"])[::-1]),
        "one by one": plain(one_by_one),
        "local greedy": plain(local.generate(requests, sampled["greedy"])),
        "stopped": plain(engine.generate(requests, stopping)),
        "local stopped": plain(local.generate(requests, stopping)),
        "too long": message(engine.generate, requests, SamplingConfig(max_response_tokens=30)),
    }


# ---------------------------------------------------------------- two ranks


def pair(path: Path) -> dict[str, Any]:
    """Two tensor-parallel ranks: one engine over both, then one each."""
    prepare_process()
    from megatron_srft.session import Session
    from megatron_srft.trainer import parallel

    config = configuration.load(path)
    groups = parallel.start(config.parallel, config.seed)
    found: dict[str, Any] = {}
    prompts, sampling = make_prompts(), SamplingConfig(max_response_tokens=TOKENS)
    with Session(config, groups) as run:
        run.begin_stage(run.remaining_stages()[0])
        run.sampler.sync()
        together = collect(run.sampler.engine, prompts, [None] * 6, 3, sampling, 7, 3, groups.world)
        found["one engine"] = [plain(list(g.completions)) for g in together]
        move_weights(run.trainer.models)
        fault = weights_changed(corrupt) if groups.world.rank() == 1 else contextlib.nullcontext()
        found["corrupted on rank 1"] = with_fault(run, fault, checksums=True)
        run.sampler.synced_version, run.parity.due, run.step, run.batches_drawn = None, True, 0, 0
        train(run)
        run.sampler.engine.close()
        single = replace(config, rollout=replace(config.rollout, vllm=ENGINE))
        run.sampler.engine = build_engine(single, run.tokenizer, parallel.device(), groups.world)
        first = HfFolder(config.model.path)
        run.sampler.engine.update_weights(((name, first.tensor(name)) for name in first.shapes()), 0)
        each = collect(run.sampler.engine, prompts, [None] * 6, 3, sampling, 7, 3, groups.world)
        found["two engines"] = [plain(list(g.completions)) for g in each]
    parallel.stop()
    return found


# ---------------------------------------------------------------- families


def families(folder: Path, kinds: list[tuple[str, bool, str, dict]]) -> list[dict[str, Any]]:
    """For each (family, tied, dtype, config of the model): its weights in vLLM, one engine after the other."""
    prepare_process()
    from vllm_score_runs import as_sequences, difference, stacked

    from megatron_srft.trainer import parallel

    groups = parallel.start(ParallelConfig(), 0)
    sampling, requests, found = SamplingConfig(max_response_tokens=TOKENS), requests_for(make_prompts(), 1), []
    for family, tied, dtype, options in kinds:
        path = make_model(family, folder / family, tied=tied, num_hidden_layers=2, **SIZES | options)
        config = RunConfig(
            model=ModelConfig(path=str(path), dtype=dtype),
            data=DataConfig(max_prompt_tokens=16),
            rollout=VllmRolloutConfig(max_response_tokens=TOKENS, vllm=ENGINE),
        )
        engine = build_engine(config, make_tokenizer(), torch.device("cpu"), groups.world, scored=True)
        reference = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        weights = dict(reference.named_parameters())
        engine.update_weights(weights.items(), 0)  # with checksums
        name, tensor = next(pair for pair in weights.items() if pair[0].endswith("1.self_attn.v_proj.weight"))
        changed = weights | {name: tensor.detach().clone()}
        changed[name][5, 7] *= 1.01
        completions = engine.generate(requests, sampling)
        expected = reference_logprobs(reference, requests, completions, 1.0)
        head = make_head(engine.base, normalisation="rms")
        engine.score_with(head)
        scores = [c.hidden_score for c in engine.generate(requests, sampling)]
        wide = copy.deepcopy(reference).double()
        sequences = as_sequences(requests, completions)
        found.append(
            {
                "scores": difference(scores, [stacked(wide, head, sequence) for sequence in sequences]),
                "scored": sum(score is not None for score in scores),
                "same": engine.unlike(weights.items()),
                "changed": engine.unlike(changed.items()),
                "difference": largest_difference(logprobs(completions), expected),
            }
        )
        engine.close()
    parallel.stop()
    return found
