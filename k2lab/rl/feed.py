"""The feed of reinforcement learning: samples with the weights in training, scores, and packs rollouts as micro-batches.

Everything that it gives is a function of the weights, the seed, the step and its cursor, so a killed run that comes back to a
checkpoint draws the same rollouts again. Tasks follow one global order and are dealt to ranks; a task's group stays on one rank,
because its statistics do. Which rollouts share a sampler's batch depends on the number of ranks and moves log-probabilities by
rounding; draws do not depend on it. In an update the responses of a group share one copy of their prompt if the model can
(`data.branches`); else each has its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from k2lab.core.rng import rng
from k2lab.core.types import Batch, Group, Rollout, Sample, SampleParams, StopReason
from k2lab.data.branches import branched, continues, stem_length
from k2lab.data.pack import pack
from k2lab.data.samples import ptx_sample, rl_sample
from k2lab.dist import mesh
from k2lab.gym.rollouts import roll_out
from k2lab.gym.task import Task
from k2lab.rl.advantages import Advantages, has_signal
from k2lab.rl.shaping import Budget, Temperature

GIVES = frozenset({"logprobs", "advantages", "ptx"})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How rollouts are drawn and used; what the fields mean is said in `stages/rl.py`. `typical` {family: tokens} is the toggle's
    budget, `name` goes into every draw, `seq_len` bounds a sample and `tokens_per_batch` a micro-batch."""

    name: str
    seed: int
    total_steps: int
    group_size: int
    tasks_per_step: int
    seq_len: int
    tokens_per_batch: int
    temperature: Temperature = field(default_factory=Temperature)
    top_p: float = 1.0
    budget: Budget = field(default_factory=Budget)
    advantages: Advantages = field(default_factory=Advantages)
    drop_zero_signal: bool = False
    refill_rounds: int = 0
    max_policy_lag: int = 0
    default_system: bool = False
    tools: tuple[Any, ...] = ()
    max_turns: int = 1
    sample_batch: int = 256
    typical: dict[str, float] = field(default_factory=dict)


class PtxStream:
    """Samples beside the rollouts, at least `tokens` trained tokens per step, in the order `order(epoch) -> indices`."""

    def __init__(self, samples: Sequence[Sample], order: Callable[[int], np.ndarray], tokens: int) -> None:
        assert len(samples) and tokens > 0, "a stream without samples is no stream"
        self.samples, self.order, self.tokens = samples, order, tokens
        self.seek({"epoch": 0, "index": 0})

    def take(self) -> list[Sample]:
        """The samples of the next step, over all ranks."""
        taken: list[Sample] = []
        trained = 0
        while trained < self.tokens:
            while self._index >= len(self._indices):
                self.seek({"epoch": self._epoch + 1, "index": 0})
            sample = self.samples[int(self._indices[self._index])]
            self._index += 1
            taken.append(ptx_sample(sample))
            trained += int(np.count_nonzero(sample.weight))
        return taken

    def cursor(self) -> dict[str, int]:
        return {"epoch": self._epoch, "index": self._index}

    def seek(self, cursor: dict[str, int]) -> None:
        self._epoch, self._index = cursor["epoch"], cursor["index"]
        self._indices = self.order(self._epoch)


