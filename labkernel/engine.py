"""The engine: opens the store, picks the driver, hands the services what they need; nothing else.

Services are made when they are first used, so that `labkernel ps` pays only for containers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .runtime.client import Runtime
from .runtime.driver import Driver, choose_driver
from .store.blobs import Blobs
from .store.database import Database
from .store.layout import Layout

if TYPE_CHECKING:
    from .builds import Builds
    from .comparisons import Comparisons
    from .compose.service import Compose
    from .consistency import Problem
    from .containers import Containers
    from .events import Events
    from .imaging.artifacts import Artifacts
    from .imaging.autobuilds import Autobuilds
    from .imaging.collection import ImageCollection
    from .imaging.layerview import Layers
    from .imaging.logins import Logins
    from .imaging.pulls import Pulls
    from .imaging.pushes import Pushes
    from .metrics import Metrics
    from .networks import Networks
    from .registries import Registries
    from .runtime.probe import Capability
    from .vms import VMs
    from .volumes import Volumes


class Engine:
    """One open store with its driver and services. Cheap to open; any number of processes may open the same store."""

    def __init__(self, layout: Layout, driver: Driver) -> None:
        self.layout = layout
        self.driver = driver

    @classmethod
    def open(
        cls,
        root: str | os.PathLike[str] | None = None,
        *,
        driver: str | None = None,
        runtime_dir: str | os.PathLike[str] | None = None,
    ) -> Engine:
        """Open (and on first use create) the store at `root`.

        `root` defaults to LABKERNEL_ROOT, then the user's data directory; `runtime_dir` to LABKERNEL_RUNTIME_DIR, then
        a directory of this user that a reboot clears; `driver` to LABKERNEL_DRIVER, then the first this machine allows.
        Raises DriverError when no driver works here, StoreError when the store cannot be used.
        """
        layout = Layout.find(root=root, runtime_dir=runtime_dir)
        chosen = choose_driver(layout, driver)
        if chosen.name == "proot":
            from .running.prootsetup import ensure

            ensure(layout)
        return cls(layout, chosen)

    @cached_property
    def db(self) -> Database:
        return Database(self.layout.database)

    @cached_property
    def blobs(self) -> Blobs:
        return Blobs(self.layout)

    @cached_property
    def runtime(self) -> Runtime:
        return Runtime(
            socket=self.layout.socket,
            root=self.layout.root,
            runtime_dir=self.layout.runtime_dir,
            driver=self.driver.name,
        )

    @cached_property
    def images(self) -> ImageCollection:
        from .imaging.collection import ImageCollection

        parts = (self.layout, self.blobs, self.db, self.runtime, self.driver)
        return ImageCollection(*parts, builds=lambda: self.builds, pulls=lambda: self.pulls, pushes=lambda: self.pushes)

    @cached_property
    def pulls(self) -> Pulls:
        from .imaging.pulls import Pulls

        return Pulls(self.images)

    @cached_property
    def pushes(self) -> Pushes:
        from .imaging.pushes import Pushes

        return Pushes(self.images, self.pulls)

    @cached_property
    def registry(self) -> Registries:
        from .registries import Registries

        return Registries(self.layout, lambda: self.images)

    @cached_property
    def artifacts(self) -> Artifacts:
        from .imaging.artifacts import Artifacts

        return Artifacts(self.pulls)

    @cached_property
    def autobuilds(self) -> Autobuilds:
        from .imaging.autobuilds import Autobuilds

        return Autobuilds(self.layout, self.images, lambda: self.builds, lambda: self.pushes)

    @cached_property
    def logins(self) -> Logins:
        from .imaging.logins import Logins

        return Logins()

    @cached_property
    def volumes(self) -> Volumes:
        from .volumes import Volumes

        return Volumes(self.layout, self.db, self.runtime)

    @cached_property
    def containers(self) -> Containers:
        from .containers import Containers

        parts = (self.layout, self.db, self.runtime, self.driver, lambda: self.images, self.volumes)
        return Containers(*parts, networks=self.networks)

    @cached_property
    def networks(self) -> Networks:
        from .networks import Networks

        parts = (self.layout, self.db, self.runtime, self.driver)
        return Networks(*parts, lambda: self.containers, lambda: self.vms)

    @cached_property
    def compose(self) -> Compose:
        from .compose.service import Compose

        return Compose(self.containers, self.images, self.builds, self.networks, self.volumes)

    @cached_property
    def builds(self) -> Builds:
        from .builds import Builds

        return Builds(self.layout, self.blobs, self.db, self.runtime, self.driver, self.images, self.networks)

    @cached_property
    def history(self) -> Events:
        from .events import Events

        return Events(self.layout, self.db)

    @cached_property
    def vms(self) -> VMs:
        from .vms import VMs

        parts = (self.layout, self.db, self.runtime, self.driver, self.images, self.volumes)
        return VMs(*parts, networks=self.networks)

    @cached_property
    def metrics(self) -> Metrics:
        from .metrics import Metrics

        return Metrics(lambda: [*self.containers.list(), *self.vms.list()])

    @cached_property
    def comparisons(self) -> Comparisons:
        from .comparisons import Comparisons

        return Comparisons(
            self.containers,
            self.vms,
            self.images,
            builds=lambda: self.builds,
            layout=self.layout,
            open_engine=Engine.open,
        )

    def ping(self) -> bool:
        """Whether the engine answers: it is embedded, so it does."""
        return True

    def version(self) -> dict[str, Any]:
        """The Docker SDK's `version()`, as far as an embedded engine has one."""
        from . import __version__

        kernel = os.uname()
        return {"Version": __version__, "Os": "linux", "Arch": kernel.machine, "KernelVersion": kernel.release}

    def login(self, username: str, password: str, *, registry: str | None = None) -> dict[str, Any]:
        """Log in to a registry (default: Docker Hub). Raises RegistryError when it refuses."""
        self.logins.login(registry, username, password)
        return {"Status": "Login Succeeded"}

    def doctor(self, *, fresh: bool = False) -> list[Capability]:
        """Every capability tried, with cause and remedy: the sandbox's and the virtual machine's."""
        from .runtime.probe import probe

        return [*probe(self.layout, fresh=fresh), *self.vms.probe(fresh=fresh)]

    def events(
        self, since: Any = None, until: Any = None, filters: dict[str, Any] | None = None, *, decode: bool = True
    ) -> Iterator[Any]:
        """What happens in the store, as the Engine API's dictionaries (with `decode=False` as JSON bytes): from `since`
        (default: now) on, until `until` (default: for ever). Both are seconds since the epoch, datetimes or ages."""
        from .runtime.logreader import parse_moment

        start, end = (None if moment is None else parse_moment(moment) for moment in (since, until))
        found = self.history.stream(start, end, filters)
        return found if decode else (json.dumps(event).encode() + b"\n" for event in found)

    def check(self, *, verify: bool = False) -> list[Problem]:
        """What is inconsistent in the store or leaked outside it; empty when nothing is. Changes nothing."""
        from .consistency import check

        return check(self, verify=verify)

    def layers(self, image: str) -> Layers:
        """What each layer of a local image added, changed and removed, and the bytes wasted; shows itself in a cell."""
        from .imaging.layerview import explore

        return explore(self.images, image)

    def monitor(self, *things: Any, **options: Any) -> Any:
        """A live widget of the CPU, memory, throttling and pids of containers and VMs. Needs a notebook."""
        # The one place where the engine knows a face: `lab.monitor(c)` is how a notebook asks for it.
        from .widgets.monitor import monitor

        return monitor(*things, history=self.history, **options)

    def dashboard(self, **options: Any) -> Any:
        """A live board of all containers, virtual machines, images, volumes and networks, with docker's verbs."""
        from .widgets.dashboard import dashboard

        return dashboard(self, **options)

    def processes(self, thing: Any = None) -> Any:
        """The process tree of a container or VM, or of the engine with all that it runs; shows itself in a cell."""
        from .widgets.trees import processes

        return processes(self, thing)

    def network_map(self) -> Any:
        """Networks and the containers in them, with addresses and published ports, as a picture."""
        from .widgets.trees import network_map

        return network_map(self)

    def close(self) -> None:
        """Close the database. Containers go on: they belong to the supervisor."""
        if "metrics" in vars(self):
            self.metrics.close()
        if "db" in vars(self):
            self.db.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<labkernel Engine: driver {self.driver.name}, store {self.layout.root}>"
