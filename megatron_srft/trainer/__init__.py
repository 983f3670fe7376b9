"""The policy on Megatron. The only folder that imports megatron.core, made to run without CUDA first (host.py)."""

import logging
import warnings

from megatron_srft.trainer import host

# Megatron warns at every import that optional packages are absent, and torch about megatron's use of it, once per rank;
# `megatron-srft doctor` says once what is there. Megatron 0.19 also announces successors of what 0.16 needs.
warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
for name in ("torch.utils.cpp_extension", "megatron"):
    logging.getLogger(name).setLevel(logging.ERROR)
host.install()
