"""What descriptions of devices (CDI) say, what is wrong with them, and what they make of a container's config."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest

from labkernel.errors import UsageError
from labkernel.runtime import cdi
from labkernel.runtime.settings import normalize

GOOD: dict[str, Any] = {
    "cdiVersion": "0.6.0",
    "kind": "vendor.com/class",
    "containerEdits": {"env": ["SHARED=1"]},
    "devices": [
        {"name": "zero", "containerEdits": {"deviceNodes": [{"path": "/dev/z", "hostPath": "/dev/zero"}]}},
        {"name": "one", "containerEdits": {"env": ["ONE=1", "SHARED=2"]}, "annotations": {"a": "b"}},
    ],
}
CONFIG: dict[str, Any] = {
    "process": {"env": ["PATH=/bin", "SHARED=0"], "user": {"uid": 7, "gid": 8}},
    "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}, {"destination": "/m/n", "source": "/old"}],
    "linux": {"resources": {"devices": []}},
}


def registry(folder: Path, **files: Any) -> cdi.Registry:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return cdi.read([str(folder)])


def changed(**parts: Any) -> dict[str, Any]:
    return {**copy.deepcopy(GOOD), **parts}


def device(edits: dict[str, Any], **parts: Any) -> dict[str, Any]:
    return changed(devices=[{"name": "x", "containerEdits": edits}], **parts)


def applied(folder: Path, edits: dict[str, Any], driver: str = "root", **parts: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    found = registry(folder, one=device(edits, **parts))
    assert not found.problems
    cdi.apply(config, [found.find("vendor.com/class=x")], driver)
    return config


def test_json_and_yaml_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "json").mkdir()
    (tmp_path / "yaml").mkdir()
    (tmp_path / "yaml/a.yaml").write_text(
        "cdiVersion: 0.6.0\nkind: vendor.com/class\ncontainerEdits:\n  env: [SHARED=1]\ndevices:\n"
        "- name: zero\n  containerEdits:\n    deviceNodes:\n    - path: /dev/z\n      hostPath: /dev/zero\n"
        "- name: one\n  annotations: {a: b}\n  containerEdits: {env: [ONE=1, SHARED=2]}\n"
    )
    plain, other = registry(tmp_path / "json", a=GOOD), cdi.read([str(tmp_path / "yaml")])
    assert list(plain.devices) == ["vendor.com/class=zero", "vendor.com/class=one"]
    assert [(d.name, d.shared, d.own, d.annotations) for d in plain.devices.values()] == [
        (d.name, d.shared, d.own, d.annotations) for d in other.devices.values()
    ]


def test_only_files_of_descriptions_are_read(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("{")
    (tmp_path / ".hidden.json").write_text("{")
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    found = registry(tmp_path, a=GOOD)
    assert len(found.devices) == 2
    assert {Path(path).name for path in found.problems} == {"pipe.json", "folder.json"}
    assert cdi.read([str(tmp_path / "nowhere")]).devices == {}


def test_the_directories_can_be_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cdi.directories() == ["/etc/cdi", "/var/run/cdi"] or cdi.VARIABLE in os.environ
    monkeypatch.setenv(cdi.VARIABLE, f"{tmp_path}/a:{tmp_path}/b")
    assert cdi.directories() == [f"{tmp_path}/a", f"{tmp_path}/b"]


def test_a_later_directory_counts_more_and_two_files_of_one_are_a_conflict(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        registry(tmp_path / name, x=device({"env": [f"FROM={name}"]}))
    both = cdi.read([str(tmp_path / "a"), str(tmp_path / "b")])
    assert both.find("vendor.com/class=x").own.env == ["FROM=b"]
    registry(tmp_path / "b", y=device({"env": ["FROM=y"]}))
    both = cdi.read([str(tmp_path / "a"), str(tmp_path / "b")])
    with pytest.raises(UsageError, match=r"is described twice: .*/b/x\.json and .*/b/y\.json"):
        both.find("vendor.com/class=x")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "Expecting"),
        ("[]", "Expected `object`, got `array`"),
        (changed(cdiVersion="9.0.0"), 'unknown cdiVersion "9.0.0"'),
        (changed(kind="class"), 'invalid kind "class"'),
        (changed(kind="-vendor.com/class"), 'invalid kind "-vendor.com/class"'),
        (changed(devices=[]), "it describes no device"),
        (changed(more=1), "unknown field `more`"),
        (changed(devices=[{"name": "x"}]), "missing required field `containerEdits`"),
        (changed(devices=[{"name": "x", "containerEdits": {}}]), 'the device "x" has no containerEdits'),
        (changed(devices=[{"name": "a b", "containerEdits": {"env": ["A=1"]}}]), 'invalid name of a device: "a b"'),
        (changed(devices=[{"name": "x", "containerEdits": {"env": ["A=1"]}}] * 2), '"x" is described twice'),
        (device({"env": ["A"]}), 'invalid variable "A"'),
        (device({"env": "A=1"}), "Expected `array`, got `str`"),
        (device({"deviceNodes": [{"path": "dev/x"}]}), 'not absolute: "dev/x"'),
        (device({"deviceNodes": [{"path": "/dev/x", "type": "q"}]}), 'invalid type "q"'),
        (device({"deviceNodes": [{"path": "/dev/x", "permissions": "rx"}]}), 'invalid permissions "rx"'),
        (device({"deviceNodes": [{"path": "/dev/x", "major": -1}]}), "out of range"),
        (device({"mounts": [{"hostPath": "", "containerPath": "/x"}]}), "invalid mount"),
        (device({"mounts": [{"containerPath": "/x"}]}), "missing required field `hostPath`"),
        (device({"additionalGids": [-1]}, cdiVersion="1.0.0"), "additionalGids is out of range"),
        (device({"additionalGids": [5]}), "cdiVersion 0.6.0 has no additionalGids; that came with 0.7.0"),
        (device({"deviceNodes": [{"path": "/a", "hostPath": "/b"}]}, cdiVersion="0.4.0"), "that came with 0.5.0"),
    ],
)
def test_a_wrong_file_is_named_with_its_reason(tmp_path: Path, content: Any, words: str) -> None:
    found = registry(tmp_path, good=changed(kind="other.com/class"), bad=content)
    path = str(tmp_path / "bad.json")
    assert list(found.problems) == [path]
    assert words in found.problems[path]
    with pytest.raises(UsageError) as caught:
        found.find("vendor.com/class=x")
    assert f"{path}: {found.problems[path]}" == caught.value.details
    assert found.find("other.com/class=zero")


def test_an_unknown_device_is_told_with_those_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r'unresolvable CDI device "vendor\.com/class=zer"') as caught:
        registry(tmp_path, a=GOOD).find("vendor.com/class=zer")
    assert caught.value.resolution == "did you mean vendor.com/class=zero?"
    with pytest.raises(UsageError) as caught:
        registry(tmp_path).find("nobody.org/thing=7")
    assert caught.value.resolution == "there is: vendor.com/class=one, vendor.com/class=zero"


def test_edits_of_a_file_come_once_and_first(tmp_path: Path) -> None:
    found = registry(tmp_path, a=GOOD)
    config = copy.deepcopy(CONFIG)
    cdi.apply(config, [found.find("vendor.com/class=one"), found.find("vendor.com/class=zero")], "root")
    assert config["process"]["env"] == ["PATH=/bin", "ONE=1", "SHARED=2"]
    zero = os.stat("/dev/zero")
    assert config["linux"]["devices"] == [
        {
            "path": "/dev/z",
            "source": "/dev/zero",
            "type": "c",
            "fileMode": 0o666,
            "uid": 7,
            "gid": 8,
            "major": os.major(zero.st_rdev),
            "minor": os.minor(zero.st_rdev),
            "access": "rwm",
        }
    ]
    assert config["linux"]["resources"]["devices"] == [
        {"allow": True, "type": "c", "major": 1, "minor": 5, "access": "rwm"}
    ]


def test_a_node_may_be_told_in_full(tmp_path: Path) -> None:
    node = {"path": "/dev/n", "type": "b", "major": 250, "minor": 3, "fileMode": 0o600, "uid": 1, "gid": 2}
    config = applied(tmp_path, {"deviceNodes": [{**node, "permissions": "r"}]})
    assert config["linux"]["devices"] == [{**node, "source": "/dev/n", "access": "r"}]
    nothing = applied(tmp_path, {"deviceNodes": [{**node, "permissions": "none"}]})
    assert nothing["linux"]["resources"]["devices"] == []
    for driver in ("rootless", "proot"):
        with pytest.raises(UsageError, match=r"its node /dev/n is not there"):
            applied(tmp_path, {"deviceNodes": [node]}, driver)
        other = {"path": "/dev/n", "hostPath": "/dev/zero", "type": "c", "major": 1, "minor": 3}
        with pytest.raises(UsageError, match="/dev/zero is not 1:3, and only the driver root makes another node"):
            applied(tmp_path, {"deviceNodes": [other]}, driver)


def test_mounts_and_groups(tmp_path: Path) -> None:
    mounts = [{"hostPath": str(tmp_path), "containerPath": "/m/n", "options": ["ro", "nosuid", "bind"]}]
    mounts.append({"hostPath": "tmpfs", "containerPath": "/m", "type": "tmpfs"})  # type: ignore[dict-item]
    config = applied(tmp_path, {"mounts": mounts, "additionalGids": [0, 44, 44]}, cdiVersion="1.0.0")
    assert [mount["destination"] for mount in config["mounts"]] == ["/proc", "/m", "/m/n"]
    assert config["mounts"][2]["source"] == str(tmp_path)
    assert config["process"]["user"]["additionalGids"] == [44]


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ({"deviceNodes": [{"path": "/dev/nothing-here"}]}, "its node /dev/nothing-here is not there"),
        ({"deviceNodes": [{"path": "/etc/passwd"}]}, "/etc/passwd is not a device node"),
        ({"deviceNodes": [{"path": "/dev/zero", "type": "b"}]}, "/dev/zero is a device of type c, not b"),
        ({"mounts": [{"hostPath": "/nothing-here", "containerPath": "/x"}]}, "its mount /nothing-here is not there"),
        ({"mounts": [{"hostPath": "/", "containerPath": "/x", "options": ["odd"]}]}, 'unknown option "odd"'),
        ({"mounts": [{"hostPath": "x", "containerPath": "/x", "type": "ext4"}]}, 'is of type "ext4"'),
        ({"hooks": [{"hookName": "createContainer", "path": "/bin/x"}]}, "needs hooks, .*: createContainer /bin/x"),
        ({"intelRdt": {"closID": "x"}}, "needs intelRdt"),
        ({"netDevices": [{"hostInterfaceName": "a", "name": "b"}]}, "needs netDevices"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(tmp_path: Path, edits: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=rf'CDI device "vendor\.com/class=x" \(.*one\.json\): .*{words}'):
        applied(tmp_path, edits, cdiVersion="1.1.0")


# -- settings ----------------------------------------------------------------------------------------------------------


def test_names_among_devices_become_requests_as_with_docker() -> None:
    given = normalize({"devices": ["/dev/zero:/dev/z", "vendor.com/class=x"]})
    assert given == {"devices": ["/dev/zero:/dev/z"], "device_requests": ["vendor.com/class=x"]}
    request = {"Driver": "cdi", "Count": 0, "DeviceIDs": ["a.b/c=1", "a.b/c=2"], "Capabilities": None, "Options": {}}
    assert normalize({"device_requests": [request]}) == {"device_requests": ["a.b/c=1", "a.b/c=2"]}


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (
            {"Driver": "", "Count": -1, "Capabilities": [["gpu"]]},
            r'could not select device driver "" with capabilities: \[\[gpu\]\]',
        ),
        ({"Driver": "cdi", "Count": 1, "DeviceIDs": ["a.b/c=1"]}, "unexpected count in CDI device request"),
        ({"Driver": "cdi", "DeviceIDs": ["a.b/c=1"], "Options": {"a": "b"}}, "unexpected options"),
        ({"Driver": "cdi", "DeviceIDs": ["/dev/zero"]}, 'invalid name of a CDI device: "/dev/zero"'),
    ],
)
def test_other_requests_are_refused(request_: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        normalize({"device_requests": [request_]})


def test_a_word_that_is_neither_path_nor_name() -> None:
    with pytest.raises(UsageError, match="invalid device specification: vendor/class") as caught:
        normalize({"devices": ["vendor/class"]})
    assert "VENDOR/CLASS=NAME" in str(caught.value.resolution)
