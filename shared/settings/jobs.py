"""Settings of jobs: leases, bulks, webhooks, the workers that run them, and how long their rows stay."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from shared.settings.section import ADVANCED, Advanced, FormerName, Section


class JobSettings(Section):
    lease_s: Advanced[float] = Field(
        30, ge=2, le=600, description="a worker that does not renew its leases for this long loses its jobs"
    )
    heartbeat_s: Advanced[float] = Field(
        10, gt=0, le=200, description="how often a worker renews its leases; at most half of `lease_s`"
    )
    reconcile_s: Advanced[float] = Field(
        5, gt=0, le=60, description="how often the reconciler compares the jobs in Postgres with the broker"
    )
    unserved_after_s: Advanced[float] = Field(
        900,
        ge=0,
        le=86_400,
        description="queued jobs of a model that is not one of `model.generators` fail when no worker has served it "
        "for this long; 0: they wait without limit",
    )
    max_crashes: Advanced[int] = Field(
        3,
        ge=1,
        le=10,
        description="worker crashes during the model work of a job or image, after which it is `dead` or `failed`",
    )
    max_transient_retries: int = Field(
        3, ge=0, le=20, description="returns of a job to the queue after temporary errors"
    )
    transient_retry_delay_s: Advanced[float] = Field(
        5, gt=0, le=3600, description="delay before a job's first retry after a temporary error; it doubles each time"
    )
    timeout_s: float = Field(
        600,
        gt=0,
        le=86_400,
        description="longest run of one attempt; a job may ask for less; "
        "delays by jobs of higher-priority lanes do not count",
    )
    shutdown_grace_s: float = Field(
        20, ge=0, le=600, description="time to finish running jobs after SIGTERM; then they go back to the queue"
    )

    @model_validator(mode="after")
    def _a_lease_outlives_two_heartbeats(self) -> Self:
        if self.heartbeat_s * 2 > self.lease_s:
            raise ValueError("heartbeat_s must be at most half of lease_s")
        return self


class BulkSettings(Section):
    max_items: int = Field(100_000, ge=1, le=1_000_000, description="items of one bulk, invalid lines included")
    max_body_bytes: Advanced[int] = Field(
        512 * 2**20, ge=1024, description="size of one request that sends lines of a bulk"
    )
    max_line_bytes: Advanced[int] = Field(64 * 1024, ge=1024, le=2**20, description="size of one line of a bulk")
    chunk_lines: Advanced[int] = Field(
        500, ge=1, le=10_000, description="lines stored in one transaction while a bulk is received"
    )
    max_transfers: Advanced[int] = Field(
        8, ge=1, le=512, description="requests of one API process at a time that send lines or download results"
    )
    receive_timeout_s: Advanced[float] = Field(
        60, gt=0, le=3600, description="longest wait for the next bytes of a sender"
    )
    max_open: Advanced[int] = Field(100, ge=1, description="unfinished bulks of one owner")
    max_open_items: int = Field(500_000, ge=1, description="items of all unfinished bulks of one owner")
    abandoned_after_s: Advanced[float] = Field(
        86_400, gt=0, description="a bulk in state `receiving` that receives no lines for this long is abandoned"
    )


class WebhookSettings(Section):
    timeout_s: Advanced[float] = Field(
        15, gt=0, le=60, description="longest time of one try, from the look-up of the host to the answer's status"
    )
    allow_http: bool = Field(False, description="accept targets without TLS")
    allow_private: bool = Field(False, description="accept targets on private, loopback and link-local addresses")
    per_host: Advanced[int] = Field(
        2, ge=1, le=100, description="deliveries to one host at a time, so that a dead host does not delay the others"
    )
    per_owner: Advanced[int] = Field(
        4,
        ge=1,
        le=100,
        description="deliveries of one owner at a time, so that many slow hosts of one do not delay the other owners",
    )
    secret_overlap_s: Advanced[float] = Field(
        86_400, ge=0, description="how long the old secret still signs after a rotation"
    )


class WorkerSettings(Section):
    concurrency: int | None = Field(
        None,
        ge=1,
        le=512,
        description="jobs that one worker process handles at a time; unset: 16, or four full batches of a generate "
        "worker's model if that is more; a generate worker takes `lane_headroom` more for each higher-priority lane",
    )
    lane_headroom: Annotated[int, ADVANCED, FormerName("worker", "spare_seats")] = Field(
        4,
        ge=0,
        le=512,
        description="additional jobs that a generate worker takes of a lane, "
        "compared with the next lower-priority lane",
    )
    bulk_pause_s: Advanced[float] = Field(
        0.05,
        ge=0,
        le=60,
        description="pause of a generate worker between two jobs of the bulk lane "
        "while higher-priority lanes are in use",
    )
    generator: str | None = Field(
        None, description="generator that a generate worker serves; unset: the default generator"
    )


class WatchdogSettings(Section):
    """Longest time without progress of a model call. After it the process ends, and expired leases requeue its jobs."""

    load_s: Advanced[float] = Field(3600, gt=0, le=86_400, description="loading one model, downloads included")
    warm_up_s: Advanced[float] = Field(900, gt=0, le=86_400, description="the first call of a loaded model")
    embed_s: Advanced[float] = Field(300, gt=0, le=86_400, description="one batch of the embedding model")
    step_s: Advanced[float] = Field(
        300, gt=0, le=86_400, description="one denoising step of a batch; the first includes encoding the prompts"
    )
    decode_s: Advanced[float] = Field(
        300, gt=0, le=86_400, description="from the last step of a batch to its decoded images"
    )


class RetentionSettings(Section):
    """How long data is kept. Each field says from when its days count, and the meaning of 0."""

    jobs_days: float = Field(
        0,
        ge=0,
        le=36_500,
        description="jobs with their outputs and events, and bulks, counted from their end; 0: kept forever",
    )
    outputs_days: float = Field(
        0, ge=0, le=36_500, description="outputs, counted from their creation; 0: kept with their job"
    )
    events_days: float = Field(
        30,
        ge=0,
        le=36_500,
        description="events of jobs, with their webhook deliveries, counted from the job's end; 0: kept with their job",
    )
    deliveries_days: float = Field(
        30,
        ge=0,
        le=36_500,
        description="settled webhook deliveries, counted from their creation; 0: kept until their event is deleted",
    )
    every_s: Advanced[float] = Field(
        3600, gt=0, le=604_800, description="how often the reconciler deletes data that is too old"
    )
    sweep_every_s: Advanced[float] = Field(
        21_600,
        ge=0,
        le=2_592_000,
        description="how often the reconciler deletes unused blobs; 0: only `python -m scripts.admin sweep` does",
    )
    blob_grace_s: Advanced[float] = Field(
        86_400,
        ge=0,
        description="age below which an unused blob is kept; raised to the longest possible duration of a job",
    )
