"""The policy on Megatron: start-up, model, step, optimizer, checkpoint. The only folder that imports megatron.core."""

import warnings

# Megatron warns at every import that optional packages are absent, and torch about megatron's use of it, once per rank;
# `megatron-srft doctor` says once what is there.
warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
