"""One self-contained HTML file a page: no script, nothing fetched, every foreign string escaped."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from gradstore.report import pictures, wording
from gradstore.report.views import DemoPage, ForensicsPage, ResidualPage, TopKPage
from gradstore.store.files.output import write_output


def write_topk(page: TopKPage, path: str | os.PathLike[str]) -> Path:
    """Write queries beside their most similar training examples; see `write`."""
    return write(render("topk.html", page), path)


def write_forensics(page: ForensicsPage, path: str | os.PathLike[str]) -> Path:
    """Write which queries trace back to poisoned training examples; see `write`."""
    return write(render("forensics.html", page), path)


def write_demo(page: DemoPage, path: str | os.PathLike[str]) -> Path:
    """Write the whole story of the demo; see `write`."""
    return write(render("demo.html", page), path)


def write_residual(page: ResidualPage, path: str | os.PathLike[str]) -> Path:
    """Write how far a projected kernel is from the exact one; see `write`."""
    return write(render("residual.html", page), path)


def render(template: str, page: TopKPage | ForensicsPage | ResidualPage | DemoPage) -> str:
    """Fill a template with a page.

    Args:
        template: file name of a template beside this module.
        page: what it shows.

    Returns:
        HTML text.
    """
    return _environment().get_template(template).render(page=page)


def write(html: str, path: str | os.PathLike[str]) -> Path:
    """Put text in a file such that readers see the old file or the whole new one.

    Args:
        html: text of the page.
        path: file to write or replace; its folder is created.

    Returns:
        The absolute path.

    Raises:
        NoSpaceError: the disk is full.
        UsageError: the file cannot be written there.
    """
    return write_output(path, [html.encode()]).absolute()


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (
        wording.count,
        wording.error_of,
        wording.scale,
        wording.shortened,
        wording.similarity,
        wording.tallest,
        wording.thousands,
        wording.width,
        pictures.data_uri,
    ):
        environment.filters[function.__name__] = function
    environment.tests["picture"] = pictures.is_picture
    environment.tests["small"] = pictures.is_small
    return environment


def _finalize(value: Any) -> Any:
    """Make foreign strings visible; runs on every expression of every template, so none can be forgotten."""
    return wording.visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
