"""`image attach`, `image referrers` and `image fetch`: files beside an image in its registry."""

from __future__ import annotations

import json
from typing import Any

import click

from .grammar import IMAGE, command, flag, host_of, many, option
from .values import Listing, tabulate


@command("attach", "[OPTIONS] IMAGE FILE [FILE...]")
@option("--artifact-type", metavar="type", help="Media type that says what it is, e.g. application/spdx+json")
@many("--annotation", help="Add an annotation (key=value)")
@click.argument("image", type=IMAGE)
@click.argument("files", nargs=-1, required=True)
@click.pass_context
def attach(ctx: click.Context, /, image: str, files: tuple[str, ...], **flags: Any) -> Any:
    """Attach files to an image in its registry."""
    host = host_of(ctx)
    more = {"artifact_type": flags["artifact_type"]} if flags["artifact_type"] else {}
    annotations = dict(each.partition("=")[::2] for each in flags["annotation"])
    paths = [host.working_dir() / file for file in files]
    digest = host.engine.artifacts.attach(image, paths, annotations=annotations, notify=host.note, **more)
    host.line(digest)
    return digest if host.notebook else None


@command("referrers", "[OPTIONS] IMAGE")
@option("--artifact-type", metavar="type", help="Only artifacts of this type")
@option("--format", "form", metavar="string", help="table, json, 'table TEMPLATE' or a Go template")
@flag("--json", "as_json", help="As one JSON list")
@click.argument("image", type=IMAGE)
@click.pass_context
def referrers(ctx: click.Context, /, image: str, artifact_type: str | None, form: str | None, *, as_json: bool) -> Any:
    """List what is attached to an image in its registry."""
    host = host_of(ctx)
    found = host.engine.artifacts.referrers(image, artifact_type=artifact_type, notify=host.note)
    if as_json:
        return Listing(found, text=json.dumps([each._asdict() for each in found], indent=2))
    titles = {"Digest": "DIGEST", "ArtifactType": "ARTIFACT TYPE", "Annotations": "ANNOTATIONS"}

    def view(each: Any) -> dict[str, Any]:
        annotations = ", ".join(f"{key}={value}" for key, value in sorted(each.annotations.items()))
        return {"Digest": each.digest, "ArtifactType": each.artifact_type, "Annotations": annotations}

    return tabulate(found, view, titles, columns=tuple(titles), form=form)


@command("fetch", "[OPTIONS] NAME[:TAG|@DIGEST]")
@option("-o", "--output", metavar="directory", default=".", help="Directory to write to (default: this one)")
@click.argument("name", type=IMAGE)
@click.pass_context
def fetch(ctx: click.Context, /, name: str, output: str) -> Any:
    """Save the files of an artifact."""
    host = host_of(ctx)
    found = host.engine.artifacts.fetch(name, host.working_dir() / output, notify=host.note)
    return Listing(found, text="\n".join(map(str, found)))
