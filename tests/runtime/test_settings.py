"""Settings: docker's words in, one form out, and docker's wording of what does not fit."""

from __future__ import annotations

from typing import Any

import pytest

from labkernel.errors import UsageError
from labkernel.runtime.settings import normalize, parse_command, parse_signal, parse_size

GOOD: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"name": None, "mem_limit": None}, {}),
    ({"mem_limit": "64m"}, {"mem_limit": 64 << 20}),
    ({"mem_limit": "1.5GiB"}, {"mem_limit": 3 << 29}),
    ({"memswap_limit": -1, "mem_limit": 6 << 20}, {"memswap_limit": -1, "mem_limit": 6 << 20}),
    ({"environment": {"A": 1, "B": None}}, {"environment": ["A=1", "B"]}),
    ({"environment": ["A=x=y"]}, {"environment": ["A=x=y"]}),
    ({"entrypoint": "sh -c 'a b'"}, {"entrypoint": ["sh", "-c", "a b"]}),
    ({"cap_add": ["sys_admin"], "cap_drop": "ALL"}, {"cap_add": ["CAP_SYS_ADMIN"], "cap_drop": ["ALL"]}),
    ({"tmpfs": ["/t:size=1m"]}, {"tmpfs": {"/t": "size=1m"}}),
    ({"volumes": ["data:/d:ro"]}, {"volumes": [{"source": "data", "destination": "/d", "mode": "ro"}]}),
    ({"volumes": {"/a": {"bind": "/b"}}}, {"volumes": [{"source": "/a", "destination": "/b", "mode": "rw"}]}),
    ({"volumes": ["/anon"]}, {"volumes": [{"source": "", "destination": "/anon", "mode": "rw"}]}),
    ({"ulimits": ["nofile=64:128"]}, {"ulimits": {"nofile": [64, 128]}}),
    ({"ulimits": [{"Name": "core", "Soft": 0, "Hard": 0}]}, {"ulimits": {"core": [0, 0]}}),
    ({"restart_policy": "on-failure:3"}, {"restart_policy": {"name": "on-failure", "max_retries": 3}}),
    ({"restart_policy": {"Name": "always"}}, {"restart_policy": {"name": "always", "max_retries": 0}}),
    ({"stop_signal": "SIGINT"}, {"stop_signal": 2}),
    ({"labels": ["a=b", "c"]}, {"labels": {"a": "b", "c": ""}}),
    ({"extra_hosts": {"h": "1.2.3.4"}}, {"extra_hosts": ["h:1.2.3.4"]}),
    ({"device_requests": []}, {}),
    ({"working_dir": "/a/../b/"}, {"working_dir": "/b"}),
]

