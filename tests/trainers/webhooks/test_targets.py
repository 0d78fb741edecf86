"""Which URLs and addresses webhooks may be sent to."""

import asyncio
from ipaddress import ip_network

import pytest

from trainers.settings import Settings
from trainers.webhooks.targets import Network, Resolver, TargetRefused, addresses_of, parse


def addresses(url: str, *allowed: str) -> list[str]:
    networks: list[Network] = [ip_network(network) for network in allowed]

    async def resolved() -> list[str]:
        resolver = Resolver()
        try:
            return await addresses_of(parse(url), networks, resolver)
        finally:
            resolver.close()

    return asyncio.run(resolved())


@pytest.mark.parametrize("host", ["93.184.216.34", "8.8.8.8", "[2606:4700::1111]", "[::ffff:8.8.8.8]"])
def test_a_public_address_is_fine(host: str) -> None:
    assert len(addresses(f"https://{host}/hook?token=x")) == 1


NOT_PUBLIC = """
127.0.0.1 127.8.9.1 localhost LOCALHOST 2130706433 0x7f000001 017700000001 127.1 0 0.0.0.0
10.0.0.1 172.16.0.1 172.31.255.255 192.168.1.1 100.64.0.1 169.254.169.254 2852039166
224.0.0.1 240.0.0.1 255.255.255.255 198.18.0.1 192.0.2.1
[::1] [::] [::ffff:127.0.0.1] [::ffff:7f00:1] [::ffff:a9fe:a9fe] [::127.0.0.1] [fe80::1] [fc00::1] [fd00:ec2::254]
[fec0::1] [ff02::1] [64:ff9b::7f00:1] [2002:7f00:1::]
"""


@pytest.mark.parametrize("host", NOT_PUBLIC.split())
def test_an_address_that_is_not_public_is_refused_however_it_is_written(host: str) -> None:
    with pytest.raises(TargetRefused, match="not public") as refused:
        addresses(f"http://{host}/")
    assert host not in str(refused.value)


def test_a_host_is_refused_if_any_of_its_addresses_is() -> None:
    async def one_of_each(_host: str, _port: int) -> list[str]:
        return ["8.8.8.8", "10.0.0.1"]

    with pytest.raises(TargetRefused, match="not public"):
        asyncio.run(addresses_of(parse("http://example.com/"), [], one_of_each))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]"])
def test_an_allowed_network_is_fine_and_no_other(host: str) -> None:
    assert addresses(f"http://{host}/", "127.0.0.0/8", "::1/128")
    with pytest.raises(TargetRefused):
        addresses(f"http://{host}/", "10.0.0.0/8")


@pytest.mark.parametrize("host", ["no-such.invalid", "a..b", "..", "xn--", "x" * 64 + ".example", "[fe80::1%25lo]"])
def test_a_host_that_has_no_address_is_refused(host: str) -> None:
    with pytest.raises(TargetRefused, match=r"can't be resolved|not public"):
        addresses(f"http://{host}/")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "http or https"),
        ("hook", "http or https"),
        ("ftp://8.8.8.8/", "http or https"),
        ("file:///etc/passwd", "http or https"),
        ("//8.8.8.8/", "http or https"),
        ("http://", "with a host"),
        ("http:///hook", "with a host"),
        ("http://me:secret@8.8.8.8/", "credentials"),
        ("http://me@8.8.8.8/", "credentials"),
        ("http://8.8.8.8:0/", "port"),
        ("http://8.8.8.8:65536/", "port"),
        ("http://8.8.8.8:http/", "not a URL"),
        ("http://8.8.8.8\n/", "not a URL"),
        ("http://[::1/", "not a URL"),
        ("http://0177.0.0.1/", "not a URL"),
    ],
)
def test_an_invalid_url_is_refused_with_the_reason(url: str, says: str) -> None:
    with pytest.raises(TargetRefused, match=says) as refused:
        parse(url)
    assert "secret" not in str(refused.value)


def test_the_setting_takes_networks_and_addresses() -> None:
    settings = Settings(webhook_networks="10.1.0.0/16, ::1")
    assert settings.allowed_webhook_networks == (ip_network("10.1.0.0/16"), ip_network("::1"))
    assert settings.as_env()["TUNEWRIGHT_WEBHOOK_NETWORKS"] == "10.1.0.0/16, ::1"
    assert Settings().allowed_webhook_networks == ()


@pytest.mark.parametrize("networks", ["10.0.0.1/8", "example.com", "10.0.0.0/8:127.0.0.1"])
def test_a_setting_that_names_no_network_is_refused(networks: str) -> None:
    with pytest.raises(ValueError, match="webhook_networks"):
        Settings(webhook_networks=networks)
