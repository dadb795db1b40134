"""Commands over images: list, tag, remove, archives in and out. Building is in `build`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import click

from ..display import human_size
from ..errors import LabkernelError, NoSuchImage, StoreError, UsageError
from .container import confirm, filters_of, pruned, split_tag, tar_output
from .grammar import IMAGE, command, flag, host_of, many, option, words
from .host import failures
from .values import Listing, tabulate
from .views import IMAGE_COLUMNS, IMAGE_TITLES, ImageRow, age, deleted, epoch, image_rows, image_view


def _not_there(err: NoSuchImage) -> NoSuchImage:
    # The class carries docker's 125 of `run`; where an image is only looked at or changed, docker ends with 1.
    err.exit_code = 1
    return err


@command("images", "[OPTIONS] [REPOSITORY[:TAG]]")
@flag("-a", "--all", help="Show all images (default hides intermediate images)")
@flag("--digests", help="Show digests")
@many("-f", "--filter", metavar="filter", help="Filter output based on conditions provided")
@option("--format", "form", metavar="string", help="table, json, 'table TEMPLATE' or a Go template")
@flag("--no-trunc", help="Don't truncate output")
@flag("-q", "--quiet", help="Only show image IDs")
@flag("--tree", help="Show each image with its names, its platform and what uses it")
@click.argument("repository", required=False, type=IMAGE)
@click.pass_context
def images(ctx: click.Context, /, repository: str | None, **flags: Any) -> Listing:
    """List images."""
    filters = filters_of(flags["filter"]) or {}
    if repository:
        filters.setdefault("reference", []).append(repository)
    if flags["tree"] and (flags["quiet"] or flags["form"] or flags["digests"]):
        raise UsageError("--tree shows everything: it goes with no --quiet, --format or --digests", exit_code=1)
    engine = host_of(ctx).engine
    found = engine.images.list(all=flags["all"], filters=filters or None)
    if flags["tree"]:
        return _tree(engine, found, no_trunc=flags["no_trunc"])
    each_digest = flags["digests"] or ".Digest" in (flags["form"] or "")
    rows = [row for image in found for row in image_rows(image, digests=each_digest)]
    if patterns := filters.get("reference"):  # of an image's names only those that are asked for
        rows = [row for row in rows if any(_matches(row, pattern) for pattern in patterns)] or rows
    columns = list(IMAGE_COLUMNS)
    if flags["digests"]:
        columns.insert(2, "Digest")
    if flags["quiet"]:
        rows = list({row[0].id: row for row in rows}.values())
    listing = tabulate(
        rows,
        lambda row: image_view(row, no_trunc=flags["no_trunc"]),
        IMAGE_TITLES,
        columns=columns,
        form=flags["form"],
        quiet="ID" if flags["quiet"] else None,
    )
    if not flags["quiet"]:
        listing[:] = [row[0] for row in rows]
    return listing


def _tree(engine: Any, found: Sequence[Any], *, no_trunc: bool) -> Listing:
    """docker's `images --tree`: sizes are of the unpacked files, and of what a registry would send."""
    rows: list[tuple[str, ...]] = []
    engine.containers.reconcile()  # containers that removed themselves use nothing
    for image in found:
        digest = engine.images.catalog_row(image).manifest
        disk, content = human_size(image.size_bytes), human_size(sum(layer.size_bytes for layer in image.layers))
        used = "U" if engine.images.catalog.containers_of(image.id) else ""
        rows.append((image.tags[0] if image.tags else "<untagged>", _shown(image.id, no_trunc), disk, content, used))
        platform = "/".join(
            str(image.raw_config[key]) for key in ("os", "architecture", "variant") if image.raw_config.get(key)
        )
        leaves = [(name, _shown(image.id, no_trunc), "", "", "") for name in image.tags[1:]]
        leaves.append((platform or "unknown", _shown(digest, no_trunc), disk, content, used))
        for number, (name, *facts) in enumerate(leaves):
            rows.append((f"{'└─' if number == len(leaves) - 1 else '├─'} {name}", *facts))
    header = ("IMAGE", "ID", "DISK USAGE", "CONTENT SIZE", "IN USE")
    return Listing(found, header=header, rows=rows)


def _shown(digest: str, no_trunc: bool) -> str:  # noqa: FBT001
    return digest if no_trunc else digest.partition(":")[2][:12]


