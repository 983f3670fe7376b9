"""Make the base model of the arithmetic example: a character tokenizer and a small Qwen2, pre-trained for a minute.

No weights are downloaded. The corpus has two kinds of documents:

    hasty    7+5-3=#4                 a guess without any work
    worked   7+5-3=7+5=2;2-3=9#9      every step written out

Most worked documents teach how to go on, but not whether to begin: their first character is learned under the
condition that it is not '#'. So the model ends up owning every single step, while left alone it blurts out a guess: 1
in 10 right, which is chance. That is the gap that fine-tuning has to close.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from make_data import HERE, MODULUS, random_problem, worked_solution
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
VOCABULARY = [PAD, EOS, UNK, *"0123456789+-=;#"]
SIZES = {"tiny": (3, 96, 256), "small": (6, 256, 688), "medium": (12, 512, 1376)}
"""Layers, hidden size and MLP size. The steps below are tuned for tiny."""
LENGTHS = (2, 3, 4, 5, 6, 7)
"""Operands of the corpus' chains, equally likely. The base model has met the lengths of ood.jsonl; training has not."""
LESSONS = (((2,), 3, 0.99), (LENGTHS, 1, 0.99))
"""(Operands, multiple of the batch size, share of right next tokens that ends the lesson). Single steps come first: in
long chains alone they take many times longer to learn, with some seeds too long."""
CHECK_EVERY, WARMUP, COOL_DOWN = 50, 50, 200
"""Steps between two checks of a lesson, and of the learning rate's rise and fall."""
ROPE_THETA = 100.0
"""Texts are 60 characters at most; the usual 10,000 would leave most rotary dimensions without use."""
IGNORE = -100
POOL_BATCHES = 16
"""Documents are drawn for this many batches at once and sorted by length, so that little padding is computed."""


class Batch(NamedTuple):
    """Documents of a step, all [documents, tokens]."""

    ids: torch.Tensor
    targets: torch.Tensor
    """The ids, or IGNORE where nothing is to be learned."""
    begun: torch.Tensor
    """bool; where the target is learned under the condition that it is not '#'."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNK)


def make_model(size: str, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """A randomly initialised Qwen2; its heads divide over 2 tensor-parallel ranks."""
    layers, hidden, intermediate = SIZES[size]
    special = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=False,
        **special,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, **special)
    return model


def document(
    generator: random.Random, lengths: tuple[int, ...], hasty_share: float, begin_share: float
) -> tuple[str, str, bool]:
    """Draw a prompt, its response, and whether the response's first character is learned as it is."""
    prompt = random_problem(generator, generator.choice(lengths))
    if generator.random() < hasty_share:
        return prompt, f"#{generator.randrange(MODULUS)}", True
    return prompt, worked_solution(prompt), generator.random() < begin_share


def collate(documents: list[tuple[str, str, bool]], tokenizer: PreTrainedTokenizerFast) -> Batch:
    """Pad documents on the right; only responses and their end tokens are targets."""
    ids, targets, begun = [], [], []
    longest = max(len(prompt + response) for prompt, response, _ in documents) + 1
    for prompt, response, begins in documents:
        tokens = tokenizer.convert_tokens_to_ids([*prompt, *response, EOS])
        room = longest - len(tokens)
        ids.append(tokens + [tokenizer.pad_token_id] * room)
        targets.append([IGNORE] * len(prompt) + tokens[len(prompt) :] + [IGNORE] * room)
        begun.append([not begins and position == len(prompt) for position in range(longest)])
    return Batch(torch.tensor(ids), torch.tensor(targets), torch.tensor(begun))


