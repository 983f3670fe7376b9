"""A small Qwen2 taught from text that a task invents: the one thing that both tasks of this example share.

Model and update are those of the arithmetic example; here a document is a prompt and a response of any text.
"""

import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "arithmetic"))

import pretrain  # noqa: E402

PAD, EOS, UNK = pretrain.PAD, pretrain.EOS, pretrain.UNK
Document = tuple[str, str]
"""Prompt and response."""
REPORT_EVERY = 200


def make_tokenizer(texts: Iterable[str], vocabulary: int = 1000) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the texts until every word of theirs is one token; every character with 0.

    It has to be BPE: transformers makes Qwen's own BPE tokenizer of whatever vocabulary lies beside a Qwen2 model.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[PAD, EOS, UNK], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNK)


def collate(documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast) -> pretrain.Batch:
    """Pad on the right; only responses and their end tokens are targets."""
    prompts, responses = (tokenizer(list(texts))["input_ids"] for texts in zip(*documents, strict=True))
    rows = [[*p, *r, tokenizer.eos_token_id] for p, r in zip(prompts, responses, strict=True)]
    ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    targets = torch.full_like(ids, pretrain.IGNORE)
    for place, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        ids[place, : len(row)] = torch.tensor(row)
        targets[place, len(prompt) : len(row)] = ids[place, len(prompt) : len(row)]
    return pretrain.Batch(ids, targets, torch.zeros_like(ids, dtype=torch.bool))


def teach(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    draw: Callable[[random.Random], Document],
    *,
    steps: int,
    batch: int = 48,
    lr: float = 1.5e-3,
    seed: int = 0,
) -> float:
    """So many updates on fresh documents, the last fifth with a falling learning rate; the last loss, nats a token."""
    generator, start = random.Random(seed), time.monotonic()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    model.train()
    for step in range(1, steps + 1):
        # Of similar length, so that little padding is computed.
        documents = sorted((draw(generator) for _ in range(batch)), key=lambda d: len(d[0] + d[1]))
        rate = lr * min(1.0, step / pretrain.WARMUP, (steps - step + 1) / (0.2 * steps))
        pretrain.update(model, optimizer, collate(documents, tokenizer), rate)
        if step % REPORT_EVERY == 0 or step == steps:
            print(f"step {step} of {steps}, {time.monotonic() - start:.0f} s", flush=True)
    model.eval()
    with torch.no_grad():
        test = collate([draw(generator) for _ in range(128)], tokenizer)
        logits = pretrain.next_token_logits(model, test)
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), test.targets[:, 1:].flatten(), ignore_index=pretrain.IGNORE
        ).item()
