"""The whole tree of one run, and the loader that fills it from YAML and overrides."""

import dataclasses
import difflib
from dataclasses import field
from pathlib import Path
from typing import Any

import pydantic
import yaml

from megatron_srft.config.advantages import AdvantageConfig
from megatron_srft.config.base import ConfigError, require, section
from megatron_srft.config.checks import check_run, check_stage
from megatron_srft.config.critic import CriticConfig
from megatron_srft.config.hidden_reward import check_scorer, check_staleness, swift_reward
from megatron_srft.config.kl import KlConfig
from megatron_srft.config.methods import ADVANTAGES, OBJECTIVES, PRESETS, ObjectiveConfig
from megatron_srft.config.mixed import SrftConfig
from megatron_srft.config.rewards import REWARDS, RewardConfig, with_limit
from megatron_srft.config.rollouts import (
    LocalRolloutConfig,
    PartialConfig,
    ReplayRolloutConfig,
    RolloutConfig,
    VllmRolloutConfig,
    VllmServerRolloutConfig,
)
from megatron_srft.config.setup import (
    BatchConfig,
    DataConfig,
    ModelConfig,
    OpsConfig,
    OptimizerConfig,
    ParallelConfig,
)
from megatron_srft.config.supervised import SftKlConfig
from megatron_srft.config.verifiers import MathRewardConfig
from megatron_srft.config.watching import (
    AccountingConfig,
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    ParityConfig,
)


@section
class RunConfig:
    name: str = "run"
    """The run's folder is run_dir/name."""

    run_dir: str = "runs"
    """Where run folders are made."""

    seed: int = 0
    """Seeds data order, sampling and initialisation."""

    steps: int = 100
    """Training steps of the (single) stage."""

    stages: tuple[dict[str, Any], ...] = ()
    """Optional list of stages run one after another; each is a name and the sections it overrides, for example
    {name: sft, steps: 50, objective: {kind: sft}}. Empty: one stage with the settings of this file."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    ops: OpsConfig = field(default_factory=OpsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    rollout: RolloutConfig = field(default_factory=LocalRolloutConfig)
    rewards: tuple[RewardConfig, ...] = (MathRewardConfig(),)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    kl: KlConfig = field(default_factory=KlConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    objective: ObjectiveConfig = field(default_factory=SrftConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    parity: ParityConfig = field(default_factory=ParityConfig)
    accounting: AccountingConfig = field(default_factory=AccountingConfig)

    megatron: dict[str, Any] = field(default_factory=dict)
    """Native megatron-core TransformerConfig fields under their own names; checked where megatron is imported."""

    def __post_init__(self):
        check_run(self)
        if not self.stages:
            check_stage(self)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run_dir) / self.name

    @property
    def samples_rollouts(self) -> bool:
        """Whether a step samples completions and scores them."""
        return self.objective.samples_rollouts

    @property
    def steps_ahead(self) -> int:
        """How many steps before it is trained on a completion is sampled."""
        return getattr(self.rollout, "steps_ahead", 0) if self.samples_rollouts else 0

    @property
    def partial(self) -> PartialConfig | None:
        """How completions are spread over steps; None where each is sampled in one."""
        return getattr(self.rollout, "partial", None) if self.samples_rollouts else None

    @property
    def uses_demonstrations(self) -> bool:
        """Whether a step has demonstrations. GRPO learns nothing from them; its advantage may count them if told to."""
        return self.objective.learns_from_demonstrations or bool(self.advantage.include_demonstration)

    @property
    def uses_critic(self) -> bool:
        """Whether a critic's values are what returns are held against."""
        return self.objective.kind == "ppo"

    @property
    def uses_preferences(self) -> bool:
        """Whether a step has pairs of a chosen and a rejected answer, and nothing else."""
        return self.objective.kind == "dpo"

    @property
    def scored_by_engine(self) -> bool:
        """Whether the rollout engine reads the hidden-state reward off the completions that it samples."""
        swift = swift_reward(self.rewards) if self.samples_rollouts else None
        return swift is not None and swift.scored_by == "engine"

    @property
    def needs_reference(self) -> bool:
        """Whether a second set of weights is held."""
        return self.kl.needs_reference or self.needs_reference_distribution

    @property
    def needs_reference_distribution(self) -> bool:
        """Whether an update asks for the reference's whole next-token distributions."""
        return isinstance(self.objective, SftKlConfig) and self.objective.estimator == "full"

    def resolved(self) -> "RunConfig":
        """This tree with every `None` that stands for a published setting replaced by that setting."""
        objective = self.objective
        preset = PRESETS.get(getattr(objective, "preset", objective.kind), {})
        filled = {k: v for k, v in preset.items() if getattr(objective, k) is None}
        demonstration_tokens = self.data.max_demonstration_tokens or self.rollout.max_response_tokens
        if getattr(objective, "constant_length", 0) is None:
            filled["constant_length"] = (
                self.rollout.max_response_tokens if self.samples_rollouts else demonstration_tokens
            )
        published = ADVANTAGES[getattr(objective, "preset", objective.kind)]
        advantage = {k: v for k, v in published.items() if getattr(self.advantage, k) is None}
        return dataclasses.replace(
            self,
            objective=dataclasses.replace(objective, **filled),
            advantage=dataclasses.replace(self.advantage, **advantage),
            data=dataclasses.replace(self.data, max_demonstration_tokens=demonstration_tokens),
            rewards=tuple(with_limit(reward, self.rollout.max_response_tokens) for reward in self.rewards),
        )

    def stage_configs(self) -> list[tuple[str, "RunConfig"]]:
        """(stage name, resolved settings) of each stage in order.

        Raises:
            ConfigError: a stage has no name, a name twice, or overrides what must stay the same over a run; or its
                reward head would grow older than it may, or be read by an engine that cannot.
        """
        stages = self._stage_configs()
        check_scorer(stages)
        check_staleness(stages)
        return stages

    def _stage_configs(self) -> list[tuple[str, "RunConfig"]]:
        if not self.stages:
            return [(self.objective.kind, self.resolved())]
        base, out = to_dict(self), []
        base.pop("stages")
        for number, stage in enumerate(self.stages):
            overrides = dict(stage)
            name = overrides.pop("name", None)
            require(isinstance(name, str) and bool(name), f"stages.{number} needs a name")
            require(name not in [n for n, _ in out], f"stages.{number}.name '{name}' is used twice")
            fixed = sorted(set(overrides) & FIXED_OVER_STAGES)
            require(not fixed, f"stages.{number}.{fixed[0] if fixed else ''} cannot differ between stages of one run")
            out.append((name, from_dict(merge(base, overrides), f"stages.{number}.").resolved()))
        return out


