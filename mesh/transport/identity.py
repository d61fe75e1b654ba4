"""Who belongs to the mesh: one key, and a certificate for every name under it.

A mesh is whoever holds its 256-bit key. From the key every node derives, by HKDF-SHA256 (RFC 5869), the
*same* certificate authority, and issues a certificate to itself: no enrolment server, no first node that
must stay. TLS then proves both ends to one another, and the certificate's common name is the node's id.

A *client* (``edgemesh mqtt``) gets a certificate and not the key: it can connect, and cannot pose as a
node. All clients share one common name that no node can have, and none of them can act as a server.

    join code ── key ─┬─ HKDF "fingerprint" ── 16 hex digits, shown in mDNS
                      └─ HKDF "authority"   ── P-256 private key ── certificate authority
                                                                     └── certificate per name (CN)

What it promises: who lacks the key can neither join nor listen. What it does not: a member holds the
authority, so it *could* issue itself another member's name, and the only way to expel one is a new key.
Members are devices of one household or one site; see ``docs/adr/0004-identity-from-one-key.md``.

P-256 because small clients speak it (mbedTLS on an ESP32, old OpenSSL). Certificates are valid from 1970
to 9999 because a Raspberry Pi has no clock: it must reach the mesh before it knows what year it is.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mesh.errors import ConfigError, WrongKeyError
from mesh.facts import BrokerRef
from mesh.ids import MeshName, NodeId, is_id

__all__ = [
    "CLIENT_COMMON_NAME",
    "Identity",
    "MeshKey",
    "issue",
    "issue_client",
    "peer_common_name",
    "peer_name",
    "wrong_key",
]

SECRET_BYTES = 32

CLIENT_COMMON_NAME = "+client"
"""In every client's certificate. No node's id has a ``+``; and brokers grant a name that has one no
``pattern`` of the access list (it could be a wildcard), only what its own ``user`` section says."""

_PREFIX = "em1"
_CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"
_VALUE_OF = {letter: value for value, letter in enumerate(_CROCKFORD)} | {"o": 0, "i": 1, "l": 1}

# 256 bits of key and 24 of checksum are 8 groups of 35 bits: 7 letters, and an eighth that checks its own
# group. So a typo is found *where it is* (31 times of 32), and anywhere at all (2**24 - 1 of 2**24).
_GROUPS = 8
_GROUP_LETTERS = 8
_CHECKSUM_BYTES = 3

_SALT = b"edgemesh/1"
_P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_VALID_FROM = datetime(1970, 1, 1, tzinfo=UTC)
_VALID_UNTIL = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)  # RFC 5280 4.1.2.5: "no expiration date"


@dataclass(frozen=True)
class MeshKey:
    """The mesh's name and secret. Whoever holds it is a member; it never appears in a log or a topic."""

    name: MeshName
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if not is_id(self.name):
            raise ConfigError(
                f"{self.name!r} cannot name a mesh: use 1 to 63 of a-z, 0-9 and '-', not at the ends"
            )
        if len(self.secret) != SECRET_BYTES:
            raise ValueError(f"a mesh key has {SECRET_BYTES} bytes, got {len(self.secret)}")

    @classmethod
    def create(cls, name: str, entropy: bytes) -> MeshKey:
        """A new mesh. ``entropy`` is 32 bytes from the operating system's generator.

        Raises:
            ConfigError: ``name`` may not stand in a topic.
        """
        return cls(MeshName(name), entropy)

    @classmethod
    def from_code(cls, code: str) -> MeshKey:
        """Read a join code; case, blanks and the look-alikes of 0 and 1 do not matter.

        Raises:
            ConfigError: It says which kind of mistake and in which group, without repeating the code.
        """
        words = "".join(code.split()).lower().split("-")
        if words[0] != _PREFIX:
            if words[0][:2] == "em" and words[0][2:].isdigit():
                raise ConfigError("this join code is of a newer edgemesh: update edgemesh on this device")
            raise ConfigError(
                f"a join code begins with '{_PREFIX}-'; copy all of what `edgemesh token` shows on a member"
            )
        name, groups = "-".join(words[1:-_GROUPS]), words[-_GROUPS:]
        if not name or any(len(group) != _GROUP_LETTERS for group in groups):
            raise ConfigError(_what_is_missing(words[1:]))
        if not is_id(name):
            raise ConfigError("the mesh name in this join code has a letter that cannot be in a name")
        values = [_group_value(group, number) for number, group in enumerate(groups, start=1)]
        bits = 0
        for value in values:
            bits = bits << 35 | value
        blob = bits.to_bytes(SECRET_BYTES + _CHECKSUM_BYTES, "big")
        secret, checksum = blob[:SECRET_BYTES], blob[SECRET_BYTES:]
        if checksum != _checksum(name, secret):
            raise ConfigError(
                f"the join code does not fit its mesh name: check the spelling of {name!r}, then each group"
            )
        return cls(MeshName(name), secret)

    @cached_property
    def code(self) -> str:
        """The join code: ``em1-<mesh>-`` and 8 groups of 8 letters. As secret as the key."""
        bits = int.from_bytes(self.secret + _checksum(self.name, self.secret), "big")
        values = [bits >> 35 * (_GROUPS - number) & (1 << 35) - 1 for number in range(1, _GROUPS + 1)]
        groups = [_group_text(value, number) for number, value in enumerate(values, start=1)]
        return "-".join((_PREFIX, self.name, *groups))

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that tell meshes of one name apart and say nothing about the key."""
        return self._derive(b"fingerprint", 8).hex()

    def _derive(self, purpose: bytes, n_bytes: int) -> bytes:
        # The name is part of every derivation: one secret under two names is two meshes.
        kdf = HKDF(hashes.SHA256(), n_bytes, salt=_SALT, info=purpose + b"\0" + self.name.encode())
        return kdf.derive(self.secret)

    @cached_property
    def _authority(self) -> ec.EllipticCurvePrivateKey:
        # 48 bytes for a 32-byte order: the bias of the remainder is below 2**-128 (FIPS 186-5 A.2.1).
        wide = int.from_bytes(self._derive(b"authority", 48), "big")
        return ec.derive_private_key(wide % (_P256_ORDER - 1) + 1, ec.SECP256R1())


@dataclass(frozen=True)
class Identity:
    """One name's certificate files, readable by their owner only. Certificate and key share a file."""

    name: NodeId
    ca_path: Path
    cert_path: Path
    key_path: Path

    def server_context(self) -> ssl.SSLContext:
        """For a listener: shows this certificate and demands one of the same mesh."""
        return self._context(ssl.PROTOCOL_TLS_SERVER)

    def client_context(self) -> ssl.SSLContext:
        """For a connection: accepts any member; the caller checks ``peer_name`` if it wants a certain one."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def broker_context(self, broker: BrokerRef) -> ssl.SSLContext:
        """For a connection to a broker: the mesh's own, or a site's that has a certificate of the mesh.

        A site's broker that wants a user name has an authority of its own: it is trusted like a web site,
        by the system's authorities and with its host name checked.
        """
        if broker.host is None and broker.username is not None:
            return ssl.create_default_context()
        return self.client_context()

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        # Addresses change with every DHCP lease; what is checked is membership and the common name.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_verify_locations(self.ca_path)
        context.load_cert_chain(self.cert_path, self.key_path)
        return context


def issue(key: MeshKey, name: str, directory: Path) -> Identity:
    """This name's certificate under the mesh's authority, in ``directory``; made if it is not there yet.

    A certificate of another mesh, another name or another life of the file is replaced. Two processes may
    issue the same name at once: the pair is one file, renamed into place, so nobody sees half of it.

    Raises:
        ConfigError: ``name`` may not be a node id, or the directory cannot be written.
    """
    return _issue(key, name, name, directory)


def issue_client(key: MeshKey, name: str, directory: Path) -> Identity:
    """As ``issue``, for somebody who may use the mesh and be no part of it. ``name`` is for people.

    Raises:
        ConfigError: ``name`` may not be an id, or the directory cannot be written.
    """
    return _issue(key, name, CLIENT_COMMON_NAME, directory)


def _issue(key: MeshKey, name: str, common_name: str, directory: Path) -> Identity:
    if not is_id(name):
        raise ConfigError(f"{name!r} cannot be a name: use 1 to 63 of a-z, 0-9 and '-', not at the ends")
    ca_path, pair_path = directory / "ca.pem", directory / f"{name}.pem"
    authority = _authority_certificate(key)
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not _is_authority_of(ca_path, key):
            _write_private(ca_path, authority.public_bytes(serialization.Encoding.PEM))
        if _is_issued(pair_path, common_name, key):
            pair_path.chmod(0o600)  # a copy or a restored backup may have opened it up
        else:
            _write_private(pair_path, _issue_pem(key, authority, name, common_name))
    except OSError as error:
        raise ConfigError(
            f"cannot write certificates in {directory} ({error.strerror}): "
            "make it writable or choose another state directory"
        ) from error
    return Identity(NodeId(name), ca_path, pair_path, pair_path)


def peer_name(ssl_object: ssl.SSLObject | ssl.SSLSocket | None) -> NodeId | None:
    """The id in the verified peer's certificate; ``None`` without TLS, or if the name cannot be an id."""
    name = peer_common_name(ssl_object)
    return NodeId(name) if name is not None and is_id(name) else None


