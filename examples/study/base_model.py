"""Make the study's base model: a small Qwen2 that can write out chains, short ones well, and never begins to.

The corpus is that of the arithmetic example, with this study's answers and three differences. No worked document
teaches to begin (pretrain.py tells how that is kept out of the loss), so the model guesses: 1 time in 100 right. A last
lesson, half of it guesses alone, brings the probability of beginning down to about 1 in 10,000, so that reinforcement
learning rarely meets a beginning to reward. And chains of 6 to 8 operands are rare, so that it makes mistakes in them
even once it has begun; longer ones it has never seen.
"""

import argparse
import random
import sys
import time
from pathlib import Path

import torch
from task import HERE, worked
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

sys.path.insert(0, str(HERE.parent / "arithmetic"))

import pretrain  # noqa: E402
from make_data import MODULUS, random_problem  # noqa: E402

LENGTHS = {2: 1.0, 3: 1.0, 4: 1.0, 5: 1.0, 6: 0.15, 7: 0.08, 8: 0.05}
"""Operands of the corpus' worked chains -> how often they come."""
GUESSED = range(2, 11)
"""Operands of the chains that are guessed."""
HASTY_SHARE = 0.25
LESSONS = (({2: 1.0}, 96), (LENGTHS, 48))
"""(Operands, documents per step); the first one ends when the single steps are known."""
QUIET_STEPS, QUIET_LR, QUIET_WARMUP = 300, 1e-3, 20
"""The last lesson: steps, peak learning rate, steps until it is reached."""
GOAL = 0.99
"""Share of right next tokens that ends a lesson."""


def document(generator: random.Random, lengths: dict[int, float], hasty_share: float) -> tuple[str, str, bool]:
    """Draw a prompt, its response, and whether the response's first character is learned as it is."""
    if generator.random() < hasty_share:
        prompt = random_problem(generator, generator.choice(GUESSED))
        return prompt, f"#{generator.randrange(MODULUS)}{generator.randrange(MODULUS)}", True
    prompt = random_problem(generator, generator.choices(tuple(lengths), tuple(lengths.values()))[0])
    return prompt, worked(prompt), False


def teach(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    steps: int,
    lr: float,
) -> None:
    """Lesson after lesson on fresh documents, each until its goal is reached, then a short cool-down.

    Raises:
        SystemExit: a goal is out of reach within `steps` steps.
    """
    generator, start, total = random.Random(seed), time.monotonic(), 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))

    def update(lengths: dict[int, float], size: int, rate: float) -> None:
        documents = [document(generator, lengths, HASTY_SHARE) for _ in range(size)]
        pretrain.update(model, optimizer, pretrain.collate(documents, tokenizer), rate)

    model.train()
    for lengths, size in LESSONS:
        unseen = random.Random(-1)
        test = pretrain.collate([document(unseen, lengths, 0.0) for _ in range(128)], tokenizer)
        for step in range(1, steps + 1):
            total += 1
            update(lengths, size, lr * min(1.0, total / pretrain.WARMUP))
            if step % pretrain.CHECK_EVERY == 0:
                right = pretrain.share_right(model, test)
                seconds = time.monotonic() - start
                print(f"step {total}, {len(lengths)} lengths: {right:.1%} right, {seconds:.0f} s", flush=True)
                if right >= GOAL:
                    break
        else:
            raise SystemExit(f"base_model: below {GOAL:.0%} after {steps} steps; try another --seed or more --steps")
    for step in range(pretrain.COOL_DOWN):
        update(lengths, size, lr * (1 - step / pretrain.COOL_DOWN))


def quieten(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """The last lesson: guesses alone and the usual documents take turns."""
    generator = random.Random(seed + 7)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.98))
    for step in range(QUIET_STEPS):
        size, hasty_share = (96, 1.0) if step % 2 else (48, HASTY_SHARE)
        documents = [document(generator, LENGTHS, hasty_share) for _ in range(size)]
        rate = QUIET_LR * min(1.0, (step + 1) / QUIET_WARMUP) * (1 - step / QUIET_STEPS)
        pretrain.update(model, optimizer, pretrain.collate(documents, tokenizer), rate)


def make(folder: Path, seed: int = 0, steps: int = 3000, lr: float = 1.5e-3) -> None:
    """Write a Hugging Face folder."""
    torch.manual_seed(seed)
    tokenizer = pretrain.make_tokenizer()
    model = pretrain.make_model("tiny", tokenizer)
    teach(model, tokenizer, seed, steps, lr)
    quieten(model, tokenizer, seed)
    pretrain.save(model, tokenizer, folder)
    print(f"wrote {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=HERE / "base", help="where the Hugging Face folder goes")
    parser.add_argument("--steps", type=int, default=3000, help="most steps of a lesson")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    make(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
