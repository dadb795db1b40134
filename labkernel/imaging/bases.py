"""Base images without any registry: `lab/busybox`, `lab/debian` and `lab/host`, and what they may stand in for.

    lab/busybox   assembled in memory from a static busybox found on the machine: 0.1 s, 2 MB, the same digest wherever
                  the same busybox is
    lab/debian    this machine's distribution, from its own package sources: apt resolves and downloads, we unpack the
                  packages into one layer. No root, no chroot, no maintainer scripts: some 5 s, 80 MB, kept
    lab/host      this machine's own root as the read-only lower layer, root driver only; `host_masks` hides its secrets

mmdebstrap would make lab/debian too, but as one more thing to install, with another path for plain users, and with a
new digest at every run; apt and dpkg-deb are on each machine that has it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DriverError, ImageError
from ..oci import reference
from ..oci.config import add_history, new_document, timestamp
from ..oci.reference import Reference
from ..store.blobs import temporary_directory
from ..store.catalog import HOST_LAYER, LayerInfo

if TYPE_CHECKING:
    from ..images import Images
    from .image import Image

Notify = Callable[[str], None]

DEFAULT_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_TAR_LAYER = "application/vnd.oci.image.layer.v1.tar"
NAMES = ("busybox", "debian", "host")

# Tags of Docker Hub's debian that any Debian release stands in for; others must name the machine's own release.
_ANY_RELEASE = {"latest", "stable", "stable-slim"}


def is_builtin(wanted: Reference) -> bool:
    """Whether this is `lab/busybox`, `lab/debian` or `lab/host` (tag latest)."""
    return wanted.name in {f"docker.io/lab/{name}" for name in NAMES} and wanted.tag == "latest" and not wanted.digest


def find_stand_in(wanted: Reference) -> Reference | None:
    """The built-in that may stand in for a name of Docker Hub while no registry answers; None for all other names.

    Any tag of busybox; of debian `latest`, `stable` and what names this machine's release (`bookworm-slim`, `12`).
    """
    if wanted.digest or wanted.domain != reference.DEFAULT_DOMAIN:
        return None
    if wanted.path == "library/busybox":
        return reference.parse_tag("lab/busybox")
    if wanted.path == "library/debian":
        release = os_release()
        own = {release.get("VERSION_CODENAME", ""), release.get("VERSION_ID", "")}
        tag = (wanted.tag or "latest").removesuffix("-slim")
        if wanted.tag in _ANY_RELEASE or (release.get("ID") == "debian" and (tag in own or tag.split(".")[0] in own)):
            return reference.parse_tag("lab/debian")
    return None


def ensure(images: Images, wanted: Reference, notify: Notify) -> Image:
    """The built-in image, made now unless it is there; two processes that ask at once make it once."""
    name = wanted.path.removeprefix("lab/")
    with images.locks.exclusive(f"base-{name}"):
        found = images.catalog.find_by_tag(str(wanted))
        if found:
            return images.get(found)
        make = {"busybox": _make_busybox, "debian": _make_debian, "host": _make_host}[name]
        with images.adding():
            return make(images, notify)


def ensure_stand_in(images: Images, wanted: Reference, stand_in: Reference, notify: Notify) -> Image:
    """Tag the built-in `stand_in` as `wanted` and remember in its provenance that it stands in."""
    image = ensure(images, stand_in, notify)
    provenance = dict(image.provenance)
    provenance["stands_in_for"] = sorted({*provenance.get("stands_in_for", ()), wanted.familiar})
    images.catalog.set_provenance(image.id, provenance)
    images.catalog.tag(str(wanted), image.id)
    return images.get(image.id)


def os_release() -> dict[str, str]:
    """This machine's os-release (man 5 os-release); empty where there is none."""
    try:
        return platform.freedesktop_os_release()
    except OSError:
        return {}


# -- busybox -----------------------------------------------------------------------------------------------------


def _make_busybox(images: Images, notify: Notify) -> Image:
    from .basefiles import busybox_tar, find_busybox

    with temporary_directory(images.layout, "busybox") as work:
        program = find_busybox() or _download_busybox(work, notify)
        data, version, moment = busybox_tar(program)
    blob = images.blobs.put(data)
    layer = LayerInfo(blob.digest, blob.digest, _TAR_LAYER, blob.size_bytes)
    created = timestamp(moment)
    document = new_document(created=created, Cmd=["sh"], Env=[DEFAULT_PATH])
    add_history(document, f"labkernel: {version}, static, with a link for each applet")
    add_history(document, 'CMD ["sh"]', empty_layer=True)
    return images.commit_layers(
        document, [layer], ["lab/busybox"], provenance={"builtin": "lab/busybox", "source": version}
    )


def _download_busybox(work: Path, notify: Notify) -> Path:
    """busybox out of the package busybox-static, without root. Raises ImageError with the remedy."""
    from .packages import download_one, extract_package

    notify("lab/busybox: no static busybox on this machine; fetching the package busybox-static")
    try:
        package = download_one("busybox-static", work)
        extract_package(package, work / "package")
    except ImageError as err:
        raise ImageError(
            "no static busybox was found on this machine",
            details=err.brief,
            resolution="apt-get install busybox-static (or put a static `busybox` on PATH), then try again",
        ) from err
    for place in ("bin/busybox", "usr/bin/busybox"):
        if (work / "package" / place).is_file():
            return work / "package" / place
    raise ImageError(
        "the package busybox-static holds no busybox", resolution="put a static `busybox` on PATH, then try again"
    )


