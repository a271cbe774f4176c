"""Which webhook addresses the service may call."""

import pytest

from shared import ssrf
from shared.errors import ForbiddenTargetError
from shared.settings import WebhookSettings

DEFAULT = WebhookSettings()


@pytest.mark.parametrize(
    "url",
    [
        "http://93.184.216.34/",
        "ftp://93.184.216.34/",
        "https:///path",
        "https://user@93.184.216.34/",
        "https://user:secret@93.184.216.34/",
        "https://93.184.216.34:99999/",
        "https://127.0.0.1/",
        "https://10.1.2.3/",
        "https://172.16.0.1/",
        "https://192.168.1.1/",
        "https://169.254.169.254/latest/meta-data",
        "https://100.64.0.1/",
        "https://0.0.0.0/",
        "https://224.0.0.1/",
        "https://[::1]/",
        "https://[fe80::1]/",
        "https://[fd00::1]/",
        "https://[::ffff:127.0.0.1]/",
        "https://[64:ff9b::7f00:1]/",
        "https://[2002:7f00:1::]/",
        "https://192.0.0.9/",
        "https://192.88.99.1/",
        "https://[::]/",
        "https://[::5db8:d822]/",
        "https://[::ffff:93.184.216.34]/",
        "https://[::ffff:0:127.0.0.1]/",
        "https://[::ffff:0:93.184.216.34]/",
        "https://[64:ff9b::5db8:d822]/",
        "https://[64:ff9b:1::a00:1]/",
        "https://[100::1]/",
        "https://[100:0:0:1::1]/",
        "https://[1fff:ffff::1]/",
        "https://[2001::1]/",
        "https://[2001:1::1]/",
        "https://[2001:2::1]/",
        "https://[2001:20::1]/",
        "https://[2001:1ff:ffff::1]/",
        "https://[2001:db8::1]/",
        "https://[2002:5db8:d822::1]/",
        "https://[2620:4f:8000::1]/",
        "https://[3fff::1]/",
        "https://[3fff:fff:ffff::1]/",
        "https://[4000::1]/",
        "https://[5f00::1]/",
        "https://[fc00::1]/",
        "https://[fec0::1]/",
        "https://[fec0::1%25eth0]/",
        "https://[ff02::1]/",
        "https://[ff0e::1]/",
    ],
)
def test_a_target_that_is_not_public_https_is_refused_without_a_dns_lookup(url: str) -> None:
    with pytest.raises(ForbiddenTargetError):
        ssrf.check_url(url, DEFAULT)


@pytest.mark.parametrize(
    "url",
    [
        "https://[::1",
        "https://[v1.x]/",
        "https://\u2102\u2100.com/",
        "https://\u200b/",
        "https://a..b/",
        f"https://{'a' * 64}.com/",
        "https://example.com/a\nb",
    ],
)
def test_a_malformed_address_is_refused(url: str) -> None:
    with pytest.raises(ForbiddenTargetError):
        ssrf.check_url(url, DEFAULT)


@pytest.mark.parametrize("host", ["example.com", "example.com.", "b\u00fccher.example", "xn--bcher-kva.example"])
def test_a_host_name_is_accepted_without_a_dns_lookup(host: str) -> None:
    assert ssrf.check_url(f"https://{host}:8443/a?b=c", DEFAULT) == host


def test_a_public_target_is_accepted_and_connected_to_by_its_address() -> None:
    target = ssrf.resolve("https://93.184.216.34/hook?a=1", DEFAULT)
    assert str(target.url) == "https://93.184.216.34/hook?a=1"
    assert target.host == "93.184.216.34"


@pytest.mark.parametrize("address", ["2606:2800:220:1::1", "2001:4860:4860::8888", "2a00:1450::1", "3fff:1000::1"])
def test_a_global_unicast_ipv6_address_is_accepted(address: str) -> None:
    assert ssrf.check_url(f"https://[{address}]/", DEFAULT) == address


@pytest.mark.parametrize("name", ["localhost", "localhost.", "0x7f000001", "2130706433", "127.1"])
def test_a_name_for_a_private_address_is_refused_when_it_is_resolved(name: str) -> None:
    with pytest.raises(ForbiddenTargetError):
        ssrf.resolve(f"https://{name}/", DEFAULT)


def test_a_host_that_resolves_to_a_public_and_a_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [(2, 1, 6, "", ("93.184.216.34", 443)), (2, 1, 6, "", ("10.0.0.1", 443))]
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: answers)
    with pytest.raises(ForbiddenTargetError):
        ssrf.resolve("https://example.com/", DEFAULT)


def test_an_operator_may_allow_private_targets_and_plain_http() -> None:
    target = ssrf.resolve("http://localhost:8080/hook", WebhookSettings(allow_http=True, allow_private=True))
    assert target.host == "localhost:8080"
    assert target.url.port == 8080
