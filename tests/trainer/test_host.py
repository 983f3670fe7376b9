"""megatron-core on a machine without CUDA. Each check runs in a fresh process, where nothing has been patched yet."""

import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shim does nothing where CUDA is there")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "warnings.warn" not in done.stderr, done.stderr
    return done.stdout


def test_megatron_allocates_on_the_cpu_and_others_still_see_torch_as_it_is():
    out = run(
        "import torch\n"
        "compile_, tensor = torch.compile, torch.tensor\n"
        "from megatron_srft.trainer import host\n"
        "host.install(); host.install()\n"
        "assert torch.compile is compile_ and torch.tensor is tensor and not torch.cuda.is_available()\n"
        "assert torch.zeros(2).type() == 'torch.FloatTensor'\n"
        "from megatron.core.transformer.utils import get_default_causal_mask\n"
        "assert get_default_causal_mask(3).device.type == 'cpu'\n"
        "from megatron.core.optimizer.grad_scaler import ConstantGradScaler\n"
        "assert ConstantGradScaler(2.0).scale.device.type == 'cpu'\n"
        "try: torch.zeros(1, device='cuda')\n"
        "except Exception: print('no cuda outside megatron')\n"
    )
    assert out == "no cuda outside megatron\n"


def test_importing_the_trainer_does_not_import_the_compiler():
    out = run("import sys, megatron_srft.trainer.model; print('torch._inductor.compile_fx' in sys.modules)")
    assert out == "False\n"


def test_one_process_needs_no_launcher_and_can_start_again():
    run(
        "from megatron_srft.trainer import parallel\n"
        "from megatron_srft.config import ParallelConfig\n"
        "for _ in range(2):\n"
        "    groups = parallel.start(ParallelConfig(), seed=1)\n"
        "    assert groups.world.size() == groups.tensor.size() == groups.model.size() == 1\n"
        "    assert parallel.device().type == 'cpu'\n"
        "    parallel.stop()\n"
    )


def test_random_state_is_a_function_of_seed_and_step():
    run(
        "import torch\n"
        "from megatron_srft.trainer import parallel\n"
        "from megatron_srft.config import ParallelConfig\n"
        "parallel.start(ParallelConfig(), seed=1)\n"
        "draws = []\n"
        "for seed, step in ((1, 5), (1, 6), (2, 5), (1, 5)):\n"
        "    parallel.seed_step(seed, step)\n"
        "    draws.append(torch.rand(1).item())\n"
        "assert draws[0] == draws[3] and len(set(draws)) == 3, draws\n"
    )


@pytest.mark.parametrize("world, tensor, pipeline, fits", [(4, 2, 2, True), (6, 2, 1, True), (3, 2, 1, False)])
def test_the_layout_must_divide_the_world(world, tensor, pipeline, fits):
    from megatron_srft.config import ConfigError, ParallelConfig
    from megatron_srft.trainer.parallel import check_world_size

    config = ParallelConfig(tensor=tensor, pipeline=pipeline)
    if fits:
        check_world_size(config, world)
    else:
        with pytest.raises(ConfigError, match=r"parallel\.tensor x parallel\.pipeline = 2 x 1 .* 3 process"):
            check_world_size(config, world)
