"""Where the fp32 truth of a training state lives under each backend, as named one-dimensional fragments.

A fragment is a slice of one parameter's flat fp32 weight, its moments and its moving average that this rank owns.
Fragments know nothing of files; checkpoints are written and read in terms of them, so any world size and any ZeRO
stage reads what any other wrote. This is the only module that touches DeepSpeed's private attributes, and
`check_coverage` fails at start-up if they no longer mean what they meant in 0.19.8.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import all_gather_dp_groups
from torch import Tensor, nn

from pipeline.checkpoints.moments import moment_names, reset_moments, updates_of


class Fragment(NamedTuple):
    """Elements [start, start + count) of a parameter, held at `offset` of this rank's flat tensor number `flat`."""

    name: str
    start: int
    count: int
    flat: int
    offset: int


class Follower:
    """A network beside the one that learns, kept equal to the average of its weights: the teacher of some objectives.

    It is not saved. The average is, in fp32, so a resume begins with the same teacher at any world size; this brings
    the average, in the teacher's own precision, to where the teacher computes with it. Given are tensors by the names
    of the parameters whose average they hold, the same names on every rank.

    Where each rank holds all fragments they are `replicated`, else the ranks exchange theirs: one collective for a
    fill, of as many bytes as DeepSpeed's own gathering of as many weights.
    """

    def __init__(self, tensors: Mapping[str, Tensor], fragments: Sequence[Fragment], *, replicated: bool):
        self.tensors = tensors
        self.mine = [fragment for fragment in fragments if fragment.name in tensors]
        exchanged = tensors and not replicated and dist.is_initialized()
        self.of_ranks = [self.mine] * (dist.get_world_size() if exchanged else 1)
        if exchanged:
            dist.all_gather_object(self.of_ranks, self.mine)
        self.room = max(sum(fragment.count for fragment in part) for part in self.of_ranks)

    @torch.no_grad()
    def fill(self, average: Sequence[Tensor]) -> None:
        """From this rank's flat tensors, which the fragments index into. Collective unless replicated."""
        if not self.tensors:
            return
        parts = [average[one.flat].view(-1).narrow(0, one.offset, one.count) for one in self.mine]
        if len(self.of_ranks) == 1:
            torch._foreach_copy_([self._place(fragment) for fragment in self.mine], parts)
            return
        like = next(iter(self.tensors.values()))
        share, end = like.new_zeros(self.room), 0
        for part in parts:
            share.narrow(0, end, len(part)).copy_(part)
            end += len(part)
        gathered = like.new_empty(self.room * len(self.of_ranks))
        dist.all_gather_into_tensor(gathered, share)
        places, sources = [], []
        for rank, fragments in enumerate(self.of_ranks):
            end = rank * self.room
            for fragment in fragments:
                places.append(self._place(fragment))
                sources.append(gathered.narrow(0, end, fragment.count))
                end += fragment.count
        torch._foreach_copy_(places, sources)

    def _place(self, fragment: Fragment) -> Tensor:
        return self.tensors[fragment.name].view(-1).narrow(0, fragment.start, fragment.count)


