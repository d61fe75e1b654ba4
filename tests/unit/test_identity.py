"""Join codes say what is wrong with them; certificates of one key trust each other and no others."""

from __future__ import annotations

import os
import ssl
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.errors import ConfigError, WrongKeyError
from mesh.ids import MeshName
from mesh.transport.identity import Identity, MeshKey, issue, peer_name, wrong_key

KEY = MeshKey(MeshName("home"), bytes(range(32)))
OTHER = MeshKey(MeshName("home"), bytes(range(1, 33)))
NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True)


def shake_hands(client: Identity, server: Identity) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """A whole TLS handshake in memory; raises what the side that refuses raises."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.client_context().wrap_bio(to_client, to_server),
        server.server_context().wrap_bio(to_server, to_client, server_side=True),
    )
    done = [False, False]
    for _ in range(10):
        for side, end in enumerate(ends):
            if not done[side]:
                try:
                    end.do_handshake()
                    done[side] = True
                except ssl.SSLWantReadError:
                    pass
        if all(done):
            return ends
    raise AssertionError("no handshake in ten rounds")


# -- the join code


@settings(max_examples=100, deadline=None)
@given(NAMES, st.binary(min_size=32, max_size=32))
def test_a_join_code_carries_name_and_key(name: str, secret: bytes) -> None:
    key = MeshKey.create(name, secret)
    assert MeshKey.from_code(key.code) == key


def test_a_join_code_never_changes_its_form() -> None:
    """People keep codes on paper: this one must be readable for ever."""
    code = "em1-home-000g40r7-40m30e23-09185gr7-38e1w814-24gk2gaa-hc5rr34j-d1p70x33-rfg28cyt"
    assert KEY.code == code
    assert MeshKey.from_code(code) == KEY


def test_case_blanks_and_lookalikes_do_not_matter() -> None:
    prefix, groups = "em1-home-", KEY.code.removeprefix("em1-home-")
    assert MeshKey.from_code(f"  {KEY.code.upper()}\n") == KEY
    assert MeshKey.from_code(KEY.code[:30] + "\n   " + KEY.code[30:]) == KEY
    assert MeshKey.from_code(prefix + groups.replace("0", "O").replace("1", "l")) == KEY


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda code: code.removeprefix("em1-"), "begins with 'em1-'"),
        (lambda code: "", "begins with 'em1-'"),
        (lambda code: "em2" + code[3:], "newer edgemesh"),
        (lambda code: code.rsplit("-", 1)[0], "1 of its pieces are missing"),
        (lambda code: code[:-1], "group 8 has 7 letters"),
        (lambda code: code.replace("em1-home-", "em1-home-a"), "group 1 has 9 letters"),
        (lambda code: code.replace("-home-", "-"), "1 of its pieces are missing"),
        (lambda code: code.replace("-home-", "--"), "mesh name is missing"),
        (lambda code: code.replace("home", "hmoe"), "spelling of 'hmoe'"),
        (lambda code: code.replace("home", "hö"), "a letter that cannot be in a name"),
        (lambda code: code[:-8] + "u" + code[-7:], "group 8 of 8 of the join code has a letter no code"),
    ],
)
def test_a_spoilt_code_says_which_kind_of_mistake(spoil, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=says):
        MeshKey.from_code(spoil(KEY.code))


def test_a_typo_is_always_noticed_and_almost_always_located() -> None:
    located = tried = 0
    start = len("em1-home-")
    for place in range(start, len(KEY.code)):
        if KEY.code[place] == "-":
            continue
        for letter in "27qz":
            if letter == KEY.code[place]:
                continue
            tried += 1
            with pytest.raises(ConfigError) as caught:
                MeshKey.from_code(KEY.code[:place] + letter + KEY.code[place + 1 :])
            located += f"group {(place - start) // 9 + 1} of 8" in str(caught.value)
    assert located / tried > 0.9, f"{located} of {tried}"


def test_two_groups_that_changed_places_are_noticed() -> None:
    *head, seventh, eighth = KEY.code.split("-")
    with pytest.raises(ConfigError, match="group 7 of 8"):
        MeshKey.from_code("-".join([*head, eighth, seventh]))


def test_a_refused_code_is_not_repeated_in_the_message() -> None:
    spoilt = KEY.code[:-2] + ("zz" if not KEY.code.endswith("zz") else "yy")
    with pytest.raises(ConfigError) as caught:
        MeshKey.from_code(spoilt)
    assert not any(group in str(caught.value) for group in spoilt.split("-")[2:])


def test_a_key_does_not_show_itself() -> None:
    assert repr(KEY) == "MeshKey(name='home')"


@pytest.mark.parametrize("name", ["", "Home", "my/mesh", "-a", "a" * 64, "ho+me"])
def test_a_mesh_has_a_name_that_fits_a_topic(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a mesh"):
        MeshKey.create(name, bytes(32))


def test_fingerprints_tell_meshes_apart_and_stay() -> None:
    assert KEY.fingerprint == MeshKey.from_code(KEY.code).fingerprint == "52c5b639dd537cad"
    assert OTHER.fingerprint != KEY.fingerprint
    assert MeshKey(MeshName("shed"), KEY.secret).fingerprint != KEY.fingerprint
    assert KEY.secret.hex() not in KEY.fingerprint


# -- certificates


def test_nodes_that_never_met_trust_each_other(tmp_path: Path) -> None:
    client, server = issue(KEY, "pi-1", tmp_path / "a"), issue(KEY, "pi-2", tmp_path / "b")
    at_client, at_server = shake_hands(client, server)
    assert peer_name(at_client) == "pi-2"
    assert peer_name(at_server) == "pi-1"


def test_a_stranger_is_refused_and_told_why(tmp_path: Path) -> None:
    ours, theirs = issue(KEY, "pi-1", tmp_path / "a"), issue(OTHER, "pi-1", tmp_path / "b")
    with pytest.raises(ssl.SSLError) as caught:
        shake_hands(ours, theirs)
    error = wrong_key(caught.value, "broker 10.0.0.2:8883")
    assert isinstance(error, WrongKeyError)
    assert "broker 10.0.0.2:8883 belongs to another mesh" in str(error)
    assert "edgemesh token" in str(error)


def test_a_server_refuses_a_client_without_certificate(tmp_path: Path) -> None:
    server = issue(KEY, "pi-2", tmp_path)
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    stranger.check_hostname = False
    stranger.verify_mode = ssl.CERT_NONE
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = stranger.wrap_bio(to_client, to_server)
    listener = server.server_context().wrap_bio(to_server, to_client, server_side=True)
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE") as caught:
        for _ in range(10):
            for end in (client, listener):
                with suppress(ssl.SSLWantReadError):
                    end.do_handshake()
    assert wrong_key(caught.value, "somebody") is not None


def test_the_wrong_key_is_found_inside_other_errors() -> None:
    tls = ssl.SSLCertVerificationError(1, "certificate verify failed")
    outer = OSError("cannot connect")
    outer.__cause__ = RuntimeError(tls)
    assert wrong_key(outer, "x") is not None
    tls.__cause__ = outer  # a chain that bites its tail ends too
    assert wrong_key(outer, "x") is not None
    assert wrong_key(ConnectionRefusedError(111, "refused"), "x") is None
    assert wrong_key(ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number"), "x") is None


def test_issuing_again_keeps_the_certificate(tmp_path: Path) -> None:
    first = issue(KEY, "pi-1", tmp_path)
    before = first.cert_path.read_bytes(), first.ca_path.read_bytes()
    second = issue(KEY, "pi-1", tmp_path)
    assert second == first
    assert (second.cert_path.read_bytes(), second.ca_path.read_bytes()) == before


@pytest.mark.parametrize("spoil", [b"", b"not pem", None])
def test_a_torn_or_foreign_certificate_is_replaced(tmp_path: Path, spoil: bytes | None) -> None:
    old = issue(OTHER, "pi-1", tmp_path)
    if spoil is not None:
        old.cert_path.write_bytes(spoil)
        old.ca_path.write_bytes(spoil)
    new = issue(KEY, "pi-1", tmp_path)
    shake_hands(new, issue(KEY, "pi-2", tmp_path / "b"))


def test_a_certificate_without_its_private_key_is_replaced(tmp_path: Path) -> None:
    path = issue(KEY, "pi-1", tmp_path).cert_path
    stranger = issue(KEY, "pi-2", tmp_path).cert_path
    certificate = path.read_bytes().split(b"-----BEGIN PRIVATE")[0]
    path.write_bytes(
        certificate + b"-----BEGIN PRIVATE" + stranger.read_bytes().split(b"-----BEGIN PRIVATE")[1]
    )
    shake_hands(issue(KEY, "pi-1", tmp_path), issue(KEY, "pi-3", tmp_path))


def test_private_files_are_private_and_no_scraps_remain(tmp_path: Path) -> None:
    identity = issue(KEY, "pi-1", tmp_path)
    identity.cert_path.chmod(0o644)
    identity = issue(KEY, "pi-1", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"ca.pem", "pi-1.pem"}
    assert identity.key_path.stat().st_mode & 0o777 == 0o600
    assert identity.ca_path.stat().st_mode & 0o777 == 0o600


def test_a_device_without_a_clock_may_join(tmp_path: Path) -> None:
    """OpenSSL judges the certificate as of a day in 1970 and a day in 2500."""
    identity = issue(KEY, "pi-1", tmp_path)
    command = ["openssl", "verify", "-x509_strict", "-purpose", "sslclient"]
    for moment in ("86400", str(530 * 365 * 86400)):
        verdict = subprocess.run(
            [*command, "-attime", moment, "-CAfile", str(identity.ca_path), str(identity.cert_path)],
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert verdict.returncode == 0, verdict.stderr


def test_the_common_name_is_the_node_id(tmp_path: Path) -> None:
    certificate = x509.load_pem_x509_certificate(issue(KEY, "pi-1", tmp_path).cert_path.read_bytes())
    assert certificate.subject.rfc4514_string() == "CN=pi-1"
    assert KEY.fingerprint in certificate.issuer.rfc4514_string()


def test_a_longest_name_still_gets_a_certificate(tmp_path: Path) -> None:
    key = MeshKey.create("m" * 63, os.urandom(32))
    shake_hands(issue(key, "a" * 63, tmp_path), issue(key, "b" * 63, tmp_path))


@pytest.mark.parametrize("name", ["", "a/b", "../pi", "Pi", "a" * 64])
def test_a_name_that_is_no_id_gets_no_certificate(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a name"):
        issue(KEY, name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="choose another state directory"):
        issue(KEY, "pi-1", tmp_path / "file")


def test_no_tls_is_no_name() -> None:
    assert peer_name(None) is None
