"""The handshake: it opens only between two sides that know the token, and tells nothing to anybody else."""

from __future__ import annotations

import hmac

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.exceptions import AuthenticationError, ShoalError
from shoal.rpc import auth
from shoal.rpc.auth import ClientHandshake, ServerHandshake, handshake_decoder
from shoal.rpc.frames import FrameReader, encode_message, join_frame
from shoal.rpc.messages import (
    MAX_HANDSHAKE_BYTES,
    PROTOCOL_VERSION,
    Challenge,
    Hello,
    Message,
    Proof,
    Refused,
    Welcome,
)

TOKEN = b"the-token-of-this-cluster"


def one(data: bytes) -> Message:
    """The only message in one frame."""
    [body] = FrameReader(MAX_HANDSHAKE_BYTES).feed(data)
    [message] = handshake_decoder.decode(body)
    assert isinstance(message, Message)
    return message


def server(token: bytes = TOKEN, refused: Refused | None = None) -> ServerHandshake:
    return ServerHandshake(token, "the node", lambda _: refused)


def client(token: bytes = TOKEN, target: str = "agent") -> ClientHandshake:
    return ClientHandshake(token, target, "somebody")


def test_both_sides_open_when_both_know_the_token() -> None:
    ours, theirs = client(target="worker:1f"), server()
    proof = ours.receive(one(theirs.receive(one(ours.start()))))
    assert (ours.proved, ours.done, theirs.done) == (True, False, False)
    assert ours.receive(one(theirs.receive(one(proof)))) == b""
    assert ours.done
    assert theirs.done
    assert ours.peer_name == "the node"
    assert theirs.hello is not None
    assert (theirs.hello.target, theirs.hello.name) == ("worker:1f", "somebody")


def test_a_client_says_nothing_to_a_server_without_the_token() -> None:
    ours, theirs = client(), server(b"another token entirely")
    with pytest.raises(AuthenticationError, match="SHOAL_TOKEN"):
        ours.receive(one(theirs.receive(one(ours.start()))))
    assert not ours.proved


def test_a_server_refuses_a_client_without_the_token() -> None:
    theirs, hello = server(), Hello(PROTOCOL_VERSION, "1", b"n" * 16, "agent")
    challenge = one(theirs.receive(hello))
    assert isinstance(challenge, Challenge)
    forged = Proof(auth._proof(b"a guess", b"client", hello, challenge.nonce))
    answer = one(theirs.receive(forged))
    assert isinstance(answer, Refused)
    assert (answer.kind, theirs.done) == ("token", False)
    assert theirs.refused is not None


def test_the_servers_own_proof_is_not_the_clients() -> None:
    """Reflection: who has only what the server said cannot answer it."""
    theirs = server()
    challenge = one(theirs.receive(Hello(PROTOCOL_VERSION, "1", b"n" * 16, "agent")))
    assert isinstance(challenge, Challenge)
    assert isinstance(one(theirs.receive(Proof(challenge.proof))), Refused)


def test_a_server_cannot_be_made_to_answer_its_own_challenge() -> None:
    """Two sessions interleaved: the nonce of one, sent as the Hello of another, gives no proof for the first."""
    first, second = server(), server()
    hello = Hello(PROTOCOL_VERSION, "1", b"n" * 16, "agent")
    challenge = one(first.receive(hello))
    assert isinstance(challenge, Challenge)
    oracle = one(second.receive(Hello(PROTOCOL_VERSION, "1", challenge.nonce, "agent")))
    assert isinstance(oracle, Challenge)
    assert isinstance(one(first.receive(Proof(oracle.proof))), Refused)


def test_a_recorded_handshake_opens_no_second_connection() -> None:
    ours, first, second = client(), server(), server()
    start = one(ours.start())
    proof = one(ours.receive(one(first.receive(start))))
    assert isinstance(one(first.receive(proof)), Welcome)
    second.receive(start)
    assert isinstance(one(second.receive(proof)), Refused)


def test_a_recorded_challenge_convinces_no_second_client() -> None:
    first, second, theirs = client(), client(), server()
    challenge = one(theirs.receive(one(first.start())))
    second.start()
    with pytest.raises(AuthenticationError):
        second.receive(challenge)


@pytest.mark.parametrize("field", ["target", "name", "version", "nonce"])
def test_a_hello_that_was_changed_on_the_way_opens_nothing(field: str) -> None:
    ours, theirs = client(), server()
    hello = one(ours.start())
    changed = msgspec.structs.replace(hello, **{field: b"m" * 16 if field == "nonce" else "control"})
    with pytest.raises(AuthenticationError):
        ours.receive(one(theirs.receive(changed)))


def test_facts_cannot_be_moved_from_one_field_to_the_next() -> None:
    proofs = {
        auth._proof(TOKEN, b"client", Hello(1, "v", b"n", target, name), b"s")
        for target, name in (("ab", ""), ("a", "b"), ("", "ab"))
    }
    assert len(proofs) == 3