def peer_common_name(ssl_object: ssl.SSLObject | ssl.SSLSocket | None) -> str | None:
    """The name in the verified peer's certificate, a node's or ``CLIENT_COMMON_NAME``; else ``None``."""
    certificate = ssl_object.getpeercert() if ssl_object is not None else None
    if not certificate:
        return None
    subject: object = certificate.get("subject", ())
    for part in subject if isinstance(subject, tuple) else ():
        for label, text in part:
            if label == "commonName" and (is_id(text) or text == CLIENT_COMMON_NAME):
                return str(text)
    return None


def wrong_key(error: BaseException, peer: str) -> WrongKeyError | None:
    """``WrongKeyError`` if ``error`` says that ``peer`` holds another mesh's key, else ``None``.

    Looks through causes and wrappers (aiohttp, aiomqtt), because the TLS error is often inside another.
    """
    for inner in _chain(error):
        if isinstance(inner, ssl.SSLError) and (
            isinstance(inner, ssl.SSLCertVerificationError)
            or getattr(inner, "reason", None) in _REFUSAL_REASONS
        ):
            return WrongKeyError(
                f"{peer} belongs to another mesh: check the join code (edgemesh token on a member shows it)"
            )
    return None


# What a peer's alert is called when it is *our* certificate that was refused (OpenSSL's names).
_REFUSAL_REASONS = frozenset(
    {
        "CERTIFICATE_VERIFY_FAILED",
        "PEER_DID_NOT_RETURN_A_CERTIFICATE",
        "SSLV3_ALERT_BAD_CERTIFICATE",
        "SSLV3_ALERT_CERTIFICATE_UNKNOWN",
        "TLSV13_ALERT_CERTIFICATE_REQUIRED",
        "TLSV1_ALERT_DECRYPT_ERROR",
        "TLSV1_ALERT_UNKNOWN_CA",
    }
)
_CHAIN_LENGTH_MAX = 16  # real chains are three long; a chain that bites its tail must not hang us


