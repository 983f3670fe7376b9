"""Single-stage supervised and reinforcement fine-tuning on Megatron-core."""

__version__ = "0.1.0"
