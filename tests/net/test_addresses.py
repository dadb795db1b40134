from __future__ import annotations

import pytest

from labkernel.net import addresses, firewall, naming
from labkernel.net.addresses import parse


def test_subnets_in_words_and_numbers() -> None:
    subnet = parse("10.5.0.77/24")
    assert str(subnet) == "10.5.0.0/24"
    assert addresses.number("10.5.0.255") in subnet
    assert addresses.number("10.5.1.0") not in subnet
    assert subnet.overlaps(parse("10.0.0.0/8"))
    assert not subnet.overlaps(parse("10.5.1.0/24"))


@pytest.mark.parametrize("text", ["10.5.0.0", "10.5.0.0/33", "10.5.0/24", "::/64", "x/8"])
def test_what_is_no_subnet(text: str) -> None:
    with pytest.raises(ValueError):
        parse(text)


def test_a_free_subnet_meets_no_taken_one() -> None:
    taken = []
    for _ in range(240):
        found = addresses.free_subnet("store", taken)
        assert found is not None
        taken.append(found)
    assert addresses.free_subnet("store", taken) is None
    assert not any(a.overlaps(b) for n, a in enumerate(taken) for b in taken[n + 1 :])
    assert addresses.free_subnet("one store", []) != addresses.free_subnet("another", [])


def test_free_addresses() -> None:
    subnet = parse("10.0.0.0/29")
    used = {addresses.number("10.0.0.1")}
    found = []
    while (address := addresses.free_address(subnet, used)) is not None:
        used.add(address)
        found.append(addresses.words(address))
    assert found == ["10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6"]
    assert addresses.free_address(subnet, [], parse("10.0.0.4/30")) == addresses.number("10.0.0.4")


def test_names_fit_into_an_interface() -> None:
    key = naming.store_key("/some/store")
    bridge = naming.bridge_name(key, "f" * 64)
    assert len(bridge) == 15
    assert bridge.startswith(naming.prefixes(key)[0])
    assert addresses.mac_of(addresses.number("172.17.0.2")) == "02:42:ac:11:00:02"


def test_rules_as_text() -> None:
    bridge = {"bridge": "lk1", "subnet": "10.5.0.0/24", "internal": True}
    ports = [
        {"proto": "tcp", "ip": "", "host": 8080, "to": "10.5.0.2", "port": 80},
        {"proto": "udp", "ip": "127.0.0.1", "host": 53, "to": "10.5.0.2", "port": 53},
    ]
    text = firewall.script("labkernel_x", [bridge], ports)
    assert text.index("delete table ip labkernel_x") < text.index("table ip labkernel_x {")
    assert "elements = { tcp . 8080 : 10.5.0.2 . 80 }" in text
    assert "elements = { 127.0.0.1 . udp . 53 : 10.5.0.2 . 53 }" in text
    assert 'set internal { type ifname; elements = { "lk1" }; }' in text
