"""Frames: what goes in comes out, however the stream is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkernel.qemu import channel
from labkernel.qemu.channel import Decoder, Frame, Kind

frames = st.tuples(st.sampled_from(list(Kind)), st.integers(0, 65535), st.binary(max_size=300))


@given(st.lists(frames, max_size=8), st.integers(1, 50))
def test_any_cut_of_the_stream_gives_the_same_frames(sent: list[tuple[Kind, int, bytes]], step: int) -> None:
    stream = b"".join(channel.encode(kind, payload, process=number) for kind, number, payload in sent)
    decoder = Decoder()
    got = [frame for at in range(0, len(stream), step) for frame in decoder.feed(stream[at : at + step])]
    assert got == [Frame(*frame) for frame in sent]


def test_words_and_numbers() -> None:
    frame = Frame(Kind.EXITED, 0, b"status=3 kernel=6.1.0 user_us=-1 odd")
    assert frame.words() == {"status": "3", "kernel": "6.1.0", "user_us": "-1", "odd": ""}
    assert frame.numbers() == {"status": 3, "user_us": -1}


def test_start_payload_keeps_arguments_apart() -> None:
    payload = channel.start_payload(["a b", ""], env={"X": "1=2"}, cwd="", user="", stdin=True)
    assert payload == b"aa b\0a\0eX=1=2\0c/\0u0\0i\0"


def test_a_nul_in_an_argument_is_refused() -> None:
    with pytest.raises(ValueError, match="NUL"):
        channel.start_payload(["a\0b"], env=[], cwd="/", user="", stdin=False)


def test_setup_payload_writes_the_clock_exactly() -> None:
    payload = channel.setup_payload(time_s=12.5, entropy=b"\xff", device="/dev/vda", hostname=None, readonly=True)
    assert payload == b"t12.500000000\0rff\0d/dev/vda\0o\0"
    assert payload.startswith(channel.clock_payload(time_s=12.5, entropy=b"\xff"))


def test_setup_payload_names_network_and_shares() -> None:
    shares = [("/data", True, True), ("/etc/one", False, False)]
    payload = channel.setup_payload(time_s=0, entropy=b"", device="/dev/vda", network="closed", shares=shares)
    assert payload.endswith(b"nclosed\0md rw /data\0mf ro /etc/one\0")


def test_a_frame_too_large_for_the_guest_is_refused() -> None:
    with pytest.raises(ValueError, match="at most"):
        channel.encode(Kind.START, bytes(1 << 20))
