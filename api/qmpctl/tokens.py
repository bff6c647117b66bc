"""Commands for tokens: what programs and people on other hosts show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import click

from qmpctl.invocation import Verb, as_json, for_each, perform
from qmpctl.machines import LabelType
from qmpctl.tables import print_json, print_table
from qmpd.access import PERSONAL, Personal
from qmpd.views import TokenRequest

#: Of `qmpctl token-create`, in days.
VALID_DAYS: Final = 90.0


class RoleType(click.Choice[Personal]):
    """One of the roles of people and programs."""

    def __init__(self) -> None:
        super().__init__(PERSONAL)


@click.command("token-create", cls=Verb)
@click.argument("name")
@click.option("--role", type=RoleType(), required=True, help="What its owner may do.")
@click.option("--label", "labels", type=LabelType(), multiple=True, help="Only for machines with this label; may be repeated.")
@click.option("--days", type=float, default=VALID_DAYS, show_default=True, help="How long it is valid; 0: until it is revoked.")
def token_create_command(name: str, role: Personal, labels: Sequence[tuple[str, str]], days: float) -> None:
    """Make a token. Its text is printed once, and kept nowhere."""
    request = TokenRequest(name=name, role=role, labels=dict(labels), days=days or None)
    made = perform(lambda client: client.create_token(request))
    if as_json():
        print_json(made)
    else:
        click.echo(made.token)


@click.command("tokens", cls=Verb)
def tokens_command() -> None:
    """List the tokens."""
    tokens = perform(lambda client: client.tokens())
    if as_json():
        print_json(tokens)
        return
    rows = (
        (
            token.name,
            token.id,
            token.role,
            ",".join(f"{key}={value}" for key, value in sorted(token.labels.items())) or "-",
            "expired" if token.expired else token.expires_at or "never",
            token.last_used_at or "-",
        )
        for token in tokens
    )
    print_table(("NAME", "ID", "ROLE", "LABELS", "EXPIRES", "LAST USED"), rows)


@click.command("token-revoke", cls=Verb)
@click.argument("names", metavar="NAME|ID...", nargs=-1, required=True)
def token_revoke_command(names: Sequence[str]) -> int:
    """End tokens at once."""
    return for_each(names, lambda client, name: client.revoke_token(name), lambda name, _none: click.echo(f"{name}: revoked"))
