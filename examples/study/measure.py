"""Figures of a model folder that a run does not log for every method: entropy on own samples and on demonstrations.

    own samples       mean over their tokens of the entropy of the distribution that the token was drawn from, nats
    demonstrations    the same over the tokens of the expert's responses, given what stands before them

Plain transformers, so that SFT, GRPO and the base model are measured by the same rule, on the same prompts.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

DEMONSTRATIONS = 200
"""Of train.jsonl, the first so many."""
SAMPLES = 2
"""Completions per held-out problem, at temperature 1."""


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@torch.inference_mode()
def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int
) -> list[list[int]]:
    """One completion's tokens per prompt, up to and with the end token."""
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False)
    out = model.generate(**inputs, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=max_new_tokens)
    end, responses = tokenizer.eos_token_id, []
    for row in out[:, inputs.input_ids.shape[1] :].tolist():
        responses.append(row[: row.index(end) + 1] if end in row else row)
    return responses


@torch.inference_mode()
def entropy_and_nll(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], responses: Sequence[list[int]]
) -> tuple[float, float]:
    """Means over all response tokens, in nats."""
    starts = [tokenizer(prompt).input_ids for prompt in prompts]
    longest = max(len(start) + len(response) for start, response in zip(starts, responses, strict=True))
    ids = torch.full((len(prompts), longest), tokenizer.pad_token_id)
    counted = torch.zeros_like(ids, dtype=torch.bool)
    for i, (start, response) in enumerate(zip(starts, responses, strict=True)):
        end = len(start) + len(response)
        ids[i, :end] = torch.tensor(start + response)
        counted[i, len(start) : end] = True
    # Padding stands on the right, where a causal model's real tokens do not see it.
    logprobs = model(input_ids=ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    counted = counted[:, 1:]
    entropy = -(logprobs.exp() * logprobs).sum(-1)[counted]
    nll = -logprobs.gather(-1, ids[:, 1:, None]).squeeze(-1)[counted]
    return entropy.mean().item(), nll.mean().item()


def measure(model_folder: Path, data: Path, max_new_tokens: int, seed: int = 0) -> dict[str, float]:
    """sampled/<file>, length/<file>, entropy/<file> of own samples, and entropy/demonstrations, nll/demonstrations."""
    torch.set_num_threads(1)  # two for so small a model wait for each other, ten times as long on a busy machine
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    figures = {}
    for name in ("heldout", "harder", "ood"):
        problems = rows(data / f"{name}.jsonl") * SAMPLES
        prompts = [problem["prompt"] for problem in problems]
        responses = sample(model, tokenizer, prompts, max_new_tokens)
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        right = [t.rpartition("#")[2] == p["answer"] for t, p in zip(texts, problems, strict=True)]
        figures[f"sampled/{name}"] = sum(right) / len(right)
        figures[f"length/{name}"] = sum(map(len, responses)) / len(responses)
        figures[f"entropy/{name}"] = entropy_and_nll(model, tokenizer, prompts, responses)[0]
    shown = [row for row in rows(data / "train.jsonl") if "demonstration" in row][:DEMONSTRATIONS]
    texts = [tokenizer(row["demonstration"]).input_ids + [tokenizer.eos_token_id] for row in shown]
    entropy, nll = entropy_and_nll(model, tokenizer, [row["prompt"] for row in shown], texts)
    return figures | {"entropy/demonstrations": entropy, "nll/demonstrations": nll}