FIXED_OVER_STAGES = {"name", "run_dir", "seed", "stages", "model", "parallel", "megatron", "logging", "checkpoint"}


# ---------------------------------------------------------------- loading


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, which by itself takes the last of two equal keys without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"the key {key.value} stands there twice; keep one"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) and key.value != "<<" else None)
        return super().construct_mapping(node, deep)


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file, apply `key.path=value` overrides and validate.

    Raises:
        ConfigError: the file is missing or not YAML, or a key or value is wrong; the message names it.
    """
    path = Path(path)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), UniqueKeyLoader)
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert the file") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f":{where.line + 1}" if where else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    require(tree is None or isinstance(tree, dict), f"{path}: the file must hold a mapping of keys to values")
    tree = tree or {}
    for override in overrides:
        tree = merge(tree, parse_override(override, tree))
    config = from_dict(tree, "")
    config.stage_configs()
    return config


def parse_override(override: str, tree: dict[str, Any]) -> dict[str, Any]:
    """Turn `a.b=value` into {'a': {'b': value}}; list items are addressed by number, as in `rewards.0.weight=2`."""
    key, equals, text = override.partition("=")
    require(bool(equals) and bool(key.strip()), f"override '{override}' must look like key.path=value")
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        value = text
    parts = key.strip().split(".")
    return _nest(parts, value, tree, key)


def _nest(parts: list[str], value: Any, here: Any, key: str) -> Any:
    if not parts:
        return value
    head, *rest = parts
    if isinstance(here, (list, tuple)):
        require(head.isdigit() and int(head) < len(here), f"override '{key}': '{head}' is no item number of that list")
        items = list(here)
        nested = _nest(rest, value, items[int(head)], key)
        items[int(head)] = merge(items[int(head)], nested) if isinstance(nested, dict) else nested
        return items
    require(
        here is None or isinstance(here, dict), f"override '{key}': '{head}' lies below a plain value; check the path"
    )
    return {head: _nest(rest, value, (here or {}).get(head), key)}


def merge(base: Any, over: Any) -> Any:
    """`base` updated by `over`, section by section; a section whose `kind` or `preset` changes starts afresh."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    for tag in ("kind", "preset"):
        if tag in over and tag in base and over[tag] != base[tag]:
            return over if tag == "kind" else {**({"kind": base["kind"]} if "kind" in base else {}), **over}
    return {**base, **{k: merge(base.get(k), v) if k in base else v for k, v in over.items()}}


