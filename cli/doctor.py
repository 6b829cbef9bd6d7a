"""`gradstore doctor`."""

from __future__ import annotations

import click

from gradstore.errors import MismatchError

from .loading import load
from .options import as_json
from .output import on_one_line, print_hanging, print_json, print_pairs


@click.command(
    short_help="Check what is installed here.",
    epilog="Examples: gradstore doctor   gradstore doctor --again",
)
@click.option("--again", is_flag=True, help="Repeat the checks of GPUs, whose verdicts are otherwise kept.")
@as_json
def doctor(again: bool, as_json: bool) -> None:
    """Check every way to multiply by P that this machine has, and say which are used.

    Each is compared with the entries of P on small odd problems: bit for bit for signs, within its stated error for
    normals. A GPU's are checked in a process of their own, when they are first used or by this command, and the verdict
    is kept until the driver, torch or gradstore changes. A GPU does not use one that fails. Exit status 4 if any fails.
    """
    load("Projection")
    from gradstore.featurization.environment import system_card
    from gradstore.projection.diagnosis import diagnose

    found = diagnose(again=again)
    card = system_card()
    if as_json:
        print_json({"system": card, "checks": [vars(finding) for finding in found]})
    else:
        print_pairs(card)
        for device in dict.fromkeys(finding.device for finding in found):
            click.echo(f"\n{on_one_line(device)}")
            for finding in (finding for finding in found if finding.device == device):
                mark = {"ok": "ok", "wrong": "FAILS", "absent": "absent"}[finding.state]
                used = "in use" if finding.used else ""
                kind = f"{finding.entries} {finding.precision}"
                print_hanging(f"  {mark:<6} ", f"{finding.path:<9}  {kind:<16}  {used:<6}  {finding.note}")
    _require_right([finding.state for finding in found])


def _require_right(states: list[str]) -> None:
    failed = states.count("wrong")
    if failed:
        hint = "A GPU does not use what fails; report a wrong product with this output"
        raise MismatchError(f"{failed} of {len(states)} checks fail", hint=hint)
