"""The engine: accelerate is the face, DeepSpeed ZeRO 1 to 3 or plain data parallel behind it, one loop for all.

Kept in our own hands, because the libraries' versions proved wrong or weak: the learning rate, the clip value, the
moving average, checkpoints and time-outs. The DeepSpeed dictionary is a pure function, never "auto".
"""

import importlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.build import checkpoint_activations
from models.objectives.batch import Batch, Outcome, Progress
from pipeline.checkpoints.checkpoint import frozen_tensors
from pipeline.checkpoints.fragments import TrainingState
from pipeline.config.deepspeed import LOSS_SCALE_FLOOR, LOSS_SCALE_START_POWER, deepspeed_config
from pipeline.config.plan import BatchPlan
from pipeline.config.training import TrainingConfig
from pipeline.errors import InputError
from pipeline.supervision.watchdog import collective_time_out
from pipeline.telemetry.clock import StepClock
from pipeline.training.compilation import as_if_not_compiled, compile_in_place, make_leaves
from pipeline.training.optimizer import build_optimizer, parameter_groups

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LOSS, STOP, SKIPPED = "step/loss", "step/stop", "step/skipped"  # beside an objective's own sums
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class StepResult(NamedTuple):
    """One optimizer step, agreed on by all ranks."""

    loss: float  # mean over the global batch
    gradient_norm: float  # before clipping
    skipped: bool  # a loss or gradient was not finite, on any rank, and the weights were left alone
    stop: bool  # some rank was asked to stop
    sums: dict[str, float]  # the objective's sums and the counts given, over the global batch
    loss_scale: float | None = None  # of fp16, after the step


