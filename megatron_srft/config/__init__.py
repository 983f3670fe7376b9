"""The typed tree of one run, and the loader that fills it from YAML and `key.path=value` overrides.

A value comes from the field's default, then the file, then the command line; the later one wins. Unknown keys, wrong
types and impossible combinations raise `ConfigError` with the key and the remedy. Importing this module needs neither
torch nor megatron, so `--help`, `--dry-run` checks and editors stay fast.

`None` in an objective's or the advantage's field means "what the chosen preset publishes"; `RunConfig.resolved()`
replaces every such `None`, and the resolved tree is what a run writes into its folder.
"""

from megatron_srft.config.advantages import AdvantageConfig
from megatron_srft.config.base import ConfigError, require
from megatron_srft.config.combined import ChordConfig, HptConfig, ReliftConfig, RlSftConfig, SurrogateConfig
from megatron_srft.config.critic import CriticConfig, CriticOptimizerConfig
from megatron_srft.config.denominators import Denominator
from megatron_srft.config.hidden_reward import SwiftRewardConfig, refreshes_after, swift_reward
from megatron_srft.config.kl import KlConfig
from megatron_srft.config.methods import ADVANTAGES, OBJECTIVES, PRESETS, ObjectiveConfig
from megatron_srft.config.mixed import LuffyConfig, SrftConfig
from megatron_srft.config.policy_gradient import GrpoConfig, PpoConfig
from megatron_srft.config.preferences import DpoConfig
from megatron_srft.config.rewards import (
    VERIFIERS,
    CosineRewardConfig,
    FunctionRewardConfig,
    LengthRewardConfig,
    OverlongRewardConfig,
    RepetitionRewardConfig,
    RewardConfig,
    name_streams,
)
from megatron_srft.config.rollouts import (
    LocalRolloutConfig,
    PartialConfig,
    ReplayRolloutConfig,
    RolloutConfig,
    SamplingConfig,
    VllmRolloutConfig,
    VllmServerRolloutConfig,
    as_local,
    as_servers,
    as_vllm,
)
from megatron_srft.config.run import (
    FIXED_OVER_STAGES,
    RunConfig,
    from_dict,
    load,
    merge,
    parse_override,
    to_dict,
    to_yaml,
)
from megatron_srft.config.setup import (
    BatchConfig,
    DataConfig,
    ModelConfig,
    OpsConfig,
    OptimizerConfig,
    ParallelConfig,
)
from megatron_srft.config.supervised import PsftConfig, SftConfig, SftKlConfig
from megatron_srft.config.verifiers import ExactRewardConfig, FormatRewardConfig, JudgeRewardConfig, MathRewardConfig
from megatron_srft.config.watching import (
    AccountingConfig,
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    ParityConfig,
)

__all__ = [
    "ADVANTAGES",
    "AccountingConfig",
    "AdvantageConfig",
    "BatchConfig",
    "CheckpointConfig",
    "ChordConfig",
    "ConfigError",
    "CosineRewardConfig",
    "CriticConfig",
    "CriticOptimizerConfig",
    "DataConfig",
    "Denominator",
    "DpoConfig",
    "EvaluationConfig",
    "ExactRewardConfig",
    "FIXED_OVER_STAGES",
    "FormatRewardConfig",
    "FunctionRewardConfig",
    "GrpoConfig",
    "HptConfig",
    "JudgeRewardConfig",
    "KlConfig",
    "LengthRewardConfig",
    "LocalRolloutConfig",
    "LoggingConfig",
    "LuffyConfig",
    "MathRewardConfig",
    "ModelConfig",
    "OpsConfig",
    "OBJECTIVES",
    "ObjectiveConfig",
    "OptimizerConfig",
    "OverlongRewardConfig",
    "PRESETS",
    "PartialConfig",
    "PpoConfig",
    "ParallelConfig",
    "ParityConfig",
    "RepetitionRewardConfig",
    "PsftConfig",
    "ReliftConfig",
    "ReplayRolloutConfig",
    "RewardConfig",
    "RlSftConfig",
    "RolloutConfig",
    "RunConfig",
    "SamplingConfig",
    "SftConfig",
    "SftKlConfig",
    "SrftConfig",
    "SurrogateConfig",
    "SwiftRewardConfig",
    "VERIFIERS",
    "VllmRolloutConfig",
    "VllmServerRolloutConfig",
    "as_local",
    "as_servers",
    "as_vllm",
    "from_dict",
    "load",
    "merge",
    "name_streams",
    "parse_override",
    "refreshes_after",
    "require",
    "swift_reward",
    "to_dict",
    "to_yaml",
]
