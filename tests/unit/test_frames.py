"""Framing: what is sent arrives, however the stream is cut; what is not a frame of ours ends with a FrameError."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.rpc import frames
from shoal.rpc.frames import FrameError, FrameReader, check_size, decode_frame, encode_message, join_frame, make_decoder
from shoal.rpc.messages import MAX_FRAME_BYTES, Done, Failed, Hello, Message, Refused

MESSAGES = Done | Failed | Hello | Refused
decoder = make_decoder(MESSAGES)

texts = st.text(max_size=30)
messages = st.one_of(
    st.builds(Done, rid=st.integers(0, 2**63)),
    st.builds(Failed, rid=st.integers(0, 2**31), kind=texts, text=texts),
    st.builds(Refused, kind=texts, text=texts),
    st.builds(Hello, st.integers(0, 9), texts, st.binary(max_size=300), texts, texts),
)
batches = st.lists(st.lists(messages, max_size=5), max_size=6)


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({min(place, len(data)) for place in cuts} | {0, len(data)})
    return [data[start:end] for start, end in pairwise(at)]


def frame_of(*made: Message) -> bytes:
    return join_frame([encode_message(message) for message in made])


@given(batches, st.lists(st.integers(0, 4000), max_size=60))
def test_what_was_sent_arrives_however_the_stream_is_cut(sent: list[list[Message]], cuts: list[int]) -> None:
    stream = b"".join(frame_of(*batch) for batch in sent)
    reader = FrameReader()
    arrived = [decoder.decode(body) for piece in cut(stream, cuts) for body in reader.feed(piece)]
    assert arrived == sent


@given(batches)
def test_it_arrives_byte_by_byte_and_at_the_earliest_moment(sent: list[list[Message]]) -> None:
    reader = FrameReader()
    for batch in sent:
        frame = frame_of(*batch)
        for index in range(len(frame) - 1):
            assert list(reader.feed(frame[index : index + 1])) == []
        assert [decoder.decode(body) for body in reader.feed(frame[-1:])] == [batch]


@given(st.integers(101, 2**32 - 1), st.lists(st.integers(0, 40), max_size=5), st.binary(max_size=20))
def test_a_frame_over_the_limit_is_refused_before_its_body_comes(size: int, cuts: list[int], more: bytes) -> None:
    stream = frame_of(Done(7)) + size.to_bytes(4, "little") + more
    reader = FrameReader(limit_bytes=100)

    def read_all() -> None:
        for piece in cut(stream, cuts):
            list(reader.feed(piece))

    with pytest.raises(FrameError, match="limit"):
        read_all()
    assert len(reader._rest) < 200


@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=10))
def test_garbage_is_an_error_of_the_protocol_or_waits_for_more(garbage: bytes, cuts: list[int]) -> None:
    reader = FrameReader(limit_bytes=1000)
    try:
        for piece in cut(garbage, cuts):
            for body in reader.feed(piece):
                decode_frame(decoder, body)
    except FrameError:
        return


@given(st.lists(messages, max_size=4), st.data())
def test_a_damaged_body_is_never_another_message_of_the_wrong_type(sent: list[Message], data: st.DataObject) -> None:
    frame = bytearray(frame_of(*sent))
    place = data.draw(st.integers(4, len(frame) - 1))
    frame[place] ^= data.draw(st.integers(1, 255))
    try:
        [body] = FrameReader().feed(bytes(frame))
        arrived = decode_frame(decoder, body)
    except FrameError:
        return
    assert all(isinstance(message, MESSAGES) for message in arrived)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x91",
        b"\xdd\xff\xff\xff\xff",  # four billion messages announced
        b"\x91\x92\x07\xdb\xff\xff\xff\xff",  # a text of 4 GiB announced
        b"\x91\x93\x07\xa1\xff\xa0",  # not UTF-8
        b"\x91\x94\x07\xa0\xa0" + b"\x91" * 4000,  # nested deeper than the interpreter's stack
        b"\x91\x92\xcf" + b"\xff" * 8 + b"\xa0",  # a tag nobody has
        b"\x80",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x80\x04\x95cos\nsystem\n.",
    ],
)
def test_hostile_bodies_are_errors_of_the_protocol(body: bytes) -> None:
    with pytest.raises(FrameError):
        decode_frame(decoder, body)


def test_frames_of_one_read_are_not_copied() -> None:
    data = frame_of(Done(1)) + frame_of(Done(2))
    bodies = list(FrameReader().feed(data))
    assert all(body.obj is data for body in bodies)


def test_more_fields_than_this_version_knows_are_ignored_and_missing_ones_have_defaults() -> None:
    class NewerDone(Message, frozen=True, tag=1):
        rid: int = 0
        news: str = "x"

    class OlderFailed(Message, frozen=True, tag=2):
        rid: int = 0

    [body] = FrameReader().feed(frame_of(NewerDone(5, "more"), OlderFailed(6)))
    assert decoder.decode(body) == [Done(5), Failed(6)]


def test_a_message_or_frame_that_is_too_long_is_the_senders_to_see(monkeypatch: pytest.MonkeyPatch) -> None:
    class Long(bytes):
        def __len__(self) -> int:
            return MAX_FRAME_BYTES

    with pytest.raises(FrameError, match="larger than the limit"):
        check_size(Long())
    with pytest.raises(FrameError, match="larger than the limit"):
        join_frame([Long()])
    monkeypatch.setattr(frames, "MAX_MESSAGE_BYTES", 10)
    check_size(b"x" * 10)
    with pytest.raises(FrameError, match="11 bytes"):
        check_size(b"x" * 11)