BAD: list[tuple[dict[str, Any], str]] = [
    ({"mem_limit": "4m"}, "Minimum memory limit allowed is 6MB"),
    ({"mem_limit": -1}, "Minimum memory limit allowed is 6MB"),
    ({"mem_limit": "lots"}, "invalid size: 'lots'"),
    ({"memswap_limit": "64m"}, "always set the Memory limit"),
    ({"mem_limit": "64m", "memswap_limit": "32m"}, "larger than memory limit"),
    ({"mem_limit": "64m", "mem_reservation": "128m"}, "less than memory reservation"),
    ({"nano_cpus": 3_000_000_000}, "Range of CPUs is from 0.01 to 2.00, as there are only 2 CPUs available"),
    ({"nano_cpus": 1}, "Range of CPUs is from 0.01"),
    ({"nano_cpus": 10**9, "cpu_quota": 5000}, "Nano CPUs and CPU Quota cannot both be set"),
    ({"cpu_period": 1}, "CPU cfs period"),
    ({"cpu_quota": 10}, "CPU cfs quota"),
    ({"cpuset_cpus": "a"}, "Invalid value a for cpuset cpus"),
    ({"cpuset_cpus": "0-4000"}, "Requested CPUs are not available"),
    ({"blkio_weight": 5}, "Range of blkio weight"),
    ({"name": "a b"}, r"Invalid container name \(a b\), only \[a-zA-Z0-9\]"),
    ({"name": "x"}, "Invalid container name"),
    ({"environment": ["=x"]}, "invalid environment variable"),
    ({"working_dir": "rel"}, "needs to be an absolute path"),
    ({"hostname": "-x"}, "invalid hostname format"),
    ({"cap_add": ["NO_SUCH"]}, 'invalid CapAdd: unknown capability: "CAP_NO_SUCH"'),
    ({"security_opt": ["what"]}, "invalid --security-opt"),
    ({"tmpfs": {"rel": ""}}, "mount path must be absolute"),
    ({"tmpfs": {"/": ""}}, "destination can't be '/'"),
    ({"tmpfs": {"/t": "bogus"}}, r'invalid tmpfs option \["bogus"\]'),
    ({"volumes": ["a:b:c:d"]}, "invalid volume specification: 'a:b:c:d'"),
    ({"volumes": ["a:rel"]}, "mount path must be absolute"),
    ({"volumes": ["a:/"]}, "destination can't be '/'"),
    ({"volumes": ["a:/b:rx"]}, "invalid mode: rx"),
    ({"volumes": ["a:/b:ro,rw"]}, "invalid mode: ro,rw"),
    ({"volumes": ["/a:/b:rslave,shared"]}, "invalid mode: rslave,shared"),
    ({"extra_hosts": {"a": "nowhere"}}, 'invalid IP address in add-host: "nowhere"'),
    ({"dns": ["nowhere"]}, 'IP address is not correctly formatted: "nowhere"'),
    ({"sysctls": {"net.ipv4.ip_forward": "1"}, "network_mode": "host"}, "not allowed in host network namespace"),
    ({"sysctls": {"kernel.shmmax": "1"}, "ipc_mode": "host"}, "not allowed in the hosts ipc namespace"),
    ({"network_mode": "container:x", "extra_hosts": ["a:1.2.3.4"]}, "custom host-to-IP mapping and the network mode"),
    ({"volumes": ["a:/c"]}, "volume name is too short"),
    ({"volumes": ["a/b:/c"]}, "invalid characters for a local volume name"),
    ({"volumes": ["aa:/c", "bb:/c"]}, "Duplicate mount point: /c"),
    ({"volumes": ["aa:/c"], "tmpfs": {"/c": ""}}, "Duplicate mount point: /c"),
    ({"mounts": [{"Type": "bind", "Source": "/nonexistent", "Target": "/x"}]}, "bind source path does not exist"),
    ({"ulimits": ["files=1"]}, "invalid ulimit type: files"),
    ({"ulimits": ["nofile=2:1"]}, "less than or equal to hard limit: 2 > 1"),
    ({"ulimits": ["nofile=x"]}, "invalid ulimit argument"),
    ({"restart_policy": "sometimes"}, "unknown policy 'sometimes'"),
    ({"restart_policy": "always:3"}, "only be used with 'on-failure'"),
    ({"restart_policy": "always", "auto_remove": True}, "can't create 'AutoRemove' container with restart policy"),
    ({"stop_signal": "SIGFOO"}, "invalid signal: SIGFOO"),
    ({"oom_score_adj": 2000}, r"range for oom score adj is \[-1000, 1000\]"),
    ({"shm_size": -5}, "SHM size can not be less than 0"),
    ({"runtime": "kata"}, "unknown or invalid runtime name: kata"),
    ({"pid_mode": "sideways"}, "invalid pid mode"),
    ({"network_mode": "ns:x"}, "invalid network mode"),
    ({"memlimit": "64m"}, "unknown setting of a container: memlimit"),
    ({"entrypoint": "'"}, "invalid command"),
]


@pytest.mark.parametrize(("given", "settings"), GOOD, ids=str)
def test_one_form(given: dict[str, Any], settings: dict[str, Any]) -> None:
    assert normalize(given, cpus=2) == settings


@pytest.mark.parametrize(("given", "words"), BAD, ids=str)
def test_wording(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        normalize(given, cpus=2)
    assert caught.value.exit_code == 125


def test_a_slip_gets_a_suggestion() -> None:
    with pytest.raises(UsageError) as caught:
        normalize({"memlimit": "64m"})
    assert caught.value.resolution == "did you mean mem_limit?"


@pytest.mark.parametrize(("word", "number"), [("TERM", 15), ("sigkill", 9), ("9", 9), (2, 2), ("RTMIN+3", 37)])
def test_signals(word: object, number: int) -> None:
    assert parse_signal(word) == number


@pytest.mark.parametrize("word", ["", "0", "65", "99", "SIGSIG", "RTMAX+1"])
def test_no_signals(word: str) -> None:
    with pytest.raises(UsageError, match="invalid signal"):
        parse_signal(word)


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("1b", 1), ("1k", 1024), ("2KB", 2048), ("1 m", 1 << 20), (7, 7), ("-1", -1)]
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


def test_commands() -> None:
    assert parse_command(None) == []
    assert parse_command("sh -c 'echo  a'") == ["sh", "-c", "echo  a"]
    assert parse_command(["a", 1]) == ["a", "1"]