def _chain(error: BaseException) -> Iterator[BaseException]:
    links: list[BaseException | None] = [error]
    for _ in range(_CHAIN_LENGTH_MAX):
        if not links:
            return
        link = links.pop(0)
        if link is None:
            continue
        yield link
        links += [link.__cause__, link.__context__]
        links += [inner for inner in link.args if isinstance(inner, BaseException)]


def _authority_certificate(key: MeshKey) -> x509.Certificate:
    """The root every node makes for itself: same subject, same key, same serial, so any one verifies all."""
    private = key._authority
    subject = _authority_subject(key)
    key_id = x509.SubjectKeyIdentifier.from_public_key(private.public_key())
    return (
        _builder(subject, subject, private.public_key(), serial=1)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(is_authority=True), critical=True)
        .add_extension(key_id, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(key_id), critical=False)
        .sign(private, hashes.SHA256())
    )


def _authority_subject(key: MeshKey) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, key.name),
            x509.NameAttribute(NameOID.COMMON_NAME, f"edgemesh {key.fingerprint}"),
        ]
    )


def _issue_pem(key: MeshKey, authority: x509.Certificate, name: str, common_name: str) -> bytes:
    """A fresh key pair and its certificate, as one PEM text."""
    private = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    uses = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if common_name != CLIENT_COMMON_NAME:
        uses.append(ExtendedKeyUsageOID.SERVER_AUTH)  # else a client could pose as the mesh's broker
    authority_id = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    # Tools that insist on a host name (mosquitto_pub, curl) can be pointed at this machine.
    local_names = x509.SubjectAlternativeName(
        [
            x509.DNSName(name),
            x509.DNSName("localhost"),
            x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
            x509.IPAddress(ipaddress.ip_address("::1")),
        ]
    )
    certificate = (
        _builder(subject, authority.subject, private.public_key(), serial=x509.random_serial_number())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(is_authority=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage(uses),
            critical=False,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(private.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority_id), critical=False
        )
        .add_extension(local_names, critical=False)
        .sign(key._authority, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM) + private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, serial: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(serial)
        .not_valid_before(_VALID_FROM)
        .not_valid_after(_VALID_UNTIL)
    )


