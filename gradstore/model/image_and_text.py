"""How an example is shown to a person: a small picture, or a line of text.

A project names one of these in `show=`. Featurize calls it once per row and stores what it returns, so a report
needs neither the dataset nor this code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradstore.errors import ProjectError

Pixels = npt.NDArray[np.uint8]


class Show(Protocol):
    """What `Project(show=...)` accepts: a kind, and a call from one input to something a person can look at."""

    @property
    def kind(self) -> str:
        """Either `"image"` or `"text"`."""

    def __call__(self, x: Any) -> Pixels | str:
        """Pixels (uint8, [H, W] or [H, W, 3]) or text of one input."""


@dataclass(frozen=True)
class ImageShow:
    """Undo `(pixel - mean) / std` and return 8-bit pixels; see `image`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    key: str | None = None
    kind: ClassVar[str] = "image"

    def __call__(self, x: Tensor | npt.NDArray[Any] | Mapping[str, Any]) -> Pixels:
        """Picture of one input.

        Args:
            x: [H, W] or [C, H, W] with C 1 or 3, or a mapping that holds such an input under `key`.
               uint8 pixels are returned as they are; anything else is `x * std + mean` on the scale 0 to 1, clipped;
               values that are not numbers become black.

        Returns:
            uint8 pixels [H, W] (gray) or [H, W, 3] (RGB).

        Raises:
            ProjectError: the input is no picture, or `mean` and `std` are for another number of channels.
        """
        pixels = torch.as_tensor(_select(x, self.key, "gs.image")).detach().cpu()
        planes = pixels[None] if pixels.ndim == 2 else pixels
        if planes.ndim != 3 or planes.shape[0] not in (1, 3) or 0 in planes.shape:
            raise ProjectError(
                "cannot show this input as a picture",
                where="show=gs.image",
                expected="[H, W] or [C, H, W] with C 1 or 3",
                got=f"{list(pixels.shape)}",
                hint="Pass show=None, or a function of your own with kind 'image' that returns uint8 pixels",
            )
        channels_last = self._bytes(planes).permute(1, 2, 0)
        return channels_last.squeeze(2).contiguous().numpy() if len(planes) == 1 else channels_last.contiguous().numpy()

    def _bytes(self, planes: Tensor) -> Tensor:
        """[C, H, W] of any real dtype as uint8."""
        if planes.dtype == torch.uint8:
            return planes.clone()
        channels = len(planes)
        unit = planes.double() * _per_channel(self.std, channels, "std") + _per_channel(self.mean, channels, "mean")
        return (unit.nan_to_num(nan=0.0).clamp(0, 1) * 255).round().to(torch.uint8)


@dataclass(frozen=True)
class TextShow:
    """Decode an input into text; see `text`."""

    decode: Callable[[Any], str]
    key: str | None = None
    kind: ClassVar[str] = "text"

    def __call__(self, x: Any) -> str:
        """Show one input.

        Returns:
            Its text.

        Raises:
            ProjectError: `decode` returned something else than a string.
        """
        shown = self.decode(x if self.key is None else _select(x, self.key, "gs.text"))
        if not isinstance(shown, str):
            raise ProjectError(
                "decode did not return text", where="show=gs.text", expected="str", got=type(shown).__name__
            )
        return shown


def image(mean: float | Sequence[float] = 0.5, std: float | Sequence[float] = 0.5, key: str | None = None) -> ImageShow:
    """Show inputs as pictures.

    Args:
        mean: what the dataset's normalisation subtracted, on the pixel scale 0 to 1; one number, or one per channel.
        std: what it divided by.
        key: for inputs that are dicts, the entry that holds the picture.

    Returns:
        A callable from one input to uint8 pixels.

    Raises:
        ProjectError: `mean` or `std` is not finite.

    Example:
        >>> gs.image(mean=0.5, std=0.5)(torch.zeros(1, 1, 2)).tolist()
        [[128, 128]]
    """
    return ImageShow(_numbers(mean, "mean"), _numbers(std, "std"), key)


def text(decode: Callable[[Any], str], key: str | None = None) -> TextShow:
    """Show inputs as text.

    Args:
        decode: from one input (or its entry `key`) to a string, for example a tokenizer's `decode`.
        key: for inputs that are dicts, the entry to decode; the whole input by default.

    Returns:
        A callable from one input to a string.

    Raises:
        ProjectError: `decode` cannot be called.

    Example:
        >>> gs.text(lambda ids: " ".join(map(str, ids.tolist())))(torch.tensor([3, 1]))
        '3 1'
    """
    if not callable(decode):
        raise ProjectError("decode is not callable", where="gs.text", expected="a function", got=type(decode).__name__)
    return TextShow(decode, key)


def _select(x: Any, key: str | None, where: str) -> Any:
    """The entry of a mapping that is shown, or `x` itself."""
    if not isinstance(x, Mapping):
        return x
    if key is None or key not in x:
        raise ProjectError(
            "the input is a dict, so name the entry to show" if key is None else "the input has no such entry",
            where=where,
            expected=f"key= one of {', '.join(map(repr, x))}",
            got="no key" if key is None else repr(key),
        )
    return x[key]


def _numbers(value: float | Sequence[float], name: str) -> tuple[float, ...]:
    """One number or one per channel, as a tuple of finite floats."""
    try:
        numbers = np.atleast_1d(np.asarray(value, dtype=np.float64))
    except (TypeError, ValueError):
        numbers = np.empty(0)
    if numbers.ndim != 1 or numbers.size == 0 or not np.isfinite(numbers).all():
        raise ProjectError(
            f"{name} is unusable", where="gs.image", expected="a finite number, or one per channel", got=repr(value)
        )
    return tuple(numbers.tolist())


def _per_channel(numbers: tuple[float, ...], channels: int, name: str) -> Tensor:
    """`numbers` as float64 [C, 1, 1] or [1, 1, 1]."""
    if len(numbers) not in (1, channels):
        raise ProjectError(
            f"{name} is for another number of channels",
            where="show=gs.image",
            expected=f"1 or {channels} numbers",
            got=len(numbers),
        )
    return torch.tensor(numbers, dtype=torch.float64)[:, None, None]
