"""The address of sentinels: its parts, its mistakes, and that nothing shows its password."""

import pytest
from celery import Celery
from pydantic import SecretStr, ValidationError

from shared.messaging import queue
from shared.messaging.sentinels import SentinelAddress
from shared.settings import QueueSettings

URL = "redis+sentinel://user:p%40ss@first:26380,second/afterimage/3?sentinel_password=other"


def test_an_address_has_all_sentinels_and_both_passwords() -> None:
    assert SentinelAddress.parse(URL) == SentinelAddress(
        hosts=(("first", 26380), ("second", 26379)),
        service="afterimage",
        database=3,
        username="user",
        password="p@ss",
        sentinel_password="other",
        tls=False,
    )


def test_a_short_address_has_defaults_and_a_second_r_and_s_mean_tls() -> None:
    address = SentinelAddress.parse("rediss+sentinel://host/afterimage")
    assert address == SentinelAddress((("host", 26379),), "afterimage", 0, None, None, None, tls=True)


def test_the_address_of_one_server_has_no_sentinels() -> None:
    assert SentinelAddress.parse("redis://:secret@host:6379/0") is None


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://first:1,second:2",
        "redis+sentinel://first:1,/afterimage",
        "redis+sentinel:///afterimage",
        "redis+sentinel://first:port/afterimage",
        "redis+sentinel://first:1/afterimage/zero",
    ],
)
def test_a_wrong_address_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ValidationError) as caught:
        QueueSettings(url=SecretStr(url.replace("://", "://:hunter2hunter2@")))
    mistakes = str(caught.value.errors(include_input=False, include_url=False))
    assert "redis+sentinel://host:port,host:port/service" in mistakes
    assert "hunter2" not in mistakes


def test_the_configuration_that_celery_shows_has_no_password() -> None:
    app = queue.configure(Celery("any"), QueueSettings(url=SecretStr(URL)))
    shown = str(app.conf.humanize(with_defaults=False, censored=True)) + repr(app.conf.broker_transport_options)
    assert "p%40ss" not in shown
    assert "p@ss" not in shown
    assert "other" not in shown
