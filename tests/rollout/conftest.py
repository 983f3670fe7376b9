"""Model folders and prompts for the rollout tests."""

import numpy as np
import pytest
from tiny_models import make_model, make_tokenizer

from megatron_srft.sample import Prompt

FAMILIES = {
    "qwen2": dict(tied=True),
    "qwen3": dict(),
    "llama3": dict(),
    "mistral": dict(sliding_window=8),
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A folder per family; Mistral's attention window is shorter than the prompts."""
    root = tmp_path_factory.mktemp("rollout-models")
    return {name: make_model(name, root / name, **options) for name, options in FAMILIES.items()}


@pytest.fixture(scope="session")
def prompts():
    """12 prompts of 1 to 23 letters."""
    numbers, tokenizer = np.random.default_rng(0), make_tokenizer()
    out = []
    for i in range(12):
        text = "".join(numbers.choice(list("abcdefgh0123+= "), size=1 + 2 * i))
        token_ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
        out.append(Prompt(id=f"p{i}", text=text, token_ids=token_ids, answer="1", source="test"))
    return out
