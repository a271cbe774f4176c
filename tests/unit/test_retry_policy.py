"""The retry policy of jobs."""

from shared.settings import JobSettings
from worker_service.jobs.retry_policy import TEMPORARY_ERRORS, retry_delay_s


def test_each_retry_waits_twice_as_long_until_the_last_retry() -> None:
    settings = JobSettings(transient_retry_delay_s=4, max_transient_retries=3)
    assert [retry_delay_s(retries, settings) for retries in range(5)] == [4, 8, 16, None, None]


def test_a_temporary_error_is_answered_with_503() -> None:
    assert {error.status for error in TEMPORARY_ERRORS} == {503}


def test_a_service_that_failed_may_ask_for_a_longer_delay_of_at_most_an_hour() -> None:
    settings = JobSettings(transient_retry_delay_s=4, max_transient_retries=3)
    assert [retry_delay_s(retries, settings, told_s=10) for retries in range(4)] == [10, 10, 16, None]
    assert retry_delay_s(0, settings, told_s=1e9) == 3600