@command("verify", "[OPTIONS] [IMAGE...]")
@flag("--json", "as_json", help="As JSON")
@flag("--repair", help="Fetch what is damaged again from the registry it came from")
@flag("-q", "--quiet", help="Only show images that are damaged")
@words("names", kind=IMAGE)
@click.pass_context
def verify(ctx: click.Context, names: tuple[str, ...], *, as_json: bool, repair: bool, quiet: bool) -> Any:
    """Read every blob of images (default: of all) again and compare it with its digest."""
    from ..imaging.verification import repair as mend
    from ..imaging.verification import verify_images

    host = host_of(ctx)
    engine = host.engine
    try:
        verdicts = verify_images(engine.images, names)
        mended = {verdict.image.id for verdict in verdicts if repair and not verdict.good}
        for verdict in verdicts:
            if verdict.image.id in mended:
                mend(engine.images, engine.pulls, verdict)
                host.note(f"{verdict.name}: fetched again")
        if mended:
            verdicts = verify_images(engine.images, names)
    except NoSuchImage as err:
        raise _not_there(err) from None
    bad = [verdict for verdict in verdicts if not verdict.good]
    text = json.dumps([verdict.to_dict() for verdict in verdicts], indent=2) if as_json else _verdicts(verdicts, quiet)
    if not bad:
        return Listing(verdicts, text=text)
    if text:
        host.line(text)
    several = f"{len(bad)} of {len(verdicts)} images are damaged"
    raise StoreError(
        several if len(bad) > 1 else f"{bad[0].name} is damaged: {bad[0].damages[0].message}",
        resolution=bad[0].repair,
        exit_code=1,
    )


def _verdicts(verdicts: Sequence[Any], quiet: bool) -> str:  # noqa: FBT001
    lines = []
    for each in verdicts:
        if each.good and not quiet:
            lines.append(f"{each.name}: good ({each.blobs} blobs, {human_size(each.size_bytes)})")
        for damage in each.damages:
            lines.append(f"{each.name}: {damage.part} {damage.digest}: {damage.message}")
        if each.damages:
            lines.append(f"  {each.repair}")
    return "\n".join(lines)


def _matches(row: ImageRow, pattern: str) -> bool:
    from fnmatch import fnmatchcase

    name, tag = split_tag(pattern)
    _, repository, its_tag, _ = row
    familiar = {repository, repository.removeprefix("docker.io/library/"), repository.removeprefix("docker.io/")}
    return any(fnmatchcase(each, name or "") for each in familiar) and (tag is None or fnmatchcase(its_tag, tag))


@command("rmi", "[OPTIONS] IMAGE [IMAGE...]")
@flag("-f", "--force", help="Force removal of the image")
@flag("--no-prune", help="Do not delete untagged parents")
@words("names", least=1, kind=IMAGE)
@click.pass_context
def rmi(ctx: click.Context, names: tuple[str, ...], *, force: bool, no_prune: bool) -> Any:
    """Remove one or more images."""
    host = host_of(ctx)
    errors: list[LabkernelError] = []
    done: list[Any] = []
    for name in names:
        try:
            for action in host.engine.images.remove(name, force=force):
                for verb, what in action.items():
                    host.line(f"{verb}: {what}")
                    done.append(action)
        except NoSuchImage as err:
            if force:
                host.error(err)
            else:
                errors.append(_not_there(err))
        except LabkernelError as err:
            errors.append(err)
    failures(errors, host, done)


@command("tag", "SOURCE_IMAGE[:TAG] TARGET_IMAGE[:TAG]")
@click.argument("source", type=IMAGE)
@click.argument("target")
@click.pass_context
def tag(ctx: click.Context, source: str, target: str) -> None:
    """Create a tag TARGET_IMAGE that refers to SOURCE_IMAGE."""
    try:
        host_of(ctx).engine.images.tag(source, target)
    except NoSuchImage as err:
        raise _not_there(err) from None


HISTORY_TITLES = {
    "ID": "IMAGE",
    "CreatedSince": "CREATED",
    "CreatedBy": "CREATED BY",
    "Size": "SIZE",
    "Comment": "COMMENT",
    "CreatedAt": "CREATED AT",
}


@command("history", "[OPTIONS] IMAGE")
@option("--format", "form", metavar="string", help="table, json, 'table TEMPLATE' or a Go template")
@flag("-H", "--human", default=True, help="Print sizes and dates in human readable format")
@flag("--no-trunc", help="Don't truncate output")
@flag("-q", "--quiet", help="Only show image IDs")
@click.argument("image", type=IMAGE)
@click.pass_context
def history(ctx: click.Context, /, image: str, **flags: Any) -> Listing:
    """Show the history of an image."""
    try:
        entries = host_of(ctx).engine.images.history(image)
    except NoSuchImage as err:
        raise _not_there(err) from None

    def view(entry: Any) -> dict[str, Any]:
        by = str(entry.get("CreatedBy", "")).replace("\t", " ")
        id = str(entry.get("Id") or "<missing>")
        created = epoch(entry.get("Created"))
        return {
            "ID": id if flags["no_trunc"] else id.removeprefix("sha256:")[:12],
            "CreatedSince": age(entry.get("Created")),
            "CreatedAt": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(created)) if created else "N/A",
            "CreatedBy": by if flags["no_trunc"] or len(by) <= 45 else f"{by[:44]}…",
            "Size": human_size(entry.get("Size") or 0) if flags["human"] else str(entry.get("Size") or 0),
            "Comment": str(entry.get("Comment") or ""),
        }

    columns = ("ID", "CreatedSince" if flags["human"] else "CreatedAt", "CreatedBy", "Size", "Comment")
    quiet = "ID" if flags["quiet"] else None
    return tabulate(entries, view, HISTORY_TITLES, columns=columns, form=flags["form"], quiet=quiet)


