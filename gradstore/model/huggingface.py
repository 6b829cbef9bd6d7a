"""`huggingface`: a project from a folder that transformers saved, with texts, pictures or tensors as its splits.

Nothing is downloaded, and no code in the folder is run. Weights are read as all weights are (`read_checkpoint`), and
given to transformers for its own changes of names.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradstore.errors import GradstoreError, ProjectError, UnsafeError
from gradstore.model.checkpoint import read_checkpoint
from gradstore.model.huggingface_examples import Encode, PictureEncoder, TextEncoder, as_rows, parts_of, to_encode
from gradstore.model.image_and_text import Show, image, text
from gradstore.model.project import Project, project_folder

_CLASSIFIER = re.compile(r"\w+For(Sequence|Image)Classification\w*")
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_NAMED = 3  # tensors that a line lists


def huggingface(
    folder: str | Path,
    splits: Mapping[str, Any],
    *,
    max_length: int | None = None,
    poisoned: Mapping[str, Any] | None = None,
    parameters: str = ".*",
) -> Project:
    """Make a project of a classifier of sequences or images that transformers saved (`save_pretrained`).

    Needs transformers (`pip install "gradstore[huggingface]"`). Nothing is downloaded, and no code in the folder is
    run. The model is in float32, and its weights must be all there.

    Args:
        folder: config.json, weights, and a tokenizer or image processor; relative to the project file, and to the
            working directory outside one.
        splits: name -> (texts, labels), (images, labels) or tensors by the model's own names, with "labels" among them
            or as (tensors, labels). A text may be a pair of texts, an image a path, a PIL image or an array. A dataset
            `ds[i] -> (dict of tensors, label)` is taken as it is.
        max_length: tokens to which every text is padded or cut; a note says how many are cut. None takes those of the
            longest text of all splits, as far as the model can; name a number where longer texts may be added later.
        poisoned: as in `gs.Project`.
        parameters: as in `gs.Project`.

    Returns:
        A project whose classes, forward pass and way of showing examples are those of the folder.

    Raises:
        ProjectError: transformers or something in the folder is missing, it holds no such classifier, tensors are
            missing or have other shapes, or a split is none of the above.
        UnsafeError: the model is code in the folder, or its weights would have to run code to load.
        CorruptError: a file of weights is damaged, or none.

    Example:
        >>> texts, labels = ["the cat sat", "the dog ran fast"], [0, 1]
        >>> project = gs.huggingface("bert-cola", {"train": (texts, labels)})
        >>> project.prepare().logits(project.examples("train").read([0, 1])[0]).shape
        torch.Size([2, 2])
    """
    place = project_folder() / folder
    with _quiet():
        model, notes = _model(place)
        raw = {name: found for name, given in splits.items() if (found := to_encode(given)) is not None}
        if model.main_input_name == "pixel_values":
            encode, show, cut = _of_pictures(place, used=bool(raw))
        else:
            encode, show, cut = _of_texts(place, model.config, raw, max_length)
    names = model.config.id2label
    project = Project(
        model=model,
        splits={name: as_rows(given, encode, name) for name, given in splits.items()},
        classes=[str(names.get(i, i)) for i in range(len(names))],
        show=show,
        poisoned=poisoned,
        forward=_logits,
        parameters=parameters,
    )
    project.notes = (*notes, *cut)
    return project


def _logits(model: nn.Module, inputs: Any) -> Tensor:
    return model(**inputs).logits


# -- the model -----------------------------------------------------------------------------------------------------


def _model(folder: Path) -> tuple[Any, tuple[str, ...]]:
    """The classifier in float32, and lines on what of the weights it does not use."""
    kind = _kind(folder)
    config = _loaded("AutoConfig", folder)
    if getattr(config, "quantization_config", None) is not None:
        raise ProjectError(
            "this model is quantised",
            where=folder,
            expected="weights that have gradients",
            hint="Save it without quantization_config",
        )
    found = read_checkpoint(folder)
    # Named here, since a folder's config may name an implementation that would be downloaded.
    attention = "sdpa" if getattr(kind, "_supports_sdpa", False) else "eager"
    model, info = _tried(
        lambda: kind.from_pretrained(
            None,
            config=config,
            state_dict=dict(found.tensors),
            torch_dtype=torch.float32,
            attn_implementation=attention,
            ignore_mismatched_sizes=True,  # so that they are told, and refused below
            output_loading_info=True,
        ),
        found.path,
        "the model cannot be built from this folder",
    )
    missing, mismatched = sorted(info["missing_keys"]), sorted(name for name, *_ in info["mismatched_keys"])
    if missing or mismatched:
        counts = ((len(missing), "missing", missing), (len(mismatched), "of another shape", mismatched))
        raise ProjectError(
            f"the weights do not fit {kind.__name__}",
            where=found.path,
            expected=f"all {len(model.state_dict())} tensors of the model",
            got="; ".join(f"{count} {what}: {_few(names)}" for count, what, names in counts if count),
            hint="Save the fine-tuned classifier with save_pretrained; a model without its trained head is none",
        )
    unused = sorted(info["unexpected_keys"])
    note = f"weights: {found.path.name} has {len(unused)} tensors that {kind.__name__} does not use: {_few(unused)}"
    return model, (note,) if unused else ()


def _kind(folder: Path) -> Any:
    """The class of transformers that the folder's configuration names."""
    transformers = _transformers()
    config = _configuration(folder)
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else "none"
    kind = getattr(transformers, name, None) if _CLASSIFIER.fullmatch(name) else None
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
        return kind
    if "auto_map" in config:
        raise UnsafeError(
            "this model is code in its folder, which is never run",
            where=folder / "config.json",
            expected="a model of transformers' own",
            got=name,
            hint="Where you trust it, build the model in your project file and use gs.Project",
        )
    raise ProjectError(
        "this is no classifier of sequences or images that transformers knows",
        where=folder / "config.json",
        expected="architectures with …ForSequenceClassification or …ForImageClassification",
        got=name,
        hint=f"Other models go into gs.Project(model=…, forward=…); this is transformers {transformers.__version__}",
    )


