"""Certificates of a small private CA: made, signed, revoked and read. No file, no clock: the time is passed in.

Profiles follow what OpenSSL (the API) and GnuTLS (QEMU's `tls-creds-x509`) both accept: EC P-256 keys, BasicConstraints, KeyUsage,
ExtendedKeyUsage and SubjectAltName in each. The role of the owner is the organizational unit of the subject, so that QEMU's own
authorization can match it as well: `O=qmpd,OU=peer,CN=hosta`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final, TypeVar

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from qmpd.access import Role
from qmpd.errors import Problem, invalid
from qmpd.pki import ORGANIZATION

#: A CA outlives the hosts it certifies.
AUTHORITY_DAYS: Final = 3650
#: Hosts' clocks differ; a certificate is valid a little before it was made.
BACKDATED: Final = timedelta(minutes=10)
#: A revocation list is made anew with each revocation, and at every issue; in between it must stay valid.
LIST_DAYS: Final = 365
#: Longest name: what a Common Name holds (RFC 5280, ub-common-name).
NAME_LIMIT: Final = 64
_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_LABEL: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


class KeyPair(msgspec.Struct, frozen=True, kw_only=True):
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes


class CertificateFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a certificate says. `serial` and `fingerprint` (SHA-256 of the DER form) are lower-case hex.

    `signs`: its key may sign certificates; `proves`: it may show who its owner is; `server`, `client`: as which side of a connection.
    """

    name: str
    role: str
    organization: str
    serial: str
    fingerprint: str
    issuer: str
    not_before: datetime
    not_after: datetime
    hosts: tuple[str, ...]
    authority: bool
    signs: bool
    proves: bool
    server: bool
    client: bool


class Unreadable(ValueError):
    """These bytes are not a certificate, key, request or revocation list that this qmpd can read."""


def new_authority(name: str, now: datetime, *, days: int = AUTHORITY_DAYS) -> KeyPair:
    """A CA of its own, able to sign end certificates only. Raises Invalid for a name that cannot be one."""
    _check_name(name)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _subject(name, "ca")
    builder = _builder(subject, subject, key.public_key(), now, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs=True), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    return KeyPair(certificate=_pem(builder.sign(key, hashes.SHA256())), key=_key_pem(key))


def new_request(name: str) -> KeyPair:
    """A private key and a request to certify it (`certificate` holds the request). The signer decides about everything but the key."""
    _check_name(name)
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(_subject(name, "request")).sign(key, hashes.SHA256())
    return KeyPair(certificate=request.public_bytes(serialization.Encoding.PEM), key=_key_pem(key))


def issue(authority: KeyPair, request: bytes, *, name: str, role: Role, hosts: Sequence[str], now: datetime, days: int) -> bytes:
    """A certificate (PEM) for the key of `request`, signed by the authority. Nothing else that the request says is believed.

    `hosts` are the DNS names and addresses under which its owner is reached; its name is one of them where it can be.

    Raises:
        Invalid: the name or a host cannot be one, or the time is not positive.
        Unreadable: the request is damaged, or is not signed with the key it brings.
    """
    names = check_owner(name, role, hosts, days)
    public = requested_key(request)
    certificate, key = _loaded(authority)
    builder = _builder(_subject(name, role), certificate.subject, public, now, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs=False), critical=True)
    uses = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if role == "peer" else [])]
    builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    builder = builder.add_extension(issuer_key, critical=False)
    return _pem(builder.sign(key, hashes.SHA256()))


def check_owner(name: str, role: Role, hosts: Sequence[str], days: int) -> list[x509.GeneralName]:
    """The names of a certificate for this owner. Raises Invalid for one that cannot be issued."""
    _check_name(name)
    if days < 1:
        raise invalid([Problem(path="$.days", message=f"must be at least 1, not {days}")])
    names = _general_names(name, hosts)
    if not names and role == "peer":
        raise invalid([Problem(path="$.hosts", message=f"a peer is reached under a host name or address, and {name!r} is none")])
    return names


def requested_key(request: bytes) -> ec.EllipticCurvePublicKey:
    """The key that a request (PEM) is for, and is signed with. Raises Unreadable."""
    try:
        csr = x509.load_pem_x509_csr(request)
        public = csr.public_key()
        signed = csr.is_signature_valid
    except (ValueError, UnsupportedAlgorithm) as error:
        raise Unreadable("this is not a certificate request") from error
    if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1) or not signed:
        raise Unreadable("the request is not for an EC P-256 key, or not signed with it")
    return public


def revocation_list(authority: KeyPair, revoked: Sequence[tuple[str, datetime]], now: datetime, number: int) -> bytes:
    """The list (PEM) of certificates that are not valid any more: serial numbers in hex, and since when. `number` only ever grows."""
    certificate, key = _loaded(authority)
    builder = x509.CertificateRevocationListBuilder().issuer_name(certificate.subject)
    builder = builder.last_update(now - BACKDATED).next_update(now + timedelta(days=LIST_DAYS))
    builder = builder.add_extension(x509.CRLNumber(number), critical=False)
    builder = builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
    for serial, since in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(int(serial, 16)).revocation_date(since).build()
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def describe(certificate: bytes) -> CertificateFacts:
    """What a certificate (PEM) says. Raises Unreadable."""
    return _facts(_certificate(certificate))


