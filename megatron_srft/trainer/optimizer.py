"""Megatron's DDP and AdamW around the model chunks, and the learning rate as a function of the step.

Gradients are plain sums: every loss term already carries its global denominator, so nothing here divides by a number
of micro-batches, tokens or data-parallel ranks. Three Megatron settings together give that: `calculate_per_token_loss`
(DDP then sums over data-parallel ranks instead of averaging, and the schedule does not divide by the number of
micro-batches), a token count of zero from the loss function, and a finalize function that ignores that count.
"""

import math

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megatron_srft.config import OptimizerConfig, ParallelConfig


def wrap(chunks: list[GPTModel], parallel: ParallelConfig) -> list[DistributedDataParallel]:
    """Wrap each model chunk in Megatron's DDP; gradients are accumulated and reduced in float32."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_communication,
        # The LM head's weight is used outside its module's forward (trainer/head.py), where the hook that waits for
        # an overlapped parameter gather would not fire.
        overlap_param_gather=False,
    )
    model_config = chunks[0].config
    assert model_config.calculate_per_token_loss
    wrapped = [
        DistributedDataParallel(model_config, ddp_config, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    model_config.finalize_model_grads_func = _finalize
    model_config.grad_scale_func = None
    if parallel.overlap_communication:
        no_sync = [chunk.no_sync for chunk in wrapped]
        model_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


def _finalize(model, num_tokens=None, **kwargs) -> None:
    """Megatron's gradient reductions without its division by a token count."""
    finalize_model_grads(model, None, **kwargs)


def build_optimizer(
    chunks: list[DistributedDataParallel], config: OptimizerConfig, parallel: ParallelConfig
) -> MegatronOptimizer:
    """AdamW over float32 main parameters, sharded over the data-parallel ranks when so configured."""
    dtype = chunks[0].module.config.params_dtype
    return get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_epsilon,
            clip_grad=config.clip_grad,
            params_dtype=dtype,
            bf16=chunks[0].module.config.bf16,
            use_distributed_optimizer=parallel.distributed_optimizer,
        ),
        chunks,
    )


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of step `step` (from 0) of a stage of `total_steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    shape = 1 - progress if config.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape)


def clip_and_step(optimizer: MegatronOptimizer, config: OptimizerConfig, lr: float) -> tuple[bool, float]:
    """Clip, then step, unless the gradient is not finite.

    Returns:
        (stepped, global gradient norm before clipping). A non-finite norm skips the update on every rank alike, since
        the norm is reduced over all of them.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = config.weight_decay * group.get("wd_mult", 1.0)
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        return False, norm
    if config.clip_grad > 0:
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            if part.get_parameters():
                clip_grad_by_total_norm_fp32(part.get_parameters(), config.clip_grad, norm, False)
    return optimizer.step_with_ready_grads(), norm
