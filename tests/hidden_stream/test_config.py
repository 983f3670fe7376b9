"""What a hidden-state reward asks of the rest of a run's settings."""

import pytest

from megatron_srft.config import ConfigError, from_dict


def tree(swift: dict | None = None, verifier: str | None = "exact", **sections) -> dict:
    rewards = ([{"kind": verifier}] if verifier else []) + [{"kind": "swift", "head": "h", **(swift or {})}]
    return {"objective": {"kind": "grpo"}, "steps": 8, "rewards": rewards, **sections}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (tree({"head": ""}), "rewards: head of a swift reward is not set; it must name a reward head's folder"),
        (tree({"normalise": "z"}), "rewards.1.normalise: input should be 'none', 'sigmoid' or 'group' (got 'z')"),
        (tree({"hed": "h"}), "unknown key rewards.1.hed; did you mean rewards.1.head?"),
        (tree({"max_staleness": -1}), "rewards: swift.max_staleness must be a number of at least 0, not -1"),
        (tree({"refresh_every": 0}), "rewards: swift.refresh_every must be a number of at least 1, not 0"),
        (tree({"refresh_lr": 0.0}), "rewards: swift.refresh_lr must be above 0, not 0.0"),
        (tree({"weight": float("nan")}), "rewards: weight of a swift reward must be a finite number, not nan"),
        (
            {"rewards": [{"kind": "exact"}, {"kind": "swift", "head": "a"}, {"kind": "swift", "head": "b"}]},
            "rewards has 2 items of kind swift, and there is one pass over the hidden states; keep one",
        ),
        (
            tree({"refresh_every": 2}, verifier=None),
            "rewards: swift.refresh_every trains the head on a verifier's verdicts; add an item of kind math, exact or "
            "judge (weight 0 keeps it out of the reward), or set refresh_every to null",
        ),
        (
            tree({"refresh_every": 2}, parallel={"context": 2}),
            "rewards: swift.refresh_every trains the head on hidden states of whole responses, which context ranks",
        ),
        (
            tree(verifier=None, objective={"kind": "srft"}),
            "objective srft asks which answers are right, and a swift reward is no verdict; add an item of kind math",
        ),
        (
            tree(verifier=None, evaluation={"files": ["problems.jsonl"]}),
            "evaluation.files asks which answers are right, and a swift reward is no verdict; add an item of kind math",
        ),
        (
            tree({"scored_by": "engine"}),
            "rewards: swift.scored_by is engine, and an engine of rollout.kind local reads no hidden states; set "
            "swift.scored_by to trainer, or rollout.kind to vllm",
        ),
        (
            tree(
                {"scored_by": "engine"},
                rollout={"kind": "vllm", "partial": {"tokens_per_round": 16, "extra_prompts": 2}},
                parity={"correction": "truncate"},
            ),
            "rewards: swift.scored_by is engine, and with rollout.partial a completion's states are those of several ",
        ),
        (
            tree({"scored_by": "engine"}, rollout={"kind": "replay", "folder": "dumped"}),
            "rewards: swift.scored_by is engine, and an engine of rollout.kind replay reads no hidden states",
        ),
        (
            tree(verifier=None, batch={"dynamic_sampling": True}),
            "batch.dynamic_sampling asks which answers are right, and a swift reward is no verdict",
        ),
    ],
)
def test_a_mistake_names_the_key_and_the_remedy(settings, message):
    with pytest.raises(ConfigError) as caught:
        from_dict(settings).stage_configs()
    assert str(caught.value).startswith(message)


def test_a_verifier_is_not_needed_where_nothing_asks_for_verdicts():
    assert from_dict(tree(verifier=None)).rewards[0].kind == "swift"


def test_the_engine_scores_what_it_samples():
    assert from_dict(tree({"scored_by": "engine"}, rollout={"kind": "vllm"})).scored_by_engine
    assert not from_dict(tree(rollout={"kind": "vllm"})).scored_by_engine
    supervised = tree({"scored_by": "engine"}, rollout={"kind": "vllm"}, objective={"kind": "sft"})
    assert not from_dict(supervised).scored_by_engine


# ---------------------------------------------------------------- how old a head may become


def refused(settings: dict) -> str | None:
    try:
        from_dict(settings).stage_configs()
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("swift", "sections", "oldest"),
    [
        ({}, {}, 7),  # eight steps of one update: the last one begins after seven
        ({}, {"batch": {"updates_per_step": 2}}, 14),
        ({"refresh_every": 3}, {}, 2),
        ({"refresh_every": 3}, {"batch": {"updates_per_step": 2}}, 4),
        ({"refresh_every": 9}, {}, 7),
        ({}, {"objective": {"kind": "ppo"}, "critic": {"warmup_steps": 3}}, 4),
        ({"refresh_every": 4}, {"objective": {"kind": "ppo"}, "critic": {"warmup_steps": 3}}, 3),
    ],
)
def test_the_limit_is_what_the_head_reaches(swift, sections, oldest):
    assert refused(tree({**swift, "max_staleness": oldest}, **sections)) is None
    assert f"is {oldest - 1}, and at step" in refused(tree({**swift, "max_staleness": oldest - 1}, **sections))


def test_the_sentence_names_both_keys_and_the_remedy():
    assert refused(tree({"max_staleness": 3})) == (
        "rewards: swift.max_staleness is 3, and at step 5 of stage grpo the policy is 4 optimizer updates past the "
        "weights that the head was trained for; set swift.refresh_every, so that the head is trained on in between, or "
        "raise swift.max_staleness"
    )
    assert "lower swift.refresh_every from 6, or raise swift.max_staleness" in refused(
        tree({"max_staleness": 3, "refresh_every": 6})
    )


def test_updates_of_earlier_stages_count():
    """Three of SFT, then the head is trained on after the second, fourth and last step of the next stage."""
    imitate = {"name": "imitate", "steps": 3, "objective": {"kind": "sft"}}
    explore = {"name": "explore", "steps": 4}
    again = {"name": "again", "steps": 2}
    other = {"name": "again", "steps": 1, "rewards": [{"kind": "exact"}, {"kind": "swift", "head": "other"}]}

    def run(limit: int, *stages: dict) -> str | None:
        return refused(tree({"max_staleness": limit, "refresh_every": 2}, stages=list(stages)))

    assert "at step 1 of stage explore the policy is 3 optimizer updates past" in run(2, imitate, explore)
    assert "end the run before this stage, train a head" in run(2, imitate, explore)
    assert "at step 2 of stage explore the policy is 4" in run(3, imitate, explore)
    assert run(4, imitate, explore, again) is None
    other["rewards"][1]["max_staleness"] = 6
    assert "at step 1 of stage again the policy is 7 optimizer updates" in run(4, imitate, explore, other)
    other["rewards"][1]["max_staleness"] = 7
    assert run(4, imitate, explore, other) is None


def test_a_stage_without_completions_reads_no_head():
    assert refused(tree({"max_staleness": 0}, objective={"kind": "sft"})) is None