def describe_der(certificate: bytes) -> CertificateFacts:
    """The same of the DER form, as TLS hands it over. Raises Unreadable."""
    try:
        return _facts(x509.load_der_x509_certificate(certificate))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise Unreadable("this is not a certificate") from error


def issued_by(certificate: bytes, authority: bytes) -> bool:
    """Whether the authority's key (both PEM) signed the certificate. Raises Unreadable."""
    try:
        _certificate(certificate).verify_directly_issued_by(_certificate(authority))
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def fits(key: bytes, certificate: bytes) -> bool:
    """Whether the private key is the certificate's (both PEM). Raises Unreadable."""
    return _private(key).public_key() == _certificate(certificate).public_key()


class ListFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a revocation list says: its number, from when until when it is valid, and what was revoked (serials in hex), with dates."""

    number: int
    since: datetime
    until: datetime
    revoked: dict[str, datetime]


def describe_list(listed: bytes, authority: bytes) -> ListFacts:
    """What a revocation list (PEM) says.

    Raises:
        Unreadable: it is damaged, or the authority did not sign it.
    """
    try:
        found = x509.load_pem_x509_crl(listed)
        numbers = [extension.value.crl_number for extension in found.extensions if isinstance(extension.value, x509.CRLNumber)]
    except (ValueError, UnsupportedAlgorithm) as error:
        raise Unreadable("this is not a revocation list") from error
    signer = _certificate(authority).public_key()
    if not isinstance(signer, ec.EllipticCurvePublicKey) or not found.is_signature_valid(signer):
        raise Unreadable("the revocation list is not signed by this authority")
    until = found.next_update_utc
    if until is None:
        raise Unreadable("the revocation list does not say how long it is valid")
    revoked = {f"{entry.serial_number:x}": entry.revocation_date_utc for entry in found}
    return ListFacts(number=max(numbers, default=0), since=found.last_update_utc, until=until, revoked=revoked)


def _check_name(name: str) -> None:
    if len(name) > NAME_LIMIT or _NAME.fullmatch(name) is None:
        raise invalid([Problem(path="$.name", message=f"must be letters, digits, '.', '_' and '-', at most {NAME_LIMIT}: {name[:80]!r}")])


def _general_names(name: str, hosts: Sequence[str]) -> list[x509.GeneralName]:
    found: list[x509.GeneralName] = []
    problems = []
    for index, host in enumerate(dict.fromkeys([name, *hosts])):
        try:
            found.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            if all(_LABEL.fullmatch(label) for label in host.split(".")) and len(host) <= 253:  # RFC 1035, 2.3.4
                found.append(x509.DNSName(host))
            elif index:
                problems.append(Problem(path=f"$.hosts[{index - 1}]", message=f"is neither a host name nor an address: {host[:80]!r}"))
    if problems:
        raise invalid(problems)
    return found


def _subject(name: str, role: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, ORGANIZATION),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )


def _builder(subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, now: datetime, days: int) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public)
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(now - BACKDATED).not_valid_after(now + timedelta(days=days))


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _facts(certificate: x509.Certificate) -> CertificateFacts:
    constraints = _extension(certificate, x509.BasicConstraints)
    usage = _extension(certificate, x509.KeyUsage)
    extended = _extension(certificate, x509.ExtendedKeyUsage)
    names = _extension(certificate, x509.SubjectAlternativeName)
    hosts = () if names is None else (*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress)))
    return CertificateFacts(
        name=_part(certificate.subject, NameOID.COMMON_NAME),
        role=_part(certificate.subject, NameOID.ORGANIZATIONAL_UNIT_NAME),
        organization=_part(certificate.subject, NameOID.ORGANIZATION_NAME),
        serial=f"{certificate.serial_number:x}",
        fingerprint=certificate.fingerprint(hashes.SHA256()).hex(),
        issuer=_part(certificate.issuer, NameOID.COMMON_NAME),
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        hosts=hosts,
        authority=constraints is not None and constraints.ca,
        signs=usage is not None and usage.key_cert_sign,
        proves=usage is not None and usage.digital_signature,
        server=extended is not None and ExtendedKeyUsageOID.SERVER_AUTH in extended,
        client=extended is not None and ExtendedKeyUsageOID.CLIENT_AUTH in extended,
    )


T = TypeVar("T", bound=x509.ExtensionType)


def _extension(certificate: x509.Certificate, kind: type[T]) -> T | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None
    except ValueError as error:
        raise Unreadable("an extension of the certificate cannot be read") from error


def _part(name: x509.Name, oid: x509.ObjectIdentifier) -> str:
    found = name.get_attributes_for_oid(oid)
    return str(found[0].value) if found else ""


def _certificate(pem: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise Unreadable("this is not a certificate") from error


def _private(pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise Unreadable("this is not a private key without a password") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Unreadable("this is not an EC key")
    return key


def _loaded(authority: KeyPair) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    return _certificate(authority.certificate), _private(authority.key)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