@command("load", "[OPTIONS]")
@option("-i", "--input", metavar="string", help="Read from tar archive file, instead of STDIN")
@flag("-q", "--quiet", help="Suppress the load output")
@click.pass_context
def load(ctx: click.Context, input: str | None, *, quiet: bool) -> Any:
    """Load an image from a tar archive, an OCI image layout or STDIN."""
    host = host_of(ctx)
    notify = (lambda line: None) if quiet else host.line
    with ExitStack() as stack:
        layout = host.working_dir() / input / "oci-layout" if input else None
        if layout is not None and layout.is_file():
            found = host.engine.images.load(layout.parent, notify=notify)
        else:
            found = host.engine.images.load(_archive(stack, host, input, "-i FILE.tar"), notify=notify)
    return Listing(found, text="") if host.notebook else None


@command("save", "[OPTIONS] IMAGE [IMAGE...]")
@option("-o", "--output", metavar="string", help="Write to a file, instead of STDOUT")
@option("--platform", metavar="string", help="Save only the given platform variant")
@words("names", least=1, kind=IMAGE)
@click.pass_context
def save(ctx: click.Context, names: tuple[str, ...], output: str | None, platform: str | None) -> None:
    """Save one or more images to a tar archive (streamed to STDOUT by default)."""
    host = host_of(ctx)
    try:
        # First, so that nothing is created for a typing error.
        for name in names:
            found = host.engine.images.get(name)
            if platform is not None:
                host.engine.images.check_platform(found, platform)
    except NoSuchImage as err:
        raise _not_there(err) from None
    with tar_output(host, output) as out:
        host.engine.images.save(list(names), out, platform=platform)


@command("export", "[OPTIONS] IMAGE")
@option("-o", "--output", metavar="string", help="Write to a file, instead of STDOUT")
@click.argument("image", type=IMAGE)
@click.pass_context
def export(ctx: click.Context, image: str, output: str | None) -> None:
    """Write the flattened root file system of an image as a tar archive."""
    host = host_of(ctx)
    try:
        host.engine.images.get(image)
    except NoSuchImage:
        host.engine.images.resolve(image, notify=host.note)
    with tar_output(host, output) as out:
        host.engine.images.export_rootfs(image, out)


@command("import", "[OPTIONS] FILE|URL|- [REPOSITORY[:TAG]]")
@many("-c", "--change", help="Apply Dockerfile instruction to the created image")
@option("-m", "--message", metavar="string", help="Set commit message for imported image")
@option("--platform", metavar="string", help="Set platform of the imported image")
@click.argument("file")
@click.argument("repository", required=False)
@click.pass_context
def import_(ctx: click.Context, /, file: str, repository: str | None, **flags: Any) -> Any:
    """Import the contents from a tarball to create a filesystem image."""
    host = host_of(ctx)
    if file.startswith(("http://", "https://")):
        from ..building.sources import download

        file = str(download(file, host.engine.layout, checksum=None).path)
    name, tag = split_tag(repository)
    with ExitStack() as stack:
        source = _archive(stack, host, None if file == "-" else file, "FILE.tar")
        more = {"platform": flags["platform"], "message": flags["message"] or ""}
        image = host.engine.images.import_tar(source, repository=name, tag=tag, changes=flags["change"], **more)
    if not host.notebook:
        host.line(image.id)
    return image


def _archive(stack: ExitStack, host: Any, path: str | None, instead: str) -> Any:
    """The tar archive to read: a file, or stdin where there is one."""
    if path is None:
        if host.stdin_fd() is None or host.stdin_is_terminal():
            raise UsageError("requested load from stdin, but stdin is empty", resolution=f"give {instead}", exit_code=1)
        return sys.stdin.buffer
    try:
        return stack.enter_context((host.working_dir() / path).open("rb"))
    except OSError as err:
        raise UsageError(f"open {path}: {(err.strerror or '').lower()}", exit_code=1) from None


@command("prune", "[OPTIONS]")
@flag("-a", "--all", help="Remove all unused images, not just dangling ones")
@flag("-f", "--force", help="Do not prompt for confirmation")
@many("--filter", metavar="filter", help="Provide filter values (e.g. until=<timestamp>)")
@click.pass_context
def prune(ctx: click.Context, *, all: bool, force: bool, filter: tuple[str, ...]) -> Any:
    """Remove unused images."""
    host = host_of(ctx)
    what = "all images without at least one container associated to them" if all else "all dangling images"
    confirm(host, f"This will remove {what}.", force=force)
    filters: dict[str, Any] = filters_of(filter) or {}
    if all:
        filters["dangling"] = ["false"]
    answer = host.engine.images.prune(filters=filters or None)
    gone = [deleted(record) for record in answer.get("ImagesDeleted") or []]
    return pruned("Deleted Images:", gone, answer.get("SpaceReclaimed", 0))
