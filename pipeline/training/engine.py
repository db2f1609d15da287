"""The engine: accelerate is the face, DeepSpeed ZeRO 1 to 3 or plain data parallel behind it, one loop for all.

Kept in our own hands, because the libraries' versions proved wrong or weak: the learning rate, the clip value, the
moving average, checkpoints and time-outs. The DeepSpeed dictionary is a pure function, never "auto".
"""

import datetime
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.objectives.batch import Batch
from pipeline.config.deepspeed import deepspeed_config
from pipeline.config.plan import BatchPlan
from pipeline.config.training import TrainingConfig
from pipeline.training.checkpoint import frozen_tensors
from pipeline.training.clock import StepClock
from pipeline.training.fragments import TrainingState
from pipeline.training.optimizer import build_optimizer, parameter_groups

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class StepResult(NamedTuple):
    """One optimizer step, agreed on by all ranks."""

    loss: float  # mean over the global batch
    gradient_norm: float  # before clipping
    skipped: bool  # a non-finite gradient was found and the weights were left alone
    stop: bool  # some rank was asked to stop
    sums: dict[str, float]  # the objective's sums and the counts given, over the global batch


class Engine:
    """A module, its optimizer and its place in the world. Collective: every rank must make and call it alike."""

    def __init__(self, module: nn.Module, config: TrainingConfig, plan: BatchPlan, *, precision: str):
        assert all(name in os.environ for name in RANK_VARIABLES), f"a launcher must set {RANK_VARIABLES}"
        self.config, self.plan, self.module, self.stage = config, plan, module, config.zero.stage
        self.compute_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.frozen = frozen_tensors(module)
        self.accelerator = _accelerator(plan, config, precision)
        assert self.accelerator.num_processes == plan.world_size, "accelerate did not see the whole world"
        optimizer = build_optimizer(
            parameter_groups(module, config.optimizer, config.encoder.depth), config.optimizer
        )  # fmt: skip
        # The loader is never prepared: its positions are already those of this rank.
        self.wrapped, self.optimizer = self.accelerator.prepare(module, optimizer)
        _set_time_out()
        base = self.optimizer.optimizer if self.stage == 0 else self.optimizer.optimizer.optimizer
        self.clock = StepClock(self.device)
        if self.stage:
            _begin_update_with_step(self.wrapped, self.clock)
        self.state = TrainingState(self.wrapped, module, base, self.stage, config.ema_decay)
        self.state.check_coverage()

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    def step(
        self, batches: Iterable[Batch], learning_rate: float, *, stop: bool,
        counts: Callable[[], Mapping[str, float]] = dict,
    ) -> StepResult:  # fmt: skip
        """One optimizer step over exactly `gradient_accumulation_steps` micro-batches, one at a time. Collective.

        `counts()`, asked for behind the last batch, are this rank's numbers to be added up over all ranks, like the
        objective's sums and with them; the names must be the same on every rank.
        """
        self.state.set_learning_rate(learning_rate)  # before backward: under DeepSpeed the update happens inside it
        self.wrapped.train()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        sums: dict[str, Any] = {}
        norm: Any = None
        taken = 0
        self.clock.begin("data")
        for batch in batches:
            taken += 1
            self.clock.begin("forward")
            with self.accelerator.accumulate(self.wrapped):
                with self.accelerator.autocast():
                    outcome = self.wrapped(batch)
                self.clock.begin("backward")
                self.accelerator.backward(outcome.loss)
                loss_sum += outcome.loss.detach().double()
                for name, value in outcome.sums.items():
                    sums[name] = sums.get(name, 0) + value.detach().double()
                self.clock.begin("update")
                if self.accelerator.sync_gradients:
                    norm = self._clip()
                if self.stage or norm is None or torch.isfinite(torch.as_tensor(norm)):
                    self.optimizer.step()
                self.optimizer.zero_grad()
            self.clock.begin("data")
        self.clock.begin("update")
        assert taken == self.plan.gradient_accumulation_steps, f"{taken} micro-batches"
        skipped = not torch.isfinite(torch.as_tensor(norm)).item()
        if not skipped:
            self.state.update_average()
        result = self._agree(loss_sum / taken, float(norm), skipped, stop, sums | counts())
        self.clock.end()
        return result

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[Batch, Tensor]]) -> dict[str, float]:
        """`loss`, the objective's sums and `count` over the samples of all ranks, of the averaged weights if there are.

        Collective: every rank gives as many batches, each with a (B,) bool that is false where a row only pads.
        """
        self.wrapped.eval()
        totals: dict[str, Any] = {}
        with self.state.averaged():
            for batch, counted in batches:
                with self.accelerator.autocast():
                    outcome = self.wrapped(batch)
                sums = outcome.sums | {"loss": (outcome.losses.double() * counted).sum(), "count": counted.sum()}
                for name, value in sums.items():
                    totals[name] = totals.get(name, 0) + value.double()
        names = sorted(totals)
        packed = torch.stack([totals[name] for name in names])
        if self.plan.world_size > 1:
            dist.all_reduce(packed)
        return dict(zip(names, packed.tolist(), strict=True))

    def _clip(self) -> Any:
        """The gradient's global norm before clipping. DeepSpeed clips by its own config and only reports here."""
        limit = self.config.optimizer.max_grad_norm
        return self.accelerator.clip_grad_norm_(self.wrapped.parameters(), limit if limit else float("inf"))

    def _agree(self, loss: Tensor, norm: float, skipped: bool, stop: bool, sums: dict[str, Any]) -> StepResult:
        """Loss, stop and skip flags and sums in one collective."""
        names = sorted(sums)
        pack = [loss / self.plan.world_size, float(stop), float(skipped), *(sums[name] for name in names)]
        packed = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in pack])
        if self.plan.world_size > 1:
            dist.all_reduce(packed)
        mean_loss, stops, skips, *totals = packed.tolist()
        return StepResult(mean_loss, norm, skips > 0, stops > 0, dict(zip(names, totals, strict=True)))


