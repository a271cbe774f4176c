"""Certificates that sign Content Credentials, made for one test, with an issuer of their own."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

ALLOWED_USES = (ExtendedKeyUsageOID.EMAIL_PROTECTION,)
"""Uses that the standard accepts for a signer: https://spec.c2pa.org, "Certificate Profile"."""


@dataclass(frozen=True)
class SigningFiles:
    """PEM files, as an operator has them."""

    certificate_chain: Path
    private_key: Path
    issuer: Path

    def environment(self) -> dict[str, str]:
        """The settings that make a worker sign with them."""
        return {
            "AFTERIMAGE_CONTENT_CREDENTIALS__ENABLED": "true",
            "AFTERIMAGE_CONTENT_CREDENTIALS__CERTIFICATE_CHAIN": str(self.certificate_chain),
            "AFTERIMAGE_CONTENT_CREDENTIALS__PRIVATE_KEY": str(self.private_key),
        }


def make_signing_files(
    folder: Path,
    *,
    uses: tuple[x509.ObjectIdentifier, ...] = ALLOWED_USES,
    days: tuple[float, float] = (-1, 30),
) -> SigningFiles:
    """Write a certificate, its key and its issuer. days: start and end of its validity, from now."""
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC)
    issuer_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = (
        x509.CertificateBuilder()
        .subject_name(_name("Test issuer"))
        .issuer_name(_name("Test issuer"))
        .public_key(issuer_key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=400))
        .not_valid_after(now + timedelta(days=400))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(issuer_key.public_key()), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )
    signer = (
        x509.CertificateBuilder()
        .subject_name(_name("Test signer"))
        .issuer_name(_name("Test issuer"))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=days[0]))
        .not_valid_after(now + timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if uses:
        signer = signer.add_extension(x509.ExtendedKeyUsage(uses), critical=True)
    pem, no_password = serialization.Encoding.PEM, serialization.NoEncryption()
    certificate, issuer_pem = signer.sign(issuer_key, hashes.SHA256()).public_bytes(pem), issuer.public_bytes(pem)
    files = SigningFiles(folder / "chain.pem", folder / "key.pem", folder / "issuer.pem")
    files.certificate_chain.write_bytes(certificate + issuer_pem)
    files.private_key.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, no_password))
    files.issuer.write_bytes(issuer_pem)
    return files


def _name(common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Test organisation"),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