def _key_usage(is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_authority,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _is_authority_of(path: Path, key: MeshKey) -> bool:
    """Whether the file holds this mesh's root. Signatures differ per signing, keys and names do not."""
    try:
        found = x509.load_pem_x509_certificate(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return False
    return found.subject == _authority_subject(key) and found.public_key() == key._authority.public_key()


def _is_issued(path: Path, common_name: str, key: MeshKey) -> bool:
    """Whether the file holds a certificate of this name under this authority, with its own private key."""
    try:
        pem = path.read_bytes()
        certificate = x509.load_pem_x509_certificate(pem)
        private = serialization.load_pem_private_key(pem, password=None)
        key._authority.public_key().verify(
            certificate.signature, certificate.tbs_certificate_bytes, ec.ECDSA(hashes.SHA256())
        )
    except (FileNotFoundError, ValueError, TypeError, InvalidSignature):
        return False  # absent, torn, or of another mesh: issue again
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return [part.value for part in names] == [
        common_name
    ] and certificate.public_key() == private.public_key()


def _write_private(path: Path, content: bytes) -> None:
    """Whole or not at all, and never readable by others, not even for an instant."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            scratch.unlink()


def _checksum(name: str, secret: bytes) -> bytes:
    digest = blake2b(secret, digest_size=_CHECKSUM_BYTES, person=b"em1 code", salt=b"")
    digest.update(name.encode())
    return digest.digest()


def _group_text(value: int, number: int) -> str:
    letters = "".join(_CROCKFORD[value >> shift & 31] for shift in range(30, -1, -5))
    return letters + _CROCKFORD[_group_check(value, number)]


def _group_value(group: str, number: int) -> int:
    for letter in group:
        if letter not in _VALUE_OF:
            raise ConfigError(
                f"group {number} of {_GROUPS} of the join code has a letter no code contains: look again"
            )
    value = 0
    for letter in group[:-1]:
        value = value << 5 | _VALUE_OF[letter]
    if _VALUE_OF[group[-1]] != _group_check(value, number):
        raise ConfigError(f"group {number} of {_GROUPS} of the join code is mistyped")
    return value


def _group_check(value: int, number: int) -> int:
    # The number is part of it, so that two groups that changed places are noticed as such.
    return blake2b(bytes((number,)) + value.to_bytes(5, "big"), digest_size=1).digest()[0] & 31


def _what_is_missing(words: list[str]) -> str:
    whole = f"a join code is '{_PREFIX}', the mesh name and {_GROUPS} groups of {_GROUP_LETTERS} letters"
    if len(words) < 1 + _GROUPS:
        return f"{whole}: {1 + _GROUPS - len(words)} of its pieces are missing"
    lengths = {number: len(word) for number, word in enumerate(words[-_GROUPS:], start=1)}
    number = next((number for number, length in lengths.items() if length != _GROUP_LETTERS), None)
    if number is None:
        return f"{whole}: the mesh name is missing"
    return f"{whole}: group {number} has {lengths[number]} letters"