# -- debian ------------------------------------------------------------------------------------------------------


def _make_debian(images: Images, notify: Notify) -> Image:
    from .packages import fetch_base, write_base

    release = os_release()
    title = release.get("PRETTY_NAME") or "Debian"
    notify(f"lab/debian: {title} from this machine's package sources (once; it is kept)")
    with temporary_directory(images.layout, "debian") as work:
        packages = fetch_base(work)
        size = sum(package.stat().st_size for package in packages)
        notify(f"lab/debian: {len(packages)} packages, {size / 1e6:.0f} MB; unpacking")
        with images.blobs.writer() as out:
            moment = write_base(packages, out)
    assert out.blob is not None
    layer = LayerInfo(out.blob.digest, out.blob.digest, _TAR_LAYER, out.blob.size_bytes)
    document = new_document(created=timestamp(moment), Cmd=["bash"], Env=[DEFAULT_PATH])
    add_history(document, f"labkernel: {title}, {len(packages)} packages, without documentation")
    add_history(document, 'CMD ["bash"]', empty_layer=True)
    image = images.commit_layers(
        document, [layer], ["lab/debian"], provenance={"builtin": "lab/debian", "source": title}
    )
    notify(f"lab/debian: ready, {out.blob.size_bytes / 1e6:.0f} MB")
    return image


# -- host --------------------------------------------------------------------------------------------------------

# Directories that hold other people's or this machine's own secrets and state: each container of lab/host gets an
# empty tmpfs there instead. Modes as on a fresh system.
_HIDDEN_DIRECTORIES = {
    "/root": "0700",
    "/home": "0755",
    "/tmp": "1777",
    "/var/tmp": "1777",
    "/run": "0755",
    "/srv": "0755",
    "/mnt": "0755",
    "/media": "0755",
    "/boot": "0755",
    "/lost+found": "0700",
    "/var/log": "0755",
    "/var/spool": "0755",
    "/var/mail": "0755",
    "/var/backups": "0755",
    "/var/lib": "0755",
    "/var/cache": "0755",
    "/etc/ssl/private": "0700",
    "/etc/ssh": "0755",
    "/etc/sudoers.d": "0750",
    "/etc/NetworkManager": "0755",
    "/etc/wireguard": "0700",
    "/etc/kubernetes": "0755",
    "/etc/docker": "0755",
    "/etc/letsencrypt": "0700",
}
_HIDDEN_FILES = (
    "/etc/shadow",
    "/etc/shadow-",
    "/etc/gshadow",
    "/etc/gshadow-",
    "/etc/sudoers",
    "/etc/machine-id",
    "/etc/krb5.keytab",
    "/etc/security/opasswd",
)


def host_masks(layout: Any) -> tuple[list[str], list[dict[str, Any]]]:
    """What a container on the host's root must not see: (masked paths, tmpfs mounts of the runtime-spec).

    A deny-list of the usual places: home directories, keys, password hashes, logs, service data, temporary files, and
    this store. It can't know secrets kept elsewhere (say in /opt or /data): lab/host is for trusted work on one's own
    machine. File systems mounted below / do not show at all, since an overlay's lower layer stops at mount points.
    """
    hidden = dict(_HIDDEN_DIRECTORIES)
    for own in (layout.root, layout.runtime_dir):
        if not any(Path(own).is_relative_to(place) for place in hidden):
            hidden[str(own)] = "0700"
    mounts = [
        {
            "destination": place,
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["nosuid", "nodev", f"mode={mode}", "size=64m"],
        }
        for place, mode in sorted(hidden.items())
        # A symbolic link (/var/mail, /var/run) leads to a place which is itself in the list or is not secret.
        if os.path.isdir(place) and not os.path.islink(place)
    ]
    return [path for path in _HIDDEN_FILES if os.path.isfile(path)], mounts


def refuse_host(driver: Any) -> None:
    """Raises DriverError where `driver` cannot use this machine's root as a lower layer."""
    hint = "use lab/busybox or lab/debian here"
    if driver.name != "root":
        raise DriverError(
            f"lab/host needs the root driver; this is `{driver.name}`, whose overlay over / does not work",
            resolution=hint,
        )
    if driver.overlay == "copy":
        raise DriverError("lab/host needs overlay, which does not work here; it is not copied", resolution=hint)


def _make_host(images: Images, notify: Notify) -> Image:
    refuse_host(images.driver)
    title = os_release().get("PRETTY_NAME") or platform.system()
    notify(f"lab/host: this machine's own root ({title}), read-only below a layer of its own; usual secrets are hidden")
    from ..oci.manifest import digest_of

    diff_id = digest_of(b"labkernel: the root directory of this machine")
    layer = LayerInfo(diff_id, diff_id, HOST_LAYER, 0)
    document = new_document(Cmd=["sh"], Env=[DEFAULT_PATH])
    add_history(document, f"labkernel: the root directory of this machine ({title})")
    add_history(document, 'CMD ["sh"]', empty_layer=True)
    return images.commit_layers(document, [layer], ["lab/host"], provenance={"builtin": "lab/host", "source": title})