class TrainingState:
    """The weights, moments and moving average of this rank."""

    def __init__(
        self, wrapped: nn.Module, module: nn.Module, base: torch.optim.Optimizer, stage: int, *, averages: bool,
        follower: Mapping[str, Tensor] = MappingProxyType({}),
    ):  # fmt: skip
        """`follower`: tensors that are kept equal to the averages of the parameters of these names; see `Follower`."""
        self.wrapped, self.module, self.base, self.stage = wrapped, module, base, stage
        self.trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.fragments = self._fragments()
        self.average = [flat.detach().clone() for flat in self._flats()] if averages else []
        self.follower = Follower(follower, self.fragments, replicated=stage == 0)
        self.publish_average()

    def check_coverage(self) -> None:
        """Assert that the fragments of all ranks hold every trained element once. Collective."""
        owned = dict.fromkeys(self.trained, 0)
        for fragment in self.fragments:
            owned[fragment.name] += fragment.count
        counts = torch.tensor(list(owned.values()), dtype=torch.int64, device=next(self.module.parameters()).device)
        if self.stage and dist.is_initialized():
            dist.all_reduce(counts)
        for (name, parameter), count in zip(self.trained.items(), counts.tolist(), strict=True):
            size = getattr(parameter, "ds_numel", parameter.numel())
            assert count == size, f"{name}: the ranks own {count} of {size} elements; is this another DeepSpeed?"

    def shapes(self) -> dict[str, list[int]]:
        """Shape of every trained parameter, also where ZeRO-3 holds only a part of it."""
        return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in self.trained.items()}

    def set_learning_rate(self, rate: float) -> None:
        for group in self.base.param_groups:
            group["lr"] = rate * group["learning_rate_scale"]

    def update_average(self, decay: float) -> None:
        """Move the average towards the weights: it keeps `decay` of itself. Collective where somebody follows it."""
        with torch.no_grad():
            torch._foreach_lerp_(self.average, [flat.detach() for flat in self._flats()], 1 - decay)
        self.publish_average()

    def publish_average(self) -> None:
        """Copy the moving average into whatever follows it. Collective under ZeRO."""
        self.follower.fill(self.average)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The network computes with the moving average, if there is one; after that again with the very same weights.

        Collective under ZeRO.
        """
        if not self.average:
            yield
            return
        self._exchange_average()
        try:
            yield
        finally:
            self._exchange_average()

    @torch.no_grad()
    def _exchange_average(self) -> None:
        for flat, average in zip(self._flats(), self.average, strict=True):
            held = flat.detach().clone()
            flat.copy_(average)
            average.copy_(held)
        self.publish()

    def tensors(self) -> dict[str, list[Tensor]]:
        """The flat tensors of this rank by kind: `fragments` index into each list."""
        flats = self._flats()
        kinds = {"fp32": [flat.detach().view(-1) for flat in flats]}
        for kind in moment_names(self.base):
            # A rank has no moments before its first step that was not skipped.
            moments = [self.base.state.get(flat, {}).get(kind) for flat in flats]
            kinds[kind] = [
                (torch.zeros_like(flat) if moment is None else moment).view(-1)
                for flat, moment in zip(flats, moments, strict=True)
            ]
        if self.average:
            kinds["ema"] = [flat.view(-1) for flat in self.average]
        return kinds

    @property
    def updates(self) -> int:
        """Steps that changed the weights, which the moments' bias correction counts."""
        return updates_of(self.base)

    def prepare_moments(self, updates: int, *, zero: bool = False) -> None:
        """Make the optimizer's state as it is after `updates`, its moments at `zero` or yet to be read."""
        reset_moments(self.base, self._flats(), updates, zero=zero)

    @torch.no_grad()
    def begin_from(self, weights: Mapping[str, Tensor]) -> None:
        """Take whole weights by name, without moments, as before the first step. Collective under ZeRO."""
        self.prepare_moments(0, zero=True)
        flats = self._flats()
        for fragment in self.fragments:
            part = weights[fragment.name].detach().flatten().narrow(0, fragment.start, fragment.count)
            for kept in (flats, self.average) if self.average else (flats,):
                kept[fragment.flat].view(-1).narrow(0, fragment.offset, fragment.count).copy_(part)
        self.publish()
        self.publish_average()

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the fp32 truth into the compute weights. Collective under ZeRO."""
        if compute_flats := self.compute_flats():
            for compute, flat in zip(compute_flats, self._flats(), strict=True):
                compute.data.copy_(flat.data)
        self.share()

    def compute_flats(self) -> list[Tensor]:
        """This rank's part of the compute weights, laid out as the fp32 truth is; none where that itself computes."""
        if self.stage == 0:
            return []
        zero = self._zero()
        if self.stage == 3:
            return zero.fp16_partitioned_groups_flat
        groups = zip(zero.parallel_partitioned_bit16_groups, zero.real_dp_process_group, strict=True)
        return [parts[dist.get_rank(group)] for parts, group in groups]

    @torch.no_grad()
    def share(self) -> None:
        """Bring every rank's part of the compute weights to where they compute. Collective under ZeRO."""
        if self.stage == 0:
            return
        zero = self._zero()
        if self.stage < 3:
            all_gather_dp_groups(
                zero.bit16_groups_flat, zero.parallel_partitioned_bit16_groups, zero.real_dp_process_group,
                zero.nccl_start_alignment_factor, zero.allgather_bucket_size,
            )  # fmt: skip
            return
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            parts = zero.unflatten(zero.fp16_partitioned_groups_flat[group], zero.fp16_partitioned_groups[group])
            for parameter, part in zip(zero.fp16_partitioned_groups[group], parts, strict=True):
                parameter.data = part.data
        if zero.persistent_parameters:
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def _zero(self) -> Any:
        return self.wrapped.optimizer

    def _flats(self) -> list[Tensor]:
        if self.stage == 0:
            return list(self.trained.values())
        zero = self._zero()
        return zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups

    def _fragments(self) -> list[Fragment]:
        if self.stage == 0:
            return [Fragment(name, 0, p.numel(), i, 0) for i, (name, p) in enumerate(self.trained.items())]
        return self._fragments_of_stage_3() if self.stage == 3 else self._fragments_of_stages_1_and_2()

    def _fragments_of_stages_1_and_2(self) -> list[Fragment]:
        found = []
        for name, parameter in self.trained.items():
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:  # None: another rank owns all of it
                part, place = mapping.lp_fragment_address, mapping.hp_fragment_address
                found.append(Fragment(name, part.start, place.numel, mapping.param_group_index, place.start))
        return found

    def _fragments_of_stage_3(self) -> list[Fragment]:
        zero = self._zero()
        names = {id(parameter): name for name, parameter in self.trained.items()}
        rank = dist.get_rank(zero.dp_process_group)
        found = []
        for group, parameters in enumerate(zero.fp16_groups):
            offset = 0
            for parameter in parameters:
                size = parameter.partition_numel()
                owned = max(0, min(size, parameter.ds_numel - rank * size))
                if owned:
                    found.append(Fragment(names[id(parameter)], rank * size, owned, group, offset))
                offset += size
        return found
