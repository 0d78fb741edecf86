"""Webhooks are sent to the address that was checked, and nowhere else."""

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from events.log import EventLog
from tests.trainers.webhooks.conftest import Play
from tests.trainers.webhooks.support import delivering, end_job, endpoint, settings_in, until_settled
from tests.webhook_receiver import Receiver
from trainers.errors import UserError
from trainers.webhooks.deliverer import Pace


def test_a_redirect_is_not_followed(play: Play, tmp_path: Path) -> None:
    async def scenario(log: EventLog) -> None:
        with Receiver() as other, Receiver(lambda _: 307, headers={"Location": other.url}) as receiver:
            pace = Pace(first_pause_s=0.01, attempts=2)
            async with delivering(log, settings_in(tmp_path), pace) as webhooks:
                created = await endpoint(webhooks, receiver.url)
                await end_job(log, "ftjob-1")
                (failed,) = await until_settled(webhooks, created.endpoint.id, "failed")
                assert failed.last_error == "answered 307"
        assert other.got == []

    play(scenario)


def test_a_proxy_of_the_environment_is_not_used(play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(log: EventLog) -> None:
        with Receiver() as proxy, Receiver() as receiver:
            for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
                monkeypatch.setenv(name, proxy.url)
            for name in ("NO_PROXY", "no_proxy"):
                monkeypatch.delenv(name, raising=False)
            async with delivering(log, settings_in(tmp_path)) as webhooks:
                created = await endpoint(webhooks, receiver.url)
                await end_job(log, "ftjob-1")
                await until_settled(webhooks, created.endpoint.id, "delivered")
        assert proxy.got == []

    play(scenario)


def test_a_name_that_changes_to_a_private_address_gets_nothing(play: Play, tmp_path: Path) -> None:
    """DNS rebinding: public when the endpoint was created, loopback when it is to be told."""
    answers = [["93.184.216.34"]]

    async def resolve(host: str, _port: int) -> list[str]:
        assert host == "rebinding.example"
        return answers.pop() if answers else ["127.0.0.1"]

    async def scenario(log: EventLog) -> None:
        with Receiver() as receiver:
            pace = Pace(first_pause_s=0.01, attempts=2)
            async with delivering(log, settings_in(tmp_path, networks=""), pace, resolve) as webhooks:
                created = await endpoint(webhooks, f"http://rebinding.example:{receiver.port}/hook")
                await end_job(log, "ftjob-1")
                (failed,) = await until_settled(webhooks, created.endpoint.id, "failed")
                assert failed.last_error is not None
                assert failed.last_error.startswith("nothing was sent: its host resolves to an address that is not")
                with pytest.raises(UserError, match="nothing was sent"):
                    await webhooks.test(created.endpoint.id, "fine_tuning.job.failed")
        assert receiver.connections == 0

    play(scenario)


def test_the_address_that_was_checked_is_connected_to_and_asked_for_the_name(play: Play, tmp_path: Path) -> None:
    """Only this test knows that name: whoever resolved it again would not find it. The first address is dead."""
    asked: list[str] = []

    async def resolve(host: str, _port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.2", "127.0.0.1"]

    async def scenario(log: EventLog) -> None:
        with Receiver() as receiver:
            async with delivering(log, settings_in(tmp_path), resolve=resolve) as webhooks:
                created = await endpoint(webhooks, f"http://Receiver.Example:{receiver.port}/hook")
                await end_job(log, "ftjob-1")
                await until_settled(webhooks, created.endpoint.id, "delivered")
        assert set(asked) == {"receiver.example"}
        assert receiver.got[0].headers["host"] == f"receiver.example:{receiver.port}"

    play(scenario)


@pytest.mark.parametrize("name", ["receiver.example", "other.example"])
def test_the_certificate_must_be_for_the_name_though_an_address_is_connected_to(
    play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    certificate, key = certificate_for("receiver.example", tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def resolve(_host: str, _port: int) -> list[str]:
        return ["127.0.0.1"]

    async def scenario(log: EventLog) -> None:
        with Receiver(tls=context) as receiver:
            pace = Pace(first_pause_s=0.01, attempts=2)
            async with delivering(log, settings_in(tmp_path), pace, resolve) as webhooks:
                created = await endpoint(webhooks, f"https://{name}:{receiver.port}/hook")
                await end_job(log, "ftjob-1")
                if name == "receiver.example":
                    await until_settled(webhooks, created.endpoint.id, "delivered")
                else:
                    (failed,) = await until_settled(webhooks, created.endpoint.id, "failed")
                    assert failed.last_error is not None
                    assert "certificate" in failed.last_error
        assert len(receiver.got) == (name == "receiver.example")

    play(scenario)


def certificate_for(name: str, directory: Path) -> tuple[Path, Path]:
    """A certificate and its key, in files. It signs itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (directory / "certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (directory / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return directory / "certificate.pem", directory / "key.pem"