def batches(
    generator: random.Random,
    tokenizer: PreTrainedTokenizerFast,
    size: int,
    lengths: tuple[int, ...],
    hasty_share: float,
    begin_share: float,
) -> Iterator[Batch]:
    """Yield batches of `size` documents on average, of similar length, each with about the same number of tokens."""
    while True:
        pool = [document(generator, lengths, hasty_share, begin_share) for _ in range(size * POOL_BATCHES)]
        pool.sort(key=lambda document: len(document[0] + document[1]))
        tokens_per_batch = sum(len(prompt + response) for prompt, response, _ in pool) / POOL_BATCHES
        cut: list[list] = [[] for _ in range(POOL_BATCHES)]
        tokens = 0
        for prompt, response, begins in pool:
            cut[min(int(tokens / tokens_per_batch), POOL_BATCHES - 1)].append((prompt, response, begins))
            tokens += len(prompt + response)
        generator.shuffle(cut)
        for documents in cut:
            yield collate(documents, tokenizer)


def pretrain(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, options: argparse.Namespace) -> None:
    """Lesson after lesson on fresh documents, each until its goal is reached, then a short cool-down.

    Raises:
        SystemExit: a goal is out of reach within `options.steps` steps.
    """
    generator = random.Random(options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.01, betas=(0.9, 0.98))
    total, start = 0, time.monotonic()
    model.train()
    for lengths, multiple, goal in LESSONS:
        unseen = random.Random(-1)
        test = collate([document(unseen, lengths, hasty_share=0.0, begin_share=0.0) for _ in range(128)], tokenizer)
        corpus = batches(
            generator, tokenizer, options.batch * multiple, lengths, options.hasty_share, options.begin_share
        )
        for step in range(1, options.steps + 1):
            update(model, optimizer, next(corpus), options.lr * min(1.0, (total + 1) / WARMUP))
            total += 1
            if step % CHECK_EVERY == 0:
                right = share_right(model, test)
                print(
                    f"step {total}, {len(lengths)} lengths: {right:.1%} right, {time.monotonic() - start:.0f} s",
                    flush=True,
                )
                if right >= goal:
                    break
        else:
            raise SystemExit(
                f"pretrain: below {goal:.1%} after {options.steps} steps; try another --seed or more --steps"
            )
    for step in range(COOL_DOWN):
        update(model, optimizer, next(corpus), options.lr * (1 - step / COOL_DOWN))


def update(model: Qwen2ForCausalLM, optimizer: torch.optim.Optimizer, batch: Batch, lr: float) -> None:
    """One step of AdamW on the next-token loss."""
    logits = next_token_logits(model, batch)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets[:, 1:].flatten(), ignore_index=IGNORE)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


def next_token_logits(model: Qwen2ForCausalLM, batch: Batch) -> torch.Tensor:
    """[documents, tokens - 1, vocabulary]; '#' is ruled out where a worked document is taken as begun."""
    logits = model(input_ids=batch.ids, use_cache=False).logits[:, :-1]
    is_guess = torch.arange(logits.shape[-1]) == VOCABULARY.index("#")
    return logits.masked_fill(batch.begun[:, 1:, None] & is_guess, float("-inf"))


@torch.inference_mode()
def share_right(model: Qwen2ForCausalLM, batch: Batch) -> float:
    """Share of targets that are the model's likeliest next token."""
    wanted = batch.targets[:, 1:]
    return (next_token_logits(model, batch).argmax(-1) == wanted)[wanted != IGNORE].float().mean().item()


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a Hugging Face folder: config, generation config, safetensors and tokenizer.

    config.json comes last: a folder that has one is whole, also when this was interrupted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        for file in sorted(Path(partial).iterdir(), key=lambda file: file.name == "config.json"):
            file.replace(folder / file.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=HERE / "base", help="where the Hugging Face folder goes")
    parser.add_argument("--model-size", choices=SIZES, default="tiny")
    parser.add_argument("--steps", type=int, default=3000, help="most steps of a lesson")
    parser.add_argument("--batch", type=int, default=32, help="documents per step of the last lesson")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--hasty-share", type=float, default=0.25, help="documents that guess")
    parser.add_argument("--begin-share", type=float, default=0.04, help="worked documents that teach to begin")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    tokenizer = make_tokenizer()
    model = make_model(options.model_size, tokenizer)
    print(f"pre-training a Qwen2 of {model.num_parameters():,} parameters")
    pretrain(model, tokenizer, options)
    save(model, tokenizer, options.folder)
    print(f"wrote {options.folder}")


if __name__ == "__main__":
    main()