class Engine:
    """A module, its optimizer and its place in the world. Collective: every rank must make and call it alike."""

    def __init__(
        self, module: nn.Module, config: TrainingConfig, plan: BatchPlan, *, precision: str,
        compile_backend: str | None = None, enter: Callable[[str], None] = lambda part: None,
    ):  # fmt: skip
        """`compile_backend`: see `compile_in_place`; None runs the module as it is. `enter`: see `StepClock`."""
        assert all(name in os.environ for name in RANK_VARIABLES), f"a launcher must set {RANK_VARIABLES}"
        self.config, self.plan, self.module, self.stage = config, plan, module, config.zero.stage
        self.compute_dtype = DTYPES[precision]
        if self.stage:
            _import_deepspeed()
        if config.deterministic:
            _be_deterministic()
        if config.activation_checkpointing:
            try:
                checkpoint_activations(module)
            except ValueError as error:
                raise InputError(f"activation_checkpointing: {error}; set it to false") from None
        if self.stage == 3:
            make_leaves(module)
        self._frozen = frozen_tensors(module) if os.environ["RANK"] == "0" else {}  # who writes them
        self.accelerator = _accelerator(module, plan, config, precision)
        self.device: torch.device = self.accelerator.device
        # A teacher is no part of the module that DeepSpeed takes: it is not trained, and not cast with it.
        place_teacher = getattr(module, "place_teacher", lambda device, dtype: {})
        follower = place_teacher(self.device, self.compute_dtype)
        assert self.accelerator.num_processes == plan.world_size, "accelerate did not see the whole world"
        groups = parameter_groups(module, config.optimizer, config.encoder.depth)
        # The loader is never prepared: its positions are already those of this rank.
        optimizer = build_optimizer(groups, config.optimizer)
        if self.stage == 0 and plan.world_size == 1:  # nobody to average with: DDP's hooks would be for nothing
            self.wrapped = self.accelerator.prepare_model(module, evaluation_mode=True)
            self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        else:
            self.wrapped, self.optimizer = self.accelerator.prepare(module, optimizer)
        if self.stage == 0:  # undo accelerate's autocast around forward, which no graph can hold; `step` has its own
            self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        # Contexts of 16-bit computing without ZeRO, and of accumulation under ddp, where gradients are exchanged once.
        self._autocast = self.accelerator.autocast if self.accelerator.native_amp else nullcontext
        self._forward = _within(self._autocast, self.wrapped) if self.accelerator.native_amp else self.wrapped
        self._unsynchronised = nullcontext if self.stage else getattr(self.wrapped, "no_sync", nullcontext)
        self._uncompiled: Callable[[], Any] = nullcontext
        if compile_backend is not None:
            compile_in_place(module, self.stage, compile_backend)
            self._uncompiled = as_if_not_compiled
        _set_time_out()
        base = self.optimizer.optimizer if self.stage == 0 else self.optimizer.optimizer.optimizer
        self.clock = StepClock(self.device, enter)
        self.before_change: Callable[[], None] = lambda: None  # called before anything changes the weights or moments
        if self.stage == 0 and self.accelerator.scaler is None:
            self.optimizer = base  # accelerate's wrapper searches the disk for a package at every step
        self.parameters = list(module.parameters())
        self._norm_limit = config.optimizer.max_grad_norm or math.inf
        self._ranks = getattr(module, "ranks", None)  # of adalora
        self._share = torch.tensor(1 / plan.gradient_accumulation_steps, device=self.device)  # of a micro-batch
        self.state = TrainingState(
            self.wrapped, module, base, self.stage, averages=config.keeps_average, follower=follower
        )  # fmt: skip
        self.state.check_coverage()

    @property
    def frozen(self) -> dict[str, Tensor]:
        """What no optimizer changes, whole: parameters as they were, and buffers as they are; on rank 0 alone.

        Statistics of a BatchNorm are a rank's own; those of rank 0 are saved, and every rank goes on from them.
        """
        buffers = {n: b for n, b in self.module.named_buffers() if n in self._frozen}
        return self._frozen | {n: b.detach().to("cpu", self._frozen[n].dtype, copy=True) for n, b in buffers.items()}

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    def step(
        self, batches: Iterable[Batch], learning_rate: float, *, stop: bool,
        counts: Callable[[], Mapping[str, float]] = dict, progress: Progress | None = None,
    ) -> StepResult:  # fmt: skip
        """One optimizer step over exactly `gradient_accumulation_steps` micro-batches, one at a time. Collective.

        `counts()`, asked for behind the last batch, are this rank's numbers to be added up over all ranks, like the
        objective's sums and with them; the names must be the same on every rank. `progress` is that of the run with
        this step, for an objective whose teacher is the moving average of the weights, and for adalora.
        """
        self.state.set_learning_rate(learning_rate)
        if not self.module.training:  # DeepSpeed's engine says that it is, also after `eval`; and `train` visits all
            self.wrapped.train()
        totals: dict[str, Tensor] = {}
        norm = math.nan
        taken = 0
        self.clock.begin("data")
        for batch in batches:
            taken += 1
            if taken < self.plan.gradient_accumulation_steps:
                with self._unsynchronised():
                    _add(self._learn(batch, last=False), totals)
                self.clock.begin("data")
            else:
                _add(self._learn(batch, last=True), totals)
                self.clock.begin("update")
                norm = self._update(progress)
        assert taken == self.plan.gradient_accumulation_steps, f"{taken} micro-batches"
        skipped = not math.isfinite(norm)
        if not skipped:
            if self.state.average:
                self.state.update_average(self._average_decay(progress))
        elif (scale := self.loss_scale()) is not None and scale <= LOSS_SCALE_FLOOR:
            raise FloatingPointError(
                f"the loss scale of fp16 fell to its floor, {LOSS_SCALE_FLOOR}, and the gradient is still not finite; "
                "set precision to bf16 or fp32, or lower optimizer.learning_rate"
            )
        result = self._agree(norm, {STOP: stop, SKIPPED: skipped, **totals, **counts()})
        self.clock.end()
        return result

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[Batch, Tensor]]) -> dict[str, float]:
        """`loss`, the objective's sums and `count` over the samples of all ranks, of the averaged weights if there are.

        Collective: every rank gives as many batches, each with a (B,) bool that is false where a row only pads.
        """
        self.wrapped.eval()
        self.before_change()
        totals: dict[str, Tensor] = {}
        with self.state.averaged():
            for batch, counted in batches:
                outcome = self._forward(batch)
                losses = outcome.losses.double() * counted
                _add(outcome.sums | {"loss": losses.sum(), "count": counted.sum()}, totals)
        return self.add_up(totals)

    @contextmanager
    def asking(self) -> Iterator[Callable[[Callable[[Batch], Any], Batch], Any]]:
        """`ask(look, batch)`: what `look` makes of a batch inside the network's forward, of its averaged weights if
        there are. Not compiled, without gradients; look gives tensors. Collective: every rank asks as often.
        """
        self.wrapped.eval()
        self.before_change()
        with torch.no_grad(), self.state.averaged(), self._uncompiled():
            yield self._ask

    def _ask(self, look: Callable[[Batch], Any], batch: Batch) -> Any:
        with self._autocast():
            if self.stage < 3:
                return look(batch)
            self.module.forward = look  # ZeRO-3's hooks, which gather weights, must find a forward of the whole module
            try:
                return self.wrapped(batch)
            finally:
                del self.module.forward

    def add_up(self, numbers: Mapping[str, Any]) -> dict[str, float]:
        """Each number's sum over all ranks, which give the same names. One collective."""
        if self.plan.world_size == 1:
            return {name: float(number) for name, number in numbers.items()}
        tensors = {name: numbers[name].double() for name in sorted(numbers) if isinstance(numbers[name], Tensor)}
        others = {name: numbers[name] for name in sorted(numbers) if name not in tensors}
        packed = torch.tensor([*others.values()], dtype=torch.float64, device=self.device)
        if tensors:
            packed = torch.cat([packed, torch.stack([*tensors.values()])])
        dist.all_reduce(packed)
        return dict(zip([*others, *tensors], packed.tolist(), strict=True))

    def loss_scale(self) -> float | None:
        """What fp16 multiplies the loss by, so that small gradients do not vanish; None in any other precision."""
        if self.compute_dtype != torch.float16:
            return None
        return self.accelerator.scaler.get_scale() if self.stage == 0 else float(self.wrapped.optimizer.loss_scale)

    def _average_decay(self, progress: Progress | None) -> float:
        if not self.config.objective.averages_teacher:
            return self.config.ema_decay
        assert progress is not None, f"{self.config.objective.kind} must know how far the run is"
        return self.module.teacher_momentum(progress)

    def _learn(self, batch: Batch, *, last: bool) -> dict[str, Tensor]:
        """Forward and backward of one micro-batch: its loss and sums. Its graph is gone when this returns."""
        self.clock.begin("forward")
        outcome = self._forward(batch)
        self.clock.begin("backward")
        loss = outcome.loss.detach()
        self._backward(outcome.loss, loss, last)
        return {LOSS: loss, **outcome.sums}

    def _backward(self, loss: Tensor, value: Tensor, last: bool) -> None:
        """Add the gradient of one micro-batch; behind the `last` it is that of the mean over them, and over ranks.

        `value` is the loss, detached.
        """
        # A loss that is not finite makes the gradient so, on every rank, however it came about: 0 times it is NaN.
        if self.stage:
            loss.register_hook(lambda gradient: torch.add(gradient, value, alpha=0))
            accumulates = self.plan.gradient_accumulation_steps > 1
            if accumulates:  # else DeepSpeed knows by itself
                self.wrapped.set_gradient_accumulation_boundary(last)
            self.wrapped.backward(loss, scale_wrt_gas=accumulates)
            return
        share = torch.add(self._share, value, alpha=0)
        if self.accelerator.scaler:
            loss = self.accelerator.scaler.scale(loss)
        loss.backward(share)

    def _update(self, progress: Progress | None) -> float:
        """Clip, and update the weights unless the gradient is not finite. Its norm before clipping.

        DeepSpeed does both by its own configuration, and the scaler of fp16 skips by itself.
        """
        if self.stage:
            self.before_change()
            self.wrapped.step()
            return float(self.wrapped.get_global_grad_norm())
        if self.accelerator.scaler:
            self.accelerator.unscale_gradients(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self._norm_limit).item()
        self.before_change()
        ranks = self._ranks if math.isfinite(norm) else None
        if ranks is not None:
            ranks.observe(progress.seen)
        if self.accelerator.scaler or math.isfinite(norm):
            self.optimizer.step()
        if ranks is not None:
            ranks.allocate(progress.seen)
        self.optimizer.zero_grad()
        return norm

    def _agree(self, norm: float, sums: Mapping[str, Any]) -> StepResult:
        """Loss, stop and skip flags and the other sums in one collective."""
        totals = self.add_up(sums)
        loss_sum, stops, skips = totals.pop(LOSS), totals.pop(STOP), totals.pop(SKIPPED)
        micro_batches = self.plan.world_size * self.plan.gradient_accumulation_steps
        return StepResult(loss_sum / micro_batches, norm, skips > 0, stops > 0, totals, self.loss_scale())