def _configuration(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_bytes())
        if not isinstance(config, dict):
            raise ValueError(f"a {type(config).__name__}")
        return config
    except (OSError, ValueError, RecursionError) as error:
        raise ProjectError(
            "this is no folder of a Hugging Face model",
            where=folder,
            expected="a folder with config.json, as save_pretrained writes it",
            got=error.strerror if isinstance(error, OSError) else str(error)[:120],
            hint="Nothing is downloaded: save the model and its tokenizer or image processor into a folder first",
        ) from error


# -- its examples --------------------------------------------------------------------------------------------------

_Encoding = tuple[Encode | None, Show | None, tuple[str, ...]]


def _of_pictures(folder: Path, *, used: bool) -> _Encoding:
    """What encodes pictures; how to show them."""
    if not used and not any((folder / name).is_file() for name in _PROCESSOR_FILES):
        return None, None, ()
    processor = _loaded("AutoImageProcessor", folder)
    normalised = getattr(processor, "do_normalize", False)
    mean, std = (processor.image_mean, processor.image_std) if normalised else (0.0, 1.0)
    return PictureEncoder(processor), image(mean, std, key="pixel_values"), ()


def _of_texts(folder: Path, config: Any, texts: Mapping[str, Sequence[Any]], max_length: int | None) -> _Encoding:
    """What encodes texts, all to one length; how to show them; and which are cut."""
    tokenizer = _tokenizer(folder, used=bool(texts))
    if tokenizer is None:
        return None, None, ()
    if texts and tokenizer.pad_token is None:
        raise ProjectError(
            "the tokenizer has no padding token, so texts of several lengths do not fit together",
            where=folder,
            hint="Set tokenizer.pad_token and model.config.pad_token_id, and save both again; or give tensors",
        )
    lengths = {name: [_tokens(tokenizer, part) for part in some] for name, some in texts.items()}
    most = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or sys.maxsize)
    longest = max((length for some in lengths.values() for length in some), default=1)
    length = min(longest, most) if max_length is None else max_length
    over = {name: sum(one > length for one in some) for name, some in lengths.items()}
    cut = tuple(
        f"split {name!r}: {count} of {len(texts[name])} texts are longer than {length} tokens, and are cut"
        for name, count in over.items()
        if count
    )
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    return TextEncoder(tokenizer, length), text(decode, key="input_ids"), cut


def _tokens(tokenizer: Any, example: Any) -> int:
    # One by one: a tokenizer that has encoded several at once warns when a process is forked, as `workers=` does.
    return len(tokenizer(*parts_of(example), verbose=False)["input_ids"])


def _tokenizer(folder: Path, *, used: bool) -> Any:
    """The folder's tokenizer; None where it has none and none is used."""
    try:
        tokenizer = _loaded("AutoTokenizer", folder)
    except GradstoreError:
        if used:
            raise
        return None
    # Without its files, transformers makes a tokenizer that knows no word.
    files = tokenizer.vocab_files_names.values()
    if any((folder / name).is_file() for name in files):
        return tokenizer
    if not used:
        return None
    raise ProjectError(
        "this folder has no tokenizer",
        where=folder,
        expected=f"one of {', '.join(files)}",
        hint="Save it there: tokenizer.save_pretrained(folder)",
    )


# -- transformers --------------------------------------------------------------------------------------------------


def _transformers() -> Any:
    try:
        return import_module("transformers")
    except ImportError as error:
        raise ProjectError(
            "transformers is not installed", where="gs.huggingface", hint='pip install "gradstore[huggingface]"'
        ) from error


def _loaded(kind: str, folder: Path) -> Any:
    """What one of transformers' Auto classes makes of a folder, without network and without its code."""
    what = {"AutoConfig": "configuration", "AutoTokenizer": "tokenizer", "AutoImageProcessor": "image processor"}[kind]
    return _tried(
        lambda: getattr(_transformers(), kind).from_pretrained(folder, local_files_only=True, trust_remote_code=False),
        folder,
        f"transformers cannot read the {what} of this folder",
    )


def _tried(call: Callable[[], Any], where: Path, what: str) -> Any:
    try:
        return call()
    except GradstoreError:
        raise
    except Exception as error:  # whatever transformers raises at what it does not know or cannot read
        lines = str(error).strip().splitlines() or [""]
        got = f"{type(error).__name__}: {lines[0][:120]}"
        raise ProjectError(what, where=where, got=got, hint="Save it again with save_pretrained") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Within: transformers draws no bars and prints no reports; what they would say is said here."""
    logging = _transformers().utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
