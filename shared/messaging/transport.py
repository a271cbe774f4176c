"""Kombu's Redis transport for a broker that is lost, refuses writes, or holds messages of another program."""

from typing import Any

import orjson
from kombu.transport import redis
from pydantic import SecretStr
from redis.exceptions import RedisError, ResponseError
from redis.sentinel import SentinelManagedConnection, SentinelManagedSSLConnection

from shared.messaging import foreign
from shared.messaging.redis import CALL_ONCE, primary_pool
from shared.messaging.sentinels import SentinelAddress

BROKER_ERRORS = (RedisError, OSError)
"""Errors of the broker itself. Any other error while a message is handled means that the message is unreadable."""


class QoS(redis.QoS):
    """Kombu's list of unacknowledged messages. It drops the entries that cannot be read."""

    def restore_by_tag(self, tag: str, client: Any = None, leftmost: bool = False) -> None:
        try:
            super().restore_by_tag(tag, client=client, leftmost=leftmost)
        except BROKER_ERRORS:
            raise
        except Exception as error:
            self._remove_from_indices(tag).execute()  # type: ignore[attr-defined]
            foreign.record_dropped("unacked", error)


class Channel(redis.Channel):
    """A channel that sends nothing after its connection is lost, and drops the messages of other programs.

    Kombu 5.7.0 closes a broken connection twice. The second close raises an AttributeError, because the transport has
    no client any more. So does each acknowledgement of a task that ends later. Celery then ends the worker: a restart
    of the broker lost the work of every busy process.
    """

    QoS = QoS

    sentinel_url: SecretStr | None = None
    """Transport option: where the sentinels are that know the broker's address; None: the connection has it."""
    from_transport_options = (*redis.Channel.from_transport_options, "sentinel_url")

    @property
    def do_restore(self) -> bool:  # type: ignore[override]  # only ever read
        """Whether closing the channel puts its unacknowledged messages back into their lists."""
        return self._is_connected

    def basic_ack(self, delivery_tag: str, multiple: bool = False) -> None:
        # Without a connection the broker delivers the message again. `attempts.claim_all` then leaves the job out.
        if self._is_connected:
            super().basic_ack(delivery_tag, multiple=multiple)

    def basic_reject(self, delivery_tag: str, requeue: bool = False) -> None:
        if self._is_connected:
            super().basic_reject(delivery_tag, requeue=requeue)

    @property
    def _is_connected(self) -> bool:
        transport: Any = self.connection
        return transport is not None and transport.client is not None

    _client: Any = None
    """The client of `pool`, which many threads may use at once."""

    def _create_client(self, asynchronous: bool = False) -> Any:
        """Create the client of the event loop; any other call shares one client.

        Kombu creates a client for each command. A busy generate worker spent a tenth of its time on that.
        """
        if asynchronous:
            return super()._create_client(asynchronous=True)  # type: ignore[misc]  # the stubs lack private methods
        if self._client is None or self._client.connection_pool is not self.pool:
            self._client = super()._create_client()  # type: ignore[misc]
        return self._client

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        return {**super()._connparams(asynchronous), **CALL_ONCE}  # type: ignore[misc]

    def _get_pool(self, asynchronous: bool = False) -> Any:
        if self.sentinel_url is None:
            return super()._get_pool(asynchronous)  # type: ignore[misc]
        self.connection_class = SentinelManagedConnection
        self.connection_class_ssl = SentinelManagedSSLConnection
        options = self._connparams(asynchronous)
        self.keyprefix_fanout = self.keyprefix_fanout.format(db=options["db"])  # as kombu's own method
        for name in ("host", "port", "db", "username", "password"):
            options.pop(name, None)
        address = SentinelAddress.parse(self.sentinel_url.get_secret_value())
        assert address is not None
        return primary_pool(address, **options)

    # --- messages of other programs

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)  # type: ignore[misc]
        except (ValueError, RecursionError) as error:  # kombu has removed the message from its list
            foreign.record_dropped("queue", error)
            return True

    def _do_restore_message(self, payload: Any, exchange: Any, routing_key: Any, *args: Any, **options: Any) -> None:
        foreign.check_task_message(payload)
        super()._do_restore_message(payload, exchange, routing_key, *args, **options)  # type: ignore[misc]

    def _handle_message(self, client: Any, response: Any) -> dict[str, Any]:
        message: dict[str, Any] = super()._handle_message(client, response)  # type: ignore[misc]
        if isinstance(message["data"], bytes):
            try:
                orjson.loads(message["data"])
            except orjson.JSONDecodeError as error:
                foreign.record_dropped("broadcast", error)
                message["data"] = None  # kombu skips a message without data
        return message

    def _deliver_fanout_message(self, message: Any, exchange: str) -> bool:
        try:
            return bool(super()._deliver_fanout_message(message, exchange))  # type: ignore[misc]
        except BROKER_ERRORS:
            raise
        except Exception as error:
            foreign.record_dropped("broadcast", error)
            return True


class Transport(redis.Transport):
    Channel = Channel

    # A broker that refuses writes is a lost broker. It may be a former primary, or its disk may be full.
    connection_errors = (*redis.Transport.connection_errors, ResponseError)
