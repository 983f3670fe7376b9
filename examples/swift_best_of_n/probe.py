"""A plain probe: scikit-learn's logistic regression on the mean hidden state of a response's tokens.

    python probe.py MODEL TRAIN.jsonl.zst TEST.jsonl.zst SCORES.jsonl

States by transformers alone, so nothing of the reward head's own path is shared. All layers side by side, each column
standardised, the last token left out as the head does. Writes the test file's scores for `best-of-n --scores`.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from megatron_srft.rollout import load_dump  # noqa: E402
from megatron_srft.sample import Group  # noqa: E402

STRENGTH = 0.01
"""scikit-learn's C; weak enough regularisation to fit, strong enough for hundreds of columns."""


@torch.inference_mode()
def mean_states(model: PreTrainedModel, group: Group) -> np.ndarray:
    """[candidates, layers x hidden]; of a response of one token its state."""
    start = len(group.prompt.token_ids)
    rows = [np.concatenate([group.prompt.token_ids, c.token_ids]) for c in group.completions]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.from_numpy(row)
    # Padding stands on the right, where a causal model's real tokens do not see it.
    states = torch.cat(model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states, dim=-1)
    ends = [max(len(row) - 1, start + 1) for row in rows]
    return np.stack([states[place, start:end].mean(dim=0).numpy() for place, end in enumerate(ends)])


def write_scores(model_folder: Path, train: Path, test: Path, scores: Path) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    known = load_dump(train)
    features = np.concatenate([mean_states(model, group) for group in known])
    labels = np.array([score.correct is True for group in known for score in group.scores])
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=2000)).fit(features, labels)
    with scores.open("w", encoding="utf-8") as file:
        for group in load_dump(test):
            values = probe.decision_function(mean_states(model, group)).tolist()
            file.write(json.dumps({"id": group.prompt.id, "scores": {"probe": values}}) + "\n")


if __name__ == "__main__":
    write_scores(*map(Path, sys.argv[1:]))
