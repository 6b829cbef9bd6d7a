"""What featurize will do, decided and said before the first gradient."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradstore.errors import UsageError
from gradstore.featurization.fingerprint import model_identity, sampled_identity
from gradstore.featurization.gradient_audit import bytes_needed
from gradstore.featurization.preview_column import preview_shape
from gradstore.featurization.row_audit import require_labels
from gradstore.featurization.settings import Settings
from gradstore.jacobians import JacobianEngine
from gradstore.jacobians.footprint import max_columns
from gradstore.jacobians.subject import take
from gradstore.machine.byte_counts import format_bytes
from gradstore.machine.devices import choose_device, memory_of
from gradstore.model.examples import Examples, Inputs, sample_rows
from gradstore.model.parameters import ParameterBlock, parameter_blocks
from gradstore.model.project import Project, require_deterministic
from gradstore.projection.block_sums import columns_that_wait
from gradstore.projection.class_signs import class_signs
from gradstore.projection.kinds import kind_of
from gradstore.store.files.manifest import Manifest
from gradstore.store.identity import fingerprint_of
from gradstore.store.schema import ONE_ROW, Schema

GROUP, LARGE_GROUP = 16, 64
SHARD_BYTES = 256 << 20
MOST_SHARDS = 20_000  # whose store is opened in less than half a second, on one core; a reader takes 100,000
# Work after which a shard is published, so that an interruption costs seconds: fixed numbers, not a measurement,
# because shard boundaries must not depend on the clock.
_SHARD_FLOPS = {"cpu": 4e12, "cuda": 1e15}


class Plan:
    """A prepared project, the engine for its Jacobians, and the manifest of the store to be.

    Args:
        project: model, weights and splits; switched to eval mode and moved to the device.
        split: name of the split.
        settings: how to featurize.
        device: "auto", "cpu", "cuda" or "cuda:<index>".
        memory: bytes that activations, Jacobian blocks and features may take beside the model, or "auto", as
            `memory_of` reads it.
        group: rows that are computed together; None chooses by the memory.
        alone: compute each example by itself, in groups of one row.

    Attributes:
        manifest: of the finished store, without shards.
        combinations: signs [r, classes] of the layout "sketched"; else None.
        flops: the projection's work, 2 · n · c · p · K, of a sparse P the 1024th part; less where the last call has few
            inputs.
        bytes: of the finished store's rows.
        alone: whether each example is computed by itself.
        notes: what a user should know of the model.
        group_bytes: bytes that computing one group of rows takes.

    Raises:
        UsageError: a setting is unusable, or one example does not fit the memory.
        ProjectError: the project is wrong.
    """

    def __init__(
        self,
        project: Project,
        split: str,
        settings: Settings,
        device: str,
        memory: int | str,
        *,
        group: int | None = None,
        alone: bool = False,
        skipping: bool = False,
    ) -> None:
        self.device = choose_device(device)
        self.project = project.prepare(self.device)
        self.examples: Examples = project.examples(split, skipping=skipping)
        settings, why = settings.chosen(self.device)
        self.split, self.settings, self._group, self.alone = split, settings, 1 if alone else group, alone
        self.memory = memory_of(memory, self.device, model_bytes(project.model))
        self.projection = settings.make_projection()
        self.blocks: tuple[ParameterBlock, ...] = parameter_blocks(project.model, project.parameters)
        inputs = to_device(self.examples.read(range(min(GROUP, len(self.examples))))[0], self.device)
        logits = project.logits(inputs)
        require_deterministic(logits, project.logits(inputs))
        self.examples.require_repeatable(sample_rows(len(self.examples)))
        self.classes = int(logits.shape[1])
        if self.examples.label_table is not None:
            require_labels(self.examples.label_table, self.classes, split)
        self.first_sound, sound = _sound(inputs, logits, self.examples.unreadable)
        self.combinations = None
        if settings.draws:
            self.combinations = class_signs(settings.seed, settings.draws, self.classes).to(self.device)
        self.engine = JacobianEngine(
            project.model,
            self.blocks,
            forward=project.forward,
            layout="sum" if settings.layout == "sum" else "per-class",
            example=sound,
            alone=alone,
            proj_dim=settings.proj_dim,
            combinations=self.combinations,
        )
        self.notes = () if alone else _notes(logits, self.engine.logits([inputs])[0], self.engine.rounding(logits))
        self.notes += tuple(filter(None, [why, kind_of(settings.projection).warning(settings.proj_dim)]))
        self.manifest = self._make_manifest(inputs)
        n, schema = self.manifest.n, self.manifest.schema
        self.flops = n * self._row_flops(schema)
        self.bytes = n * schema.row_bytes
        self.group_bytes = self.bytes_needed(schema, self.manifest.group)

    def data_of(self, schema: Schema, n: int) -> dict[str, Any]:
        """Name the first n rows of the split as a store of this schema does; of version 3, whose rows do, by number."""
        if schema.has_inputs:
            return {"length": n}
        return sampled_identity(self.examples, self.project.poisoned_mask(self.split), n)

    def bytes_needed(self, schema: Schema, rows: int) -> int:
        """Activations, blocks and an audit, and features of three batches: one grows, two are on their way to disk."""
        audit = bytes_needed([block.size for block in self.blocks])
        each = schema.c * schema.K * 20 + self._waiting_bytes(schema) + self._row_bytes(schema)
        return int(self.engine.bytes_needed(rows)) + audit + rows * each

    def _waiting_bytes(self, schema: Schema) -> int:
        """Of a row's blocks that wait for others, beside the two that the engine counts if it can form them there."""
        if self.settings.layout in ("mixed", "sketched"):
            return 0
        columns = min(columns_that_wait(self.projection, self.device), sum(block.size for block in self.blocks))
        beside = 0 if self.engine.copies else 2 * max(block.size for block in self.blocks)
        return 4 * (self.engine.below or schema.c) * max(0, columns - beside)

    def _row_bytes(self, schema: Schema) -> int:
        """Of rows that stand for classes, below the last call, their features; in "mixed", blocks of all classes."""
        if self.settings.layout != "mixed":
            return 4 * self.engine.below * schema.K  # none in the layouts of one row
        widest = min(max(block.size for block in self.blocks), max_columns(self.device, self.classes))
        return 8 * self.classes * widest if self.engine.below else 0

    def _make_manifest(self, inputs: Inputs) -> Manifest:
        s, project = self.settings, self.project
        schema = Schema(
            c=1 if s.layout in ONE_ROW else self.classes,
            K=s.proj_dim,
            classes=self.classes,
            dtype=s.dtype,
            preview=preview_shape(project.show, one_row(inputs, 0)),
        )
        group = self._choose_group(schema)
        model = model_identity(project, self.blocks, s, classes=self.classes)
        content = {**model, "data": self.data_of(schema, len(self.examples))}
        return Manifest(
            identity=content,
            fingerprint=fingerprint_of(content),
            schema=schema,
            n=len(self.examples),
            shard_rows=self._shard_rows(schema, group),
            group=group,
            split=self.split,
            classes=project.class_names(self.classes),
            preview=project.show.kind if project.show is not None else "",
        )

    def _choose_group(self, schema: Schema) -> int:
        """Choose how many rows are computed together, which fixes the bits of every row.

        Returns:
            16, or fewer where the memory asks for it; up to 64 where the model is small: its operations on 16 rows take
            hardly less time than on 64.

        Raises:
            UsageError: one example does not fit the memory, nor do the groups that were asked for.
        """
        if self._group is not None:
            self._require_fits(schema, self._group, "the groups of rows that this store goes on with do not")
            return self._group
        group = LARGE_GROUP
        while group > GROUP and not self._is_light(schema, group):
            group //= 2
        while group > 1 and self.bytes_needed(schema, group) > self.memory:
            group //= 2
        self._require_fits(schema, group, "one example does not")
        return group

    def _require_fits(self, schema: Schema, rows: int, what: str) -> None:
        need = self.bytes_needed(schema, rows)
        if need > self.memory:
            raise UsageError(
                f"{what} fit the memory budget",
                where="--memory",
                expected=f"at least {format_bytes(need)}",
                got=format_bytes(self.memory),
                hint="Give more memory, a smaller --proj-dim, or --layout sum",
            )

    def _is_light(self, schema: Schema, group: int) -> bool:
        """Whether a group leaves room for another beside it, in the memory and in a shard."""
        shard = min(self._shard_flops() / self._row_work(schema), SHARD_BYTES / schema.row_bytes)
        return 2 * self.bytes_needed(schema, group) <= self.memory and 2 * group <= shard

    def _shard_rows(self, schema: Schema, group: int) -> int:
        by_work = self._shard_flops() / self._row_work(schema)
        rows = min(by_work, SHARD_BYTES / schema.row_bytes)
        least = -(-len(self.examples) // (MOST_SHARDS * group))  # groups, however much work they are
        return max(1, int(rows) // group, least) * group

    def _shard_flops(self) -> float:
        return _SHARD_FLOPS.get(self.device.type, 4e12)

    def _row_work(self, schema: Schema) -> float:
        """Flops of a row, at the pace of signs."""
        return self._row_flops(schema) * kind_of(self.settings.projection).pace

    def _row_flops(self, schema: Schema) -> float:
        projected = self.classes if self.settings.layout == "mixed" else schema.c
        below, own = self.engine.below, sum(block.size for block in self.blocks if block.name in self.engine.own)
        values = sum(block.size for block in self.blocks) - own
        if below and self.settings.layout == "mixed":
            values = projected * values + own
        elif below:
            values = below * values + own + schema.c * below  # the last: by the weight of the last call
        else:
            values = projected * (values + own)
        return 2.0 * kind_of(self.settings.projection).nonzeros(schema.K) * values


def _notes(own: Tensor, differentiated: Tensor, rounding: float) -> tuple[str, ...]:
    """A line where the model's own logits [n, c] are not those of the pass that is differentiated."""
    error = torch.linalg.vector_norm(own.float() - differentiated, dim=1)
    differ = error > rounding * (1e-3 + torch.linalg.vector_norm(differentiated, dim=1))  # not so of NaN, which stops
    if not bool(differ.any()):
        return ()
    row = int((error * differ).nan_to_num().argmax())
    return (
        f"row {row} has other logits (by {float(error[row]):.2g}) when the model runs without gradients and takes a "
        "faster way, as torch's encoders do with padding masks; stored are those of the pass that is differentiated",
    )


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """Stacked inputs on a device."""
    return {name: x.to(device) for name, x in inputs.items()} if isinstance(inputs, dict) else inputs.to(device)


def slice_rows(inputs: Inputs, start: int, stop: int) -> Inputs:
    """Rows start:stop of stacked inputs."""
    return {name: x[start:stop] for name, x in inputs.items()} if isinstance(inputs, dict) else inputs[start:stop]


def joined_rows(parts: Sequence[Inputs]) -> Inputs:
    """Stacked inputs one after another, copied."""
    first = parts[0]
    if isinstance(first, dict):
        return {name: torch.cat([part[name] for part in parts]) for name in first}  # type: ignore[index]
    return torch.cat(list(parts))  # type: ignore[arg-type]


def one_row(inputs: Inputs, i: int) -> Tensor | dict[str, Tensor]:
    """Row i of stacked inputs, without the row axis."""
    return {name: x[i] for name, x in inputs.items()} if isinstance(inputs, dict) else inputs[i]


def _sound(inputs: Inputs, logits: Tensor, unreadable: Collection[int]) -> tuple[int, Inputs]:
    """Examples by which layers' rules can be tried: those that could be read and are finite, where there are any.

    Returns:
        (the row of the first, all of them).
    """
    good = logits.isfinite().all(dim=1)
    good[[row for row in range(len(good)) if row in unreadable]] = False
    for x in inputs.values() if isinstance(inputs, dict) else [inputs]:
        if x.is_floating_point() and not x.is_sparse:
            good &= x.flatten(1).isfinite().all(dim=1) if x.ndim > 1 else x.isfinite()
    return (int(good.int().argmax()), take(inputs, torch.nonzero(good)[:, 0])) if good.any() else (0, inputs)