def hello() -> Hello:
    return Hello(PROTOCOL_VERSION, "1", b"n" * 16, "agent")


WRONG_FIRST = [Proof(b"x"), Challenge(1, "1", b"", b""), Welcome(), Refused("token", "no")]


@pytest.mark.parametrize("message", WRONG_FIRST, ids=lambda message: type(message).__name__)
def test_a_server_takes_nothing_before_the_hello(message: Message) -> None:
    theirs = server()
    assert isinstance(one(theirs.receive(message)), Refused)
    assert theirs.refused is not None
    assert not theirs.done


@pytest.mark.parametrize("message", [hello(), *WRONG_FIRST[1:]], ids=lambda message: type(message).__name__)
def test_a_server_takes_nothing_but_the_proof_after_it(message: Message) -> None:
    theirs = server()
    theirs.receive(hello())
    assert isinstance(one(theirs.receive(message)), Refused)
    assert not theirs.done


@pytest.mark.parametrize("message", [hello(), Proof(b"x")], ids=lambda message: type(message).__name__)
def test_a_client_takes_nothing_that_a_server_does_not_say(message: Message) -> None:
    with pytest.raises(ShoalError, match="answered a handshake"):
        client().receive(message)


def test_a_client_believes_no_welcome_without_a_challenge() -> None:
    ours = client()
    with pytest.raises(ShoalError, match="handshake"):
        ours.receive(Welcome("trust me"))
    assert not ours.done


def test_what_a_server_does_not_have_is_told_to_the_authentic_only() -> None:
    no = Refused("no_target", "that worker is not on this node any more")
    ours, theirs = client(), server(refused=no)
    challenge = one(theirs.receive(one(ours.start())))
    with pytest.raises(ShoalError, match="not on this node"):
        ours.receive(one(theirs.receive(one(ours.receive(challenge)))))
    stranger, theirs = client(b"a guess of the token"), server(refused=no)
    theirs.receive(one(stranger.start()))
    answer = one(theirs.receive(Proof(b"guess")))
    assert isinstance(answer, Refused)
    assert answer.kind == "token"


def test_versions_may_differ_by_one() -> None:
    for protocol, admitted in ((PROTOCOL_VERSION + 1, True), (PROTOCOL_VERSION + 2, False)):
        answer = one(server().receive(Hello(protocol, "9.9", b"n" * 16, "agent")))
        assert isinstance(answer, Challenge) == admitted
    assert isinstance(answer, Refused)
    assert answer.kind == "version"
    assert "9.9" in answer.text
    with pytest.raises(ShoalError, match=r"cannot talk to this cluster.*shoal 9\.9"):
        client().receive(Challenge(PROTOCOL_VERSION + 2, "9.9", b"", b""))


def test_a_neighbouring_version_may_know_another_field() -> None:
    class NewerHello(Message, frozen=True, tag=3):
        protocol: int
        version: str
        nonce: bytes
        target: str
        name: str
        news: str

    theirs = server()
    sent = NewerHello(PROTOCOL_VERSION + 1, "2.0", b"n" * 16, "agent", "newer", "something")
    challenge = one(theirs.receive(one(join_frame([encode_message(sent)]))))
    assert isinstance(challenge, Challenge)
    known = Hello(sent.protocol, sent.version, sent.nonce, sent.target, sent.name)
    assert hmac.compare_digest(challenge.proof, auth._proof(TOKEN, b"server", known, challenge.nonce))
    assert isinstance(one(theirs.receive(Proof(auth._proof(TOKEN, b"client", known, challenge.nonce)))), Welcome)


@given(
    st.lists(
        st.one_of(
            st.builds(Hello, st.integers(0, 3), st.text(max_size=5), st.binary(max_size=20), st.text(max_size=5)),
            st.builds(Proof, st.binary(max_size=40)),
            st.builds(
                Challenge, st.integers(0, 3), st.text(max_size=5), st.binary(max_size=20), st.binary(max_size=40)
            ),
            st.builds(Welcome, st.text(max_size=5)),
            st.builds(Refused, st.text(max_size=5), st.text(max_size=5)),
        ),
        max_size=6,
    )
)
def test_no_conversation_of_strangers_opens_either_side(said: list[Message]) -> None:
    theirs = server()
    for message in said:
        if theirs.refused is not None:
            break
        answer = one(theirs.receive(message))
        assert isinstance(answer, Challenge | Refused)
    assert not theirs.done
    ours = client()
    for message in said:
        try:
            assert ours.receive(message) == b""
        except ShoalError:
            break
    assert not ours.proved
    assert not ours.done


def test_nonces_are_fresh() -> None:
    hellos = [one(client().start()) for _ in range(50)]
    assert len({message.nonce for message in hellos if isinstance(message, Hello)}) == 50
    challenges = [one(server().receive(hello())) for _ in range(50)]
    assert len({message.nonce for message in challenges if isinstance(message, Challenge)}) == 50
