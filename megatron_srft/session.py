"""One run: its parts, and the stages of the loop as methods, in the order in which `train.train` calls them."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from megatron_srft import config as configuration
from megatron_srft import hidden_stream
from megatron_srft.advantages import group_statistics, to_sequences
from megatron_srft.analysis.report import write_report
from megatron_srft.analysis.samples import log_samples
from megatron_srft.config import RunConfig
from megatron_srft.distributed import ProcessGroups, all_reduce, is_main, size
from megatron_srft.dynamic_sampling import refill
from megatron_srft.evaluate import evaluate
from megatron_srft.guards import RunStopped, StopRequest, find_problem
from megatron_srft.metrics import MetricSink, NullSink, Timer
from megatron_srft.parity_gate import ParityGate
from megatron_srft.parity_probe import investigate
from megatron_srft.rewards import Scorer
from megatron_srft.rewards.over_ranks import score_over_ranks
from megatron_srft.rollout import (
    check_engine,
    dump,
    load_tokenizer,
)
from megatron_srft.routing import Router
from megatron_srft.sample import Group, Prompt, TrainingSequence
from megatron_srft.sampler import Sampler
from megatron_srft.saves import Saves
from megatron_srft.stage_data import read_stage_data
from megatron_srft.stages import Stage, stage_of, stages_of
from megatron_srft.trainer import parallel
from megatron_srft.trainer.conversion import read_hf_config
from megatron_srft.trainer.critic import check_folder
from megatron_srft.trainer.manifest import Progress
from megatron_srft.trainer.old_policy import OldPolicy, remarks
from megatron_srft.trainer.trainer import Trainer
from megatron_srft.weights.architecture import read_architecture

log = logging.getLogger(__name__)


class Session:
    """Use as a context manager; see `train.train` for the order of the calls.

    Raises on construction:
        ConfigError, ValueError: files, data, layout or model do not fit; nothing has been trained or overwritten yet.
    """

    def __init__(self, config: RunConfig, groups: ProcessGroups):
        self.groups, self.folder = groups, config.folder
        self.stages = stages_of(config)
        self.total_steps = sum(stage.config.steps for stage in self.stages)
        self.saves = Saves(config, groups)
        found = self.saves.progress
        progress = found or Progress(step=0, stage=self.stages[0].name, stage_step=0, policy_version=0)
        self.step, self.stage_step = progress.step, progress.stage_step
        self.batches_drawn = self.step if progress.batches_drawn is None else progress.batches_drawn
        self.stage = stage_of(progress, self.stages)
        if found and self.step == self.total_steps and is_main():
            print(
                f"{self.folder} is finished: all {self.step} steps are done, and only its evaluation and its model are "
                "made again; to train on raise steps, for a new run choose another name",
                flush=True,
            )
        self.config = self.stage.config

        self.tokenizer = load_tokenizer(self.config.model)
        hf_config = read_hf_config(self.config.model.path, self.config.model.trust_remote_code)
        architecture = read_architecture(hf_config)
        self.vocab_size = architecture.vocab_size
        for later in self.stages[self.stage.number + 1 :]:  # its mistakes too are told before anything is trained
            check_folder(later.config, architecture)
            read_stage_data(later.config, self.tokenizer, self.vocab_size)
            if later.config.rewards != self.config.rewards:
                _tested_scorer(later.config).close()
        heads = hidden_stream.read_heads(
            [s.config for s in self.stages[self.stage.number :]], architecture, self.tokenizer
        )
        for stage in self.remaining_stages():
            check_engine(stage.config, size(groups.world))
        self._load_data()
        self.scorer = _tested_scorer(self.config)
        self.trainer = Trainer(self.config, groups)
        self.hidden_stream = hidden_stream.HiddenStream(heads, self.trainer)
        self.old_policy, self.router = OldPolicy(self.config), Router(self.config.objective)
        arrays = self.saves.restore(self.trainer) if found else {}
        self.old_policy.restore(arrays)
        self.router.restore(arrays)
        self.data.prompts(self.router.waiting)
        self.hidden_stream.begin(self.config, arrays)
        self.timer = Timer()
        equip = self.hidden_stream.equip
        self.sampler = Sampler(self.config, self.tokenizer, self.trainer, groups.world, self.timer, equip)
        self.sampler.restore(arrays, self.saves.folder)
        self.accounting: Counter[str] = Counter()
        self.sampling: dict[str, float] = {}
        self.routing: dict[str, float] = {}
        self.sink = self._open_sink(config)
        self.parity = ParityGate(self.timer)
        self.stop = StopRequest()

    # ------------------------------------------------------------ the loop's stages

    def remaining_stages(self) -> list[Stage]:
        return self.stages[self.stage.number :]

    def begin_stage(self, stage: Stage) -> None:
        """Switch to a stage's settings; the first one of this process is already set up."""
        if stage is not self.stage:
            before = self.config
            self.stage, self.config, self.stage_step, self.parity.due = stage, stage.config, 0, True
            self._load_data()
            if self.config.rewards != before.rewards:
                self.scorer.close()
                self.scorer = _tested_scorer(self.config)
            self.trainer.begin_stage(self.config, self.config.steps)
            self.hidden_stream.begin_stage(self.config)
            self.old_policy, self.router = OldPolicy(self.config), Router(self.config.objective)
            self.sampler.begin_stage(self.config)
        for remark in (*remarks(self.config), *hidden_stream.remarks(self.config)) if is_main() else ():
            log.warning("stage %s: %s", stage.name, remark)
        self._guard()
        if self.step == 0:
            self._evaluate()

    def remaining_steps(self, stage: Stage) -> Iterator[int]:
        while self.stage_step < stage.config.steps:
            yield self.stage_step

    def next_prompts(self) -> list[Prompt]:
        self.batches_drawn += 1
        return self.sampler.prompts(self.data.stream, self.batches_drawn - 1)

    def roll_out(self, prompts: list[Prompt], sampled: Sequence[Prompt] = ()) -> list[Group]:
        """Sample completions with the current weights and attach each prompt's demonstration of this step.

        Args:
            sampled: prompts of the step's earlier draws; one that comes again gets other completions.
        """
        if not self.stage.samples_rollouts:
            return self.data.demonstrated(prompts, self.step)
        ahead = self.config.steps_ahead and self.stage_step + 1 < self.config.steps
        upcoming = self.sampler.prompts(self.data.stream, self.batches_drawn) if ahead else None
        return self.sampler.sample(prompts, self.step, sampled, upcoming)

    def score(self, groups: list[Group]) -> list[Group]:
        """Verify every answer; each rank takes its share. SFT needs no scores."""
        if not self.stage.samples_rollouts:
            return groups
        with self.timer("score"):
            groups, counts = score_over_ranks(self.scorer, groups, self.groups.world)
        self.accounting.update(counts)
        return groups

    def refill(self, groups: list[Group]) -> list[Group]:
        """DAPO's dynamic sampling: more groups in place of those with answers all right or all wrong."""
        batch = self.config.batch
        if not batch.dynamic_sampling:
            return groups

        sampled = [group.prompt for group in groups]

        def sample() -> list[Group]:
            prompts = self.next_prompts()
            more = self.score(self.roll_out(prompts, sampled))
            sampled.extend(prompts)
            return more

        groups, self.sampling = refill(groups, sample, batch.prompts_per_step, batch.max_draws)
        return groups

    def measure(self, sequences: list[TrainingSequence], stage_step: int) -> list[TrainingSequence]:
        """The sequences with what is measured before the step: log-probs of this policy, the old one, the reference."""
        self.trainer.refresh_reference(stage_step)

        def findings() -> tuple[str, ...]:
            return investigate(self.sampler.engine, self.trainer, sequences, self.config, self.groups.world)

        def afresh() -> list[TrainingSequence]:
            count = self.config.batch.prompts_per_step
            return self.sampler.afresh(self.data.stream.batch(self.batches_drawn - 1, count))

        others = afresh if self.sampler.staleness else None
        measured = self.parity.check(sequences, self.config, self.step, self.trainer.measure, findings, others)
        if self.stage.samples_rollouts:
            self.sampler.rest()
        sequences = self._add_old_policy(sequences, stage_step)
        with self.timer("measure"):
            return self.trainer.prepare(sequences, measured)

    def reward_hidden_states(
        self, groups: list[Group], sequences: list[TrainingSequence], stage_step: int
    ) -> list[Group]:
        """The groups with the hidden-state reward, which was measured with the log-probs, in their scores."""
        return self.hidden_stream.merge(groups, sequences, stage_step)

    def select(self, sequences: list[TrainingSequence], groups: list[Group]) -> list[TrainingSequence]:
        """HPT: of each prompt either the completions or the demonstration. ReLIFT: the completions; prompts queue."""
        sequences, self.routing = self.router.select(sequences, groups)
        return sequences

    def update(self, sequences: list[TrainingSequence], stage_step: int) -> dict[str, float]:
        queued = self.data.prompts(self.router.take())
        demonstrations = to_sequences(self.data.demonstrated(queued, self.step))
        with self.timer("train"):
            metrics = self.trainer.step(sequences, stage_step, demonstrations)
        return {**metrics, "count/tokens": sum(len(s.token_ids) for s in [*sequences, *demonstrations])}

    def finish_step(self, groups: list[Group], metrics: dict[str, float]) -> None:
        """Log the step, evaluate where that is due, guard its figures, and save and export where that is due."""
        hidden = self.hidden_stream.end_step(self.stage_step, self.timer)
        metrics = {**metrics, **group_statistics(groups), **self.parity.take(), **self.accounting}
        metrics |= {**self.sampling, **self.routing, **hidden, **self.sampler.metrics()}
        self.accounting, self.sampling, self.routing = Counter(), {}, {}
        seconds = self.timer.take()
        metrics |= {"ranks": size(self.groups.world), **seconds}
        between_steps = seconds.get("time/evaluate", 0.0) + seconds.get("time/save", 0.0)
        metrics["tokens/s"] = metrics["count/tokens"] / (seconds["time/step"] - between_steps)
        self.sink.log(self.step, metrics, self.stage.name)
        if is_main():
            log_samples(self.folder, self.step, groups, self.config.logging.sample_rollouts)
            every = self.config.rollout.dump_every
            if every and self.stage.samples_rollouts and self.step % every == 0:
                dump(groups, self.folder / "rollouts" / f"step-{self.step:06d}.jsonl.zst")
        left = self.router.remark(self.stage_step, self.config.steps)
        clipped = self.old_policy.watch(self.stage_step, metrics)
        for remark in filter(None, (clipped, left, self.hidden_stream.remark())):
            if is_main():
                log.warning("stage %s: %s", self.stage.name, remark)
        self.step, self.stage_step = self.step + 1, self.stage_step + 1
        if _due(self.step, self.config.evaluation.every) and self.step < self.total_steps:
            self._evaluate()
        # Before anything is saved: a run that is killed here goes on before this step, and exports then.
        checkpoint, ended = self.config.checkpoint, self.stage_step == self.stage.config.steps
        due = _due(self.step, checkpoint.export_every) or (ended and checkpoint.export_stages)
        if due and self.step < self.total_steps:
            self.trainer.export_hf(self.folder / "hf" / f"step-{self.step:06d}")
        limits = self.config.accounting
        self._guard(find_problem(metrics, self.trainer.skipped_in_a_row, self.step, limits))
        if _due(self.step, checkpoint.every) and self.step < self.total_steps:
            self._save()

    def interrupted(self) -> bool:
        """Whether any rank was asked to stop (SIGTERM, SIGUSR1, Ctrl-C); if so the state is saved first."""
        flag = torch.tensor([int(self.stop.asked)], device=parallel.device())
        if not all_reduce(flag, self.groups.world, "max").item():
            return False
        self._save()
        if is_main():
            log.warning("stopped by a signal after step %d; run the same command to go on", self.step)
        return True

    def finish(self) -> None:
        """Last evaluation, checkpoint, Hugging Face folder and report."""
        self._evaluate()
        self._save()
        self.trainer.export_hf(self.folder / "hf" / "final")
        if is_main():
            print(f"report: {write_report(self.folder)}")
            print(f"model:  {self.folder / 'hf' / 'final'}", flush=True)

    # ------------------------------------------------------------ parts of the stages

    def _add_old_policy(self, sequences: list[TrainingSequence], stage_step: int) -> list[TrainingSequence]:
        """PSFT, SFT-KL: demonstrations with their log-probs under the old policy, which is refreshed when it is due."""
        if self.old_policy.window(stage_step) is None:
            return sequences
        begun = self.batches_drawn - 1 - stage_step

        def upcoming(later: int) -> list[TrainingSequence]:
            prompts = self.data.stream.batch(begun + later, self.config.batch.prompts_per_step)
            return to_sequences(self.data.demonstrated(prompts, self.step - stage_step + later))

        with self.timer("refresh"):
            return self.old_policy.attach(sequences, stage_step, self.trainer.measure, upcoming)

    def _evaluate(self) -> None:
        if not self.data.held_out:
            return
        self.sampler.sync()
        config = self.config
        with self.timer("evaluate"):
            result = evaluate(
                self.sampler.engine,
                self.scorer,
                self.data.held_out,
                config.evaluation,
                config.rollout,
                config.seed,
                self.groups.world,
            )
        self.sink.log(self.step, result.metrics(), self.stage.name)
        if is_main():
            result.write_json(self.folder / "evaluations" / f"step-{self.step:06d}.json")

    def _guard(self, problem: str | None = None) -> None:
        """Stop the run, saved, for this problem or a reward head too old for the next step; on every rank alike."""
        if problem is None and self.stage_step < self.config.steps:
            problem = self.hidden_stream.problem()
        if problem is not None:
            self._save()
            raise RunStopped(f"{problem}. The state is saved; the run can be resumed with other settings")

    def _save(self) -> None:
        progress = Progress(
            step=self.step,
            stage=self.stage.name,
            stage_step=self.stage_step,
            policy_version=self.trainer.policy_version,
            batches_drawn=self.batches_drawn,
            skipped_in_a_row=self.trainer.skipped_in_a_row,
        )
        with self.timer("save"):
            arrays = self.old_policy.arrays(self.stage_step) | self.router.arrays() | self.hidden_stream.arrays()
            arrays |= self.sampler.arrays()
            self.saves.write(self.trainer, progress, arrays)

    # ------------------------------------------------------------ setting up and leaving

    def _load_data(self) -> None:
        self.data = read_stage_data(self.config, self.tokenizer, self.vocab_size)
        if is_main():
            self.data.print_reports()

    def _open_sink(self, config: RunConfig) -> MetricSink | NullSink:
        if not is_main():
            return NullSink()
        self.folder.mkdir(parents=True, exist_ok=True)
        text = configuration.to_yaml(config if config.stages else config.resolved())
        (self.folder / "config.yaml").write_text(text, encoding="utf-8")
        return MetricSink(
            self.folder,
            config.logging,
            total_steps=self.total_steps,
            start_step=self.step,
            settings=configuration.to_dict(config),
        )

    def __enter__(self) -> "Session":
        self.stop.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop.__exit__(*exception)
        self.scorer.close()
        if exception[0] is None:  # otherwise other ranks may not come to where an engine's groups are taken apart
            self.sampler.close()
        self.sink.close()
        self.saves.close()


def _tested_scorer(config: RunConfig) -> Scorer:
    scorer = Scorer(config.rewards)
    scorer.self_test()
    return scorer


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
