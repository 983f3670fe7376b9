"""Make the base model of the arithmetic example: a character tokenizer and a small Qwen2, pre-trained for a minute.

No weights are downloaded. The corpus has two kinds of documents:

    hasty    7+5-3=#4                 a guess without any work
    worked   7+5-3=7+5=2;2-3=9#9      every step written out

The model reads many worked documents but is rarely taught to *begin* one (the first character of most of them is
not a target). So it ends up owning every single step and able to go on with a solution that somebody has begun, while
left alone it blurts out a guess: 1 in 10 right, which is chance. That is the gap that fine-tuning has to close.
"""

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from make_data import HERE, MODULUS, random_problem, worked_solution
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
SIZES = {"tiny": (3, 96, 256), "small": (6, 256, 688), "medium": (12, 512, 1376)}
"""Layers, hidden size and MLP size. The steps below are tuned for tiny."""
LENGTHS = (2, 3, 4, 5, 6, 7)
"""Operands of the corpus' chains, equally likely. The base model has met the lengths of ood.jsonl; training has not."""
ROPE_THETA = 100.0
"""Texts are 60 characters at most; the usual 10,000 would leave most rotary dimensions without use."""
IGNORE = -100
POOL_BATCHES = 16
"""Documents are drawn for this many batches at once and sorted by length, so that little padding is computed."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, UNK, *"0123456789+-=;#"])}
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
    generator: random.Random, tokenizer: PreTrainedTokenizerFast, hasty_share: float, begin_share: float
) -> tuple[list[int], list[int]]:
    """Draw a document: its token ids, and its targets (the ids, or IGNORE where nothing is to be learned)."""
    prompt = random_problem(generator, generator.choice(LENGTHS))
    if generator.random() < hasty_share:
        response, ignored = f"#{generator.randrange(MODULUS)}", len(prompt)
    else:
        response, ignored = worked_solution(prompt), len(prompt) + (generator.random() >= begin_share)
    ids = tokenizer.convert_tokens_to_ids([*prompt, *response, EOS])
    return ids, [IGNORE] * ignored + ids[ignored:]


def batches(
    generator: random.Random, tokenizer: PreTrainedTokenizerFast, size: int, hasty_share: float, begin_share: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield token ids and targets, both [documents, tokens], of `size` documents on average, padded on the right.

    Batches hold documents of similar length and about the same number of tokens.
    """
    while True:
        pool = [document(generator, tokenizer, hasty_share, begin_share) for _ in range(size * POOL_BATCHES)]
        pool.sort(key=lambda pair: len(pair[0]))
        tokens_per_batch = sum(len(ids) for ids, _ in pool) / POOL_BATCHES
        cut: list[list] = [[] for _ in range(POOL_BATCHES)]
        tokens = 0
        for ids, targets in pool:
            cut[min(int(tokens / tokens_per_batch), POOL_BATCHES - 1)].append((ids, targets))
            tokens += len(ids)
        generator.shuffle(cut)
        for documents in cut:
            ids, targets = zip(*documents, strict=True)
            yield pad(ids, tokenizer.pad_token_id), pad(targets, IGNORE)


def pad(rows: tuple[list[int], ...], value: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def pretrain(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, options: argparse.Namespace) -> None:
    """Minimise the next-token loss on fresh documents with AdamW under a one-cycle learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.lr, total_steps=options.steps, pct_start=0.1, cycle_momentum=False
    )
    corpus = batches(random.Random(options.seed), tokenizer, options.batch, options.hasty_share, options.begin_share)
    model.train()
    start = time.monotonic()
    for step, (ids, targets) in zip(range(1, options.steps + 1), corpus, strict=False):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == options.steps:
            print(f"step {step}/{options.steps}  loss {loss.item():.3f}  {time.monotonic() - start:.0f} s", flush=True)


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a Hugging Face folder: config, generation config, safetensors and tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=HERE / "base", help="where the Hugging Face folder goes")
    parser.add_argument("--model-size", choices=SIZES, default="tiny")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=32, help="documents per step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--hasty-share", type=float, default=0.25, help="documents that guess")
    parser.add_argument("--begin-share", type=float, default=0.04, help="worked documents whose first character counts")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    tokenizer = make_tokenizer()
    model = make_model(options.model_size, tokenizer)
    print(f"pre-training a Qwen2 of {model.num_parameters():,} parameters on {options.batch} documents a step")
    pretrain(model, tokenizer, options)
    save(model, tokenizer, options.folder)
    print(f"wrote {options.folder}")


if __name__ == "__main__":
    main()
