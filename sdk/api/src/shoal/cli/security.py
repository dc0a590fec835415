"""``shoal security``: make the files that let the parts of a cluster in, and renew them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal.security import SecurityFolder
from shoal_core.protocol.subjects import Role

security = typer.Typer(
    no_args_is_help=True,
    help="Make and renew what a cluster with a broker of its own needs: broker.conf, credentials, certificates.",
)

Folder = Annotated[Path, typer.Argument(help="The folder of the files; only its owner can enter it.")]


@security.command()
def init(
    folder: Folder,
    cluster: Annotated[str, typer.Option(envvar="SHOAL_CLUSTER", help="The cluster's name.")] = "default",
    host: Annotated[
        list[str] | None,
        typer.Option(help="One more name or address of the broker, for its certificate; may be given several times."),
    ] = None,
) -> None:
    """Write everything that is needed to start a broker and to join it, with passwords drawn at random."""
    try:
        made = SecurityFolder.create(folder, cluster, host or ())
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    print(f"{folder} has what the cluster {cluster} needs. Its broker: nats-server -c {folder}/broker.conf ...")
    print(f"Drivers: SHOAL_ADDRESS=nats://... SHOAL_CREDENTIALS={made.credentials(Role.PROCESS)}")


@security.command()
def rotate(
    folder: Folder,
    role: Annotated[
        list[Role] | None, typer.Option(help="A role that gets a new password; all by default. May be repeated.")
    ] = None,
) -> None:
    """Draw new passwords and make a new certificate of the broker, signed by the same authority."""
    try:
        renewed = SecurityFolder.open(folder)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    renewed.rotate(role or Role)
    print(f"{folder} has new files. Have the broker read them (nats-server --signal reload, or SIGHUP);")
    print("it drops who holds an old password, so restart these services with their new files next.")
