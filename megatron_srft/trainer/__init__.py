"""The policy on Megatron. The only folder that imports megatron.core, made to run without CUDA first (host.py)."""

import warnings

from megatron_srft.trainer import host

# Megatron warns at every import that optional packages are absent, and torch about megatron's use of it, once per rank;
# `megatron-srft doctor` says once what is there.
warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
host.install()
