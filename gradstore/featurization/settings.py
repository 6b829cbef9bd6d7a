"""Settings: the one list of what decides, beside the model, what features are; each part of a store's identity.

A new setting is a field here (its type once more in `Given`) and an option of the command line. One that older stores
do not name is marked `unnamed`: an identity leaves it out where it has its default, so that they keep theirs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from pathlib import Path
from typing import Any, TypedDict, TypeVar, cast

import numpy as np
import torch

from gradstore.errors import UsageError
from gradstore.projection import Projection
from gradstore.projection.kind_choice import chosen_kind
from gradstore.projection.kinds import BY_DEVICE, DEFAULT, KINDS, kind_of
from gradstore.store.feature_store import FeatureStore
from gradstore.store.identity import put, require_featurized, take
from gradstore.store.schema import CLASS_DRAWS, DTYPES, LAYOUTS

F = TypeVar("F", bound=Callable[..., Any])


class Given(TypedDict, total=False):
    """Settings as keyword arguments; see `Settings`, whose defaults the others have."""

    proj_dim: int
    projection: str
    seed: int
    layout: str
    dtype: str
    precision: str
    class_draws: int


@dataclass(frozen=True)
class Settings:
    """How to featurize; all of it is part of a store's identity.

    Args:
        proj_dim: projected dimension K.
        projection: kind of its entries, a name of `gradstore.projection.kinds.KINDS`, which says what they are; or
            "auto", in whose place a store has the kind that was taken.
        seed: of the projection.
        layout: "per-class" stores [n, c, K]; "sum" stores P Σ_c g^c as [n, 1, K]; "mixed" stores Σ_c P_c g^c as
            [n, 1, K], an independent P_c for each class, which serves trNTK at K floats an example; "sketched" stores
            P_j v_j for `class_draws` random combinations v_j of the classes, K / class_draws columns each, as
            [n, 1, K]: it serves trNTK too, and takes a backward pass a combination, not one a class, at the error that
            `gradstore.kernels.sketched_error` states.
        dtype: of the stored features: "float16", "float32" or "int8".
        precision: of the kernels on a GPU: "fast" (relative error of a feature vector about 2e-4) or "exact" (about
            1e-6). A CPU is always exact. Stores of either are told apart by their fingerprints.
        class_draws: r, combinations of classes in the layout "sketched"; K is a multiple of it.

    Raises:
        UsageError: an unknown projection, layout or dtype. `make_projection` refuses the others.
    """

    proj_dim: int = field(default=10240, metadata={"at": ("projection", "K")})
    projection: str = field(default=DEFAULT, metadata={"at": ("projection", "kind"), "choices": (*KINDS, BY_DEVICE)})
    seed: int = field(default=0, metadata={"at": ("projection", "seed")})
    layout: str = field(default="per-class", metadata={"at": ("layout",), "choices": LAYOUTS})
    dtype: str = field(default="float16", metadata={"at": ("dtype",), "choices": DTYPES})
    precision: str = field(default="fast", metadata={"at": ("projection", "precision"), "unnamed": True})
    class_draws: int = field(default=CLASS_DRAWS, metadata={"at": ("class_draws",), "unnamed": True})

    def __post_init__(self) -> None:
        for setting in fields(self):
            value, choices = getattr(self, setting.name), setting.metadata.get("choices")
            if choices is not None and value not in choices:
                name = setting.name.replace("_", "-")
                expected = f"one of {', '.join(choices)}"
                raise UsageError(f"unknown {name}", where=f"--{name}", expected=expected, got=repr(value))
            if isinstance(value, np.dtype):
                object.__setattr__(self, setting.name, value.name)
            if isinstance(value, np.integer):  # JSON has no such numbers
                object.__setattr__(self, setting.name, int(value))

    @classmethod
    def of(cls, identity: Mapping[str, Any], *, where: object = None) -> Settings:
        """Read settings from the identity of a store.

        Args:
            identity: of the store.
            where: its path, for the error.

        Returns:
            Those that it was made with.

        Raises:
            MismatchError: the store was imported, so that nothing here can be featurized like it.
        """
        require_featurized(identity, where=where)
        found = {}
        for setting in fields(cls):
            default = (setting.default,) if _unnamed(setting.metadata) else ()
            found[setting.name] = take(identity, setting.metadata["at"], *default)
        return cls(**found)

    @classmethod
    def like(cls, store: FeatureStore | str | Path, given: Given) -> Settings:
        """Take the settings of a store, so that what is featurized can be compared with it.

        Args:
            store: it, or its path.
            given: settings that were asked for besides, which must be the same.

        Returns:
            The settings.

        Raises:
            MismatchError: the store was imported.
            UsageError: there is no such store, or a setting that was asked for is another one.
        """
        opened = store if isinstance(store, FeatureStore) else FeatureStore(store)
        found = cls.of(opened.identity, where=opened.path)
        for name, value in given.items():
            theirs = getattr(found, name)
            if value not in (theirs, BY_DEVICE):
                raise UsageError(
                    "another setting than that of the store to be like",
                    where=f"--{name.replace('_', '-')}",
                    expected=f"{theirs}, as {opened.path} has",
                    got=value,
                    hint="Leave it out: --like takes all settings of that store",
                )
        return found

    def chosen(self, device: torch.device) -> tuple[Settings, str]:
        """The same with a kind in the place of "auto", and a line that says why, or ""."""
        if self.projection != BY_DEVICE:
            return self, ""
        kind, why = chosen_kind(self.proj_dim // max(1, self.draws), device)
        return replace(self, projection=kind), f"projection {kind}: {why}"

    def identity(self) -> dict[str, Any]:
        """What an identity says of the settings, as nested plain values."""
        content: dict[str, Any] = {}
        for setting in fields(self):
            value = getattr(self, setting.name)
            if not (_unnamed(setting.metadata) and value == setting.default):
                put(content, setting.metadata["at"], value)
        return content

    def make_projection(self) -> Projection:
        """Make the projection that these settings name.

        Returns:
            P, with the precision that was asked for.

        Raises:
            UsageError: a setting of it is out of range.
        """
        if self.class_draws != CLASS_DRAWS and not self.draws:
            raise UsageError(
                "only the layout sketched draws combinations of classes",
                where="--class-draws",
                expected="--layout sketched",
                got=f"--layout {self.layout}",
                hint="Leave it out, or name that layout",
            )
        kind = kind_of(self.projection)
        if self.proj_dim % kind.multiple and self.proj_dim > 0:
            raise UsageError(
                "bad projected dimension",
                where="--proj-dim",
                expected=f"a multiple of {kind.multiple} for {kind.name}",
                got=self.proj_dim,
                hint=f"The nearest are {' and '.join(map(str, sorted(set(kind.fitting(self.proj_dim)))))}; "
                f"--projection {DEFAULT} takes any",
            )
        if self.draws:
            self._part(Projection(self.projection, self.proj_dim, self.seed))
        return Projection(self.projection, self.proj_dim, self.seed, precision=self.precision)

    @property
    def draws(self) -> int:
        """Random combinations of classes that a row is made of; 0 in layouts that have none."""
        return self.class_draws if self.layout == "sketched" else 0

    def _part(self, projection: Projection) -> Projection:
        """The projection of one draw."""
        if not 2 <= self.class_draws <= self.proj_dim or self.proj_dim % self.class_draws:
            expected = f"at least 2, of which K = {self.proj_dim} is a multiple"
            raise UsageError("bad class draws", where="--class-draws", expected=expected, got=self.class_draws)
        multiple = kind_of(self.projection).multiple
        if self.proj_dim // self.class_draws % multiple:
            raise UsageError(
                "bad class draws",
                where="--class-draws",
                expected=f"a divisor of K / {multiple} = {self.proj_dim // multiple} for {self.projection}",
                got=self.class_draws,
                hint=f"Each draw has a projection of its own, here of a multiple of {multiple} columns",
            )
        return replace(projection, dim=self.proj_dim // self.class_draws)


def takes_settings(function: F) -> F:
    """Spell out the `**settings` of a function: in what `help` shows of it, its type hints and its TypeErrors."""
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    named = [
        inspect.Parameter(s.name, inspect.Parameter.KEYWORD_ONLY, default=s.default, annotation=s.type)
        for s in fields(Settings)
    ]
    spelt_out = signature.replace(parameters=[*own, *named])

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            spelt_out.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{function.__name__}() {error}") from None
        return function(*args, **kwargs)

    call.__signature__ = spelt_out  # type: ignore[attr-defined]
    hints = {name: hint for name, hint in function.__annotations__.items() if name != "settings"}
    call.__annotations__ = hints | {s.name: s.type for s in fields(Settings)}
    return cast(F, call)


def _unnamed(metadata: Mapping[str, Any]) -> bool:
    return bool(metadata.get("unnamed", False))