def from_dict(tree: dict[str, Any], prefix: str = "") -> RunConfig:
    """Validate a plain tree. Raises ConfigError naming the first wrong key.

    A rollout or objective section without a kind is of the default kind.
    """
    for key, default in (("rollout", LocalRolloutConfig), ("objective", SrftConfig)):
        if isinstance(tree.get(key), dict):
            tree = {**tree, key: {"kind": default.kind, **tree[key]}}
    try:
        return pydantic.TypeAdapter(RunConfig).validate_python(tree)
    except pydantic.ValidationError as error:
        raise ConfigError(_explain(error, prefix)) from None


def to_dict(config: Any) -> Any:
    """The plain tree of a config (lists and dicts), ready for YAML."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {k: to_dict(v) for k, v in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(v) for v in config]
    return config


def to_yaml(config: RunConfig) -> str:
    """YAML text that `load` reads back to the same config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def _explain(error: pydantic.ValidationError, prefix: str) -> str:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    key = prefix + ".".join(_visible(location))
    if first["type"] == "unexpected_keyword_argument":
        names = _names_at([part for part in location[:-1]])
        close = difflib.get_close_matches(location[-1], names, n=1)
        hint = f"; did you mean {prefix}{'.'.join(_visible(location[:-1]) + close)}?" if close else ""
        return f"unknown key {key}{hint}" + ("" if close else f"; known keys there: {', '.join(sorted(names))}")
    if first["type"] == "union_tag_invalid":
        return f"{key}.kind: unknown kind {first['ctx']['tag']!r}; choose from {first['ctx']['expected_tags']}"
    if first["type"] == "union_tag_not_found":
        return f"{key} needs a kind"
    if first["type"] == "value_error":
        return f"{prefix.rstrip('.')}: {first['ctx']['error']}" if prefix else str(first["ctx"]["error"])
    if first["type"] == "tuple_type" and isinstance(first["input"], (str, int, float)):
        return f"{key} needs a list; write {key}: [{first['input']}]"
    if first["type"] == "tuple_type":
        return f"{key} needs a list, not {first['input']!r}"
    if first["type"] in ("dataclass_type", "dict_type", "model_attributes_type"):
        return f"{key} needs keys of its own, as in {key}: {{key: value}}, not {first['input']!r}"
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{key}: {message} (got {first['input']!r})"


def _visible(location: list[str]) -> list[str]:
    """The keys as the user wrote them. A tag stands behind its section; what follows a tag is a key of that name."""
    return [part for i, part in enumerate(location) if part not in KINDS or (i > 0 and location[i - 1] in KINDS)]


ROLLOUTS = {
    "local": LocalRolloutConfig,
    "replay": ReplayRolloutConfig,
    "vllm": VllmRolloutConfig,
    "vllm_server": VllmServerRolloutConfig,
}

KINDS = {*ROLLOUTS, *REWARDS, *OBJECTIVES}
"""Tags of the unions; pydantic puts them into error locations, where a user does not expect them."""


def _names_at(location: list[str]) -> list[str]:
    """Field names of the section at `location` (which includes union tags)."""
    sections = {"": RunConfig} | {
        f.name: f.default_factory for f in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(f.default_factory)
    }
    tagged = {**ROLLOUTS, **REWARDS, **OBJECTIVES}
    cls = RunConfig
    for part in location:
        cls = tagged.get(part) or sections.get(part) or cls
    return [f.name for f in dataclasses.fields(cls)]