@dataclass
class Drawn:
    """A step's rollouts of one rank, or of all: samples with their streams, each with the place of its task in the global order;
    the policy that drew them; sums for `facts`, and the longest response."""

    version: int
    samples: list[tuple[int, Sample]] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    longest: int = 0

    def count(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(amount)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; its floats are exact."""
        rows = []
        for place, sample in self.samples:
            arrays = {"tokens": sample.tokens, "weight": sample.weight, **sample.streams}
            rows.append({"place": place, "key": sample.key, "source": sample.source} | {n: a.tolist() for n, a in arrays.items()})
        return {"version": self.version, "samples": rows, "sums": self.sums, "longest": self.longest}

    @staticmethod
    def from_json(table: dict[str, Any]) -> Drawn:
        """What `to_json` gave."""
        samples = []
        for row in table["samples"]:
            streams = {name: np.array(row[name], np.float32) for name in sorted(GIVES)}
            tokens, weight = np.array(row["tokens"], np.int32), np.array(row["weight"], np.float32)
            samples.append((row["place"], Sample(tokens, weight, row["key"], row["source"], streams)))
        return Drawn(table["version"], samples, dict(table["sums"]), table["longest"])


class RolloutFeed:
    """The `Feed` protocol over rollouts: `take` returns as many micro-batches as the step's samples fill.

    `tasks` differ in key; `meta["domain"]` is their family and `max_tokens` their budget. Call `attach(model)` with the
    `TrainModel` before the first `take`. With `max_policy_lag` 1 the rollouts of a step are drawn by the weights of the step
    before, as a sampler that works beside the trainer would: they travel in the cursor, for all ranks. `note(text)` is told once
    what went wrong in rollouts, and `begun()` is called at the first take of a run.
    """

    gives = GIVES
    microbatches = 0  # not known beforehand

    def __init__(
        self,
        tasks: Sequence[Task],
        tokenizer: Any,
        settings: Settings,
        *,
        ptx: PtxStream | None = None,
        rank: int = 0,
        world: int = 1,
        note: Callable[[str], None] = lambda text: None,
        begun: Callable[[], None] = lambda: None,
    ) -> None:
        self.tasks, self.tokenizer, self.settings, self.ptx = tasks, tokenizer, settings, ptx
        self.rank, self.world, self.note, self.begun = rank, world, note, begun
        self.sampler: Any = None
        self.shares_stems = False  # the model attends from the responses of a group to one copy of their prompt
        self._step = self._position = 0
        self._held: Drawn | None = None  # drawn ahead, of all ranks
        self._facts: dict[str, float] = {}
        self._told = False
        self._orders: dict[int, np.ndarray] = {}

    def attach(self, model: Any) -> None:
        """Samples from this model's own weights from now on."""
        from k2lab.sampling.local import LocalSampler

        self.sampler = LocalSampler(model.hf, self.tokenizer.pad_id, self.settings.sample_batch, eos_id=self.tokenizer.im_end_id)
        self.shares_stems = model.shares_stems

    # ------------------------------------------------------------ the Feed protocol

    def take(self, num: int | None = None) -> list[Batch]:
        """This rank's micro-batches of the next step; the cursor moves past all ranks' tasks."""
        assert self.sampler is not None, "attach the model first"
        if self._step == 0:
            self.begun()
        began = time.perf_counter()
        drawn = self._mine(self._held) if self._held is not None else self._draw(self._step)
        ahead = self.settings.max_policy_lag > 0 and self._step + 1 < self.settings.total_steps
        self._held = _of_all_ranks(self._draw(self._step)) if ahead else None
        samples = [sample for _, sample in sorted(drawn.samples, key=lambda each: each[0])]
        extra = self.ptx.take()[self.rank :: self.world] if self.ptx is not None else []
        self._facts = self._totals(drawn, time.perf_counter() - began)
        self._step += 1
        return self._packed([*samples, *extra])

    def cursor(self) -> dict[str, Any]:
        """Step, position in the order of tasks, position among PTX samples, and rollouts drawn ahead (of all ranks)."""
        return {
            "step": self._step,
            "position": self._position,
            "ptx": self.ptx.cursor() if self.ptx is not None else None,
            "held": None if self._held is None else self._held.to_json(),
        }

    def seek(self, cursor: dict[str, Any]) -> None:
        """Continues from `cursor`."""
        self._step, self._position = cursor["step"], cursor["position"]
        if self.ptx is not None:
            self.ptx.seek(cursor["ptx"])
        self._held = None if cursor["held"] is None else Drawn.from_json(cursor["held"])

    @property
    def epoch(self) -> float:
        """Passes over the tasks so far."""
        return self._position / len(self.tasks)

    def facts(self) -> dict[str, float]:
        """About the step that was taken last, over all ranks: `reward` (mean, before shaping), `shaped_reward`, `pass_rate`
        (share with reward 1), `length` and `length_max` (tokens that the model wrote), `truncated` and `zero_signal` (shares of
        rollouts and groups), `errors` and `too_long` (rollouts left out), `rollouts`, `groups`, `temperature`, `lag`,
        `sample_seconds`."""
        return dict(self._facts)

    # ------------------------------------------------------------ rollouts

    def _next_tasks(self, count: int) -> list[tuple[int, Task]]:
        """(place, task) of the next tasks in the global order; a later pass over the tasks has keys of its own."""
        found = []
        for place in range(self._position, self._position + count):
            epoch, index = divmod(place, len(self.tasks))
            if epoch not in self._orders:
                self._orders = {epoch: rng(self.settings.seed, self.settings.name, "order", epoch).permutation(len(self.tasks))}
            task = self.tasks[int(self._orders[epoch][index])]
            found.append((place, replace(task, key=f"{task.key}@{epoch}") if epoch else task))
        self._position += count
        return found

    def _draw(self, version: int) -> Drawn:
        """The rollouts of one step under the present weights, of this rank."""
        s = self.settings
        drawn = Drawn(version)
        spare: list[tuple[int, Sample]] = []  # of groups without signal
        dropping = s.drop_zero_signal or s.refill_rounds > 0
        missing = s.tasks_per_step
        for turn in range(1 + s.refill_rounds):
            mine = self._next_tasks(missing)[self.rank :: self.world]
            found = 0
            for place, task, group in self._rolled(mine, version):
                samples, signal = self._scored(place, task, group, version, drawn)
                (drawn.samples if signal or not dropping else spare).extend(samples)
                found += signal
            missing -= int(mesh.sum_values({"found": float(found)})["found"])
            if missing <= 0 or turn == s.refill_rounds:
                break
        # A step in which no group says anything still has rollouts, so that there is something to count.
        if not mesh.agree(bool(drawn.samples)):
            drawn.samples = spare
        return drawn

    def _rolled(self, mine: list[tuple[int, Task]], version: int) -> list[tuple[int, Task, Group]]:
        if not mine:
            return []
        s = self.settings
        self.sampler.policy_version = version
        groups = roll_out(
            [task for _, task in mine],
            self.sampler,
            self.tokenizer,
            k=s.group_size,
            params=SampleParams(max_tokens=0, temperature=self._temperature(version), top_p=s.top_p),
            seed=s.seed,
            policy_version=version,
            tools=s.tools,
            max_turns=s.max_turns,
            default_system=s.default_system,
            keys_prefix=f"{s.name}/",
        )
        return [(place, task, group) for (place, task), group in zip(mine, groups, strict=True)]

    def _temperature(self, version: int) -> float:
        return self.settings.temperature.at(version, self.settings.total_steps)

    def _scored(self, place: int, task: Task, group: Group, version: int, drawn: Drawn) -> tuple[list[tuple[int, Sample]], bool]:
        """The group's samples with advantages, and whether it says anything. Rollouts with an error, or too long to train on, are
        left out; a group of fewer than two is nothing to compare."""
        s = self.settings
        failed = [rollout for rollout in group.rollouts if rollout.error]
        long = [rollout for rollout in group.rollouts if not rollout.error and len(rollout.tokens) > s.seq_len]
        good = [rollout for rollout in group.rollouts if not rollout.error and len(rollout.tokens) <= s.seq_len]
        drawn.count(errors=len(failed), too_long=len(long), groups=1)
        if failed and not self._told:
            self._told = True
            self.note(f"rollouts with an error are left out and counted; the first: task {task.key}: {failed[0].error}")
        if len(good) < 2:
            drawn.count(zero_signal=1)
            return [], False
        rewards_G = np.array([rollout.reward for rollout in good])
        lengths_G = np.array([_written(rollout) for rollout in good])
        cut_G = np.array([rollout.stop in (StopReason.LENGTH, StopReason.CONTEXT) for rollout in good])
        typical = s.typical.get(str(task.meta.get("domain", "")))
        shaped_G = s.budget.shaped(rewards_G, lengths_G, cut_G, task.max_tokens, version, typical)
        advantages_G = s.advantages.of(shaped_G)
        signal = has_signal(shaped_G)
        drawn.count(
            rollouts=len(good),
            reward=rewards_G.sum(),
            shaped=shaped_G.sum(),
            passed=(rewards_G >= 1).sum(),
            length=lengths_G.sum(),
            cut=cut_G.sum(),
            zero_signal=not signal,
        )
        drawn.longest = max(drawn.longest, int(lengths_G.max()))
        samples = []
        for rollout, advantage in zip(good, advantages_G.tolist(), strict=True):
            (sample,) = rollout.samples()
            sample = replace(sample, source=str(task.meta.get("domain", "")))
            samples.append((place, rl_sample(sample, advantage)))
        return samples, signal

    def _mine(self, drawn: Drawn) -> Drawn:
        """This rank's part of what all ranks drew: whole groups; the sums count once."""
        places = sorted({place for place, _ in drawn.samples})
        own = set(places[self.rank :: self.world])
        samples = [(place, sample) for place, sample in drawn.samples if place in own]
        return Drawn(drawn.version, samples, drawn.sums if self.rank == 0 else {}, drawn.longest)

    # ------------------------------------------------------------ packs and facts

    def _packed(self, samples: list[Sample]) -> list[Batch]:
        """Samples in order as packs of at most `tokens_per_batch` tokens, where neighbours share their prompt if the model can; a
        rank without any takes part with a pack that counts nothing, because sums go over all ranks."""
        packs: list[list[Sample]] = []
        size = 0
        for sample in samples:
            length = len(sample.tokens)
            if packs and self.shares_stems and continues(sample, packs[-1][-1]):
                length -= stem_length(sample)
            if not packs or size + length > self.settings.tokens_per_batch:
                packs.append([])
                size, length = 0, len(sample.tokens)
            packs[-1].append(sample)
            size += length
        if not packs:
            nothing = np.zeros(2, np.float32)
            idle = Sample(np.full(2, self.tokenizer.pad_id, np.int32), nothing, "idle", streams={"logprobs": nothing})
            packs = [[rl_sample(idle, 0.0)]]
        return [branched(each) if self.shares_stems else pack(each) for each in packs]

    def _totals(self, drawn: Drawn, seconds: float) -> dict[str, float]:
        import torch

        names = (
            "rollouts",
            "reward",
            "shaped",
            "passed",
            "length",
            "cut",
            "groups",
            "zero_signal",
            "errors",
            "too_long",
            "rounds",
        )
        sums = mesh.sum_values({name: drawn.sums.get(name, 0.0) for name in names})
        most = {"length_max": torch.tensor([float(drawn.longest)]), "seconds": torch.tensor([seconds])}
        mesh.reduce_tensors(most, "max")
        rollouts, groups = max(1.0, sums["rollouts"]), max(1.0, sums["groups"])
        facts = {
            "reward": sums["reward"] / rollouts,
            "shaped_reward": sums["shaped"] / rollouts,
            "pass_rate": sums["passed"] / rollouts,
            "length": sums["length"] / rollouts,
            "length_max": float(most["length_max"]),
            "truncated": sums["cut"] / rollouts,
            "zero_signal": sums["zero_signal"] / groups,
            "errors": sums["errors"],
            "too_long": sums["too_long"],
            "rollouts": sums["rollouts"],
            "groups": sums["groups"],
            "temperature": self._temperature(drawn.version),
            "lag": float(self._step - drawn.version),
            "sample_seconds": float(most["seconds"]),
        }
        return {name: round(value, 6) for name, value in facts.items()}


def _written(rollout: Rollout) -> int:
    """Tokens that the model wrote in a rollout."""
    return int(np.count_nonzero(rollout.weight))


def _of_all_ranks(drawn: Drawn) -> Drawn:
    """What all ranks drew, in the order of places: the same on every rank."""
    import torch.distributed as dist

    parts = [drawn]
    if dist.is_initialized():
        parts = [drawn] * dist.get_world_size()
        dist.all_gather_object(parts, drawn)
    samples = sorted((each for part in parts for each in part.samples), key=lambda each: each[0])
    whole = Drawn(drawn.version, samples, longest=max(part.longest for part in parts))
    for part in parts:
        whole.count(**part.sums)
    return whole