def _accelerator(plan: BatchPlan, config: TrainingConfig, precision: str) -> Any:
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs

    AcceleratorState._reset_state()  # several runs may follow each other in one process
    cuda = torch.cuda.is_available()
    # Without an explicit backend accelerate takes every rank for the only one on a processor without accelerators.
    group = InitProcessGroupKwargs(backend="nccl" if cuda else "gloo", timeout=collective_time_out())
    if config.zero.stage == 0:
        return Accelerator(
            cpu=not cuda,
            mixed_precision="bf16" if precision == "bf16" else "no",
            gradient_accumulation_steps=plan.gradient_accumulation_steps,
            kwargs_handlers=[group],
        )
    import deepspeed

    if not cuda:  # its only use is inference, and it would need a C++ compiler at run time
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dictionary = deepspeed_config(
        plan, config.zero.stage, precision=precision, max_grad_norm=config.optimizer.max_grad_norm, cuda=cuda
    )
    return Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=dictionary, zero3_init_flag=False),
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        kwargs_handlers=[group],
    )


def _begin_update_with_step(wrapped: Any, clock: StepClock) -> None:
    """accelerate calls DeepSpeed's `step` from within `backward`: that is where the update begins."""
    step = wrapped.step

    def marked_step(*arguments: Any, **options: Any) -> Any:
        clock.begin("update")
        return step(*arguments, **options)

    wrapped.step = marked_step


def collective_time_out() -> datetime.timedelta:
    """How long a rank waits for its peers before it takes them for lost."""
    return datetime.timedelta(seconds=float(os.environ.get("VIT_COLLECTIVE_TIMEOUT_SECONDS", "600")))


def _set_time_out() -> None:
    """DeepSpeed clones the world group without its time-out (half an hour under gloo); set it on every group."""
    if not dist.is_initialized():
        return
    from torch.distributed import distributed_c10d

    set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout  # public from torch 2.15 on
    for group in list(distributed_c10d._world.pg_map):
        set_timeout(collective_time_out(), group)