def _add(values: Mapping[str, Tensor], totals: dict[str, Tensor]) -> None:
    for name, value in values.items():
        value = value.detach() if value.requires_grad else value
        totals[name] = totals[name].double() + value if name in totals else value


def _within(context: Callable[[], Any], wrapped: nn.Module) -> Callable[[Batch], Outcome]:
    def forward(batch: Batch) -> Outcome:
        with context():
            return wrapped(batch)

    return forward


def _be_deterministic() -> None:
    """Before the first kernel runs: cuBLAS reads its variable when it makes its workspace."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what was not written


def _accelerator(module: nn.Module, plan: BatchPlan, config: TrainingConfig, precision: str) -> Any:
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs, GradScalerKwargs, InitProcessGroupKwargs

    AcceleratorState._reset_state(reset_partial_state=True)  # several runs may follow each other in one process,
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # with DeepSpeed and without
    cuda = torch.cuda.is_available()
    # Without an explicit backend accelerate takes every rank for the only one on a processor without accelerators.
    group = InitProcessGroupKwargs(backend="nccl" if cuda else "gloo", timeout=collective_time_out())
    if config.zero.stage == 0:
        return Accelerator(
            cpu=not cuda,
            mixed_precision="no" if precision == "fp32" else precision,
            gradient_accumulation_steps=plan.gradient_accumulation_steps,
            kwargs_handlers=[
                group,
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # else gradients are there twice
                GradScalerKwargs(init_scale=2.0**LOSS_SCALE_START_POWER),
            ],
        )
    import deepspeed

    if not cuda:  # its only use is inference, and it would need a C++ compiler at run time
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    dictionary = deepspeed_config(config, plan, precision=precision, parameters=trained, cuda=cuda)
    return Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=dictionary, zero3_init_flag=False),
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        kwargs_handlers=[group],
    )


def _import_deepspeed() -> None:
    """Without MLflow, which its autotuning imports where it is installed: three seconds of the start of every rank."""
    kept = {name: sys.modules[name] for name in ("mlflow",) if name in sys.modules}
    sys.modules["mlflow"] = None
    try:
        importlib.import_module("deepspeed")
    finally:
        del sys.modules["mlflow"]
        sys.modules.update(kept)


def _set_time_out() -> None:
    """DeepSpeed clones the world group without its time-out (half an hour under gloo); set it on every group."""
    if not dist.is_initialized():
        return
    from torch.distributed import distributed_c10d

    set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout  # public from torch 2.15 on
    for group in list(distributed_c10d._world.pg_map):
        set_timeout(collective_time_out(), group)
