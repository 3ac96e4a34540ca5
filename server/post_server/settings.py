"""All settings of the server. Each is read from the environment variable ``POST_<NAME>``."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self

from platformdirs import user_data_path
from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from post_shared.errors import InvalidInput
from post_shared.schemas.jobs import JobKind
from post_shared.schemas.validation import validation_errors

_DEVICE_MEMORY = r"(\d+|cpu)=\d+(\.\d+)?([KMGT]i?B)?"
_KINDS = f"({'|'.join(JobKind)})"


class Settings(BaseSettings):
    """By default every service is embedded; each URL replaces one of them with an external service."""

    model_config = SettingsConfigDict(env_prefix="POST_", frozen=True, extra="ignore")

    home: Path = Field(default_factory=lambda: user_data_path("post"), description="Folder of the embedded services.")
    database_url: str = Field(default="", description="SQLAlchemy URL; default: SQLite in the home folder.")
    redis_url: str = Field(
        default="", description="Redis for the job queue and events; default: an embedded server on a private socket."
    )
    storage_url: str = Field(default="", description="fsspec URL for blobs; default: a folder in the home folder.")

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8321, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")

    device: str = Field(
        default="auto",
        description="auto, cpu, cuda, cuda:N, or spread (weights over all GPUs, then main memory, then disk).",
    )
    device_memory: str = Field(
        default="",
        pattern=rf"^({_DEVICE_MEMORY}(,{_DEVICE_MEMORY})*)?$",
        description="With `spread`, the memory for weights on each device, for example `0=20GiB,1=20GiB,cpu=60GiB`; "
        "default: 70 % of the free memory.",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="`auto`: bfloat16 on a GPU; for distillation and transfer also on a CPU where a short measurement "
        "finds it faster.",
    )
    threads: int = Field(default=0, ge=0, description="CPU threads of a job; 0: one per core.")
    job_nice: int = Field(
        default=10,
        ge=0,
        le=19,
        description="Niceness of a job's processes, so that the API on the same machine stays responsive.",
    )

    lease_seconds: float = Field(
        default=30.0, gt=0, description="A worker that sends no heartbeat for this long loses its job."
    )
    heartbeat_seconds: float = Field(
        default=5.0, gt=0, description="Interval at which a worker renews its lease; at most half of the lease."
    )
    progress_seconds: float = Field(
        default=3600.0,
        gt=0,
        description="A job that reports no progress for this long counts as hung: it is killed and retried.",
    )
    max_attempts: int = Field(default=3, ge=1, description="Attempts of a lost job before it fails.")
    checkpoint_seconds: float = Field(default=60.0, gt=0, description="Interval between a job's checkpoints.")
    cancel_grace_seconds: float = Field(default=30.0, gt=0, description="Time from a cancel request to a kill.")

    teacher_cache_bytes: int = Field(
        default=2 * 2**30,  # post_shared.method.distillation.teacher_cache.CACHE_BYTES: importing it would load torch
        ge=0,
        description="Disk space that a distillation may use to cache the target's hidden states for later epochs.",
    )
    gpu_jobs: str = Field(
        default="",
        pattern=f"^({_KINDS}(,{_KINDS})*)?$",
        description="Kinds of jobs that only a worker with a GPU takes, for example `distil,transfer`.",
    )
    running_jobs_per_key: int = Field(
        default=0, ge=0, description="Jobs of one API key that may run at the same time; 0: no limit."
    )
    worker_jobs: int = Field(default=1, ge=1, description="Jobs that one worker runs at the same time.")
    reconcile_seconds: float = Field(
        default=5.0, gt=0, description="Interval at which a worker checks for lost and undelivered jobs."
    )
    notify_seconds: float = Field(
        default=10.0,
        ge=0.1,
        description="Workers are notified again of a job that has been queued for longer; a job whose storage can't be "
        "reached is retried after this time.",
    )
    visibility_seconds: float = Field(
        default=3600.0,
        gt=0,
        description="Redis redelivers a notification that a worker has not acknowledged for this long.",
    )
    stop_seconds: float = Field(default=30.0, gt=0, description="Time from a stop signal to a kill, for every process.")

    @model_validator(mode="after")
    def _check_lease(self) -> Self:
        if self.lease_seconds < 2 * self.heartbeat_seconds:
            raise ValueError("lease_seconds is at least twice heartbeat_seconds, or running jobs would count as lost")
        return self

    @property
    def step_seconds(self) -> float:
        """Time for a job to finish its step and save a checkpoint after its worker was told to stop."""
        return max(self.stop_seconds / 2, self.stop_seconds - 5.0)

    predictor_models: int = Field(default=2, ge=1, description="Models that one predictor keeps loaded.")
    predictor_prompt_bytes: int = Field(
        default=2**30, ge=0, description="Memory of one predictor for the prepared prompts of all its models."
    )
    predictor_text_tokens: int = Field(
        default=2048,
        ge=8,
        description="Maximum tokens of a text in its template, if the model's context allows that many.",
    )
    predictor_queue: int = Field(
        default=256,
        ge=1,
        description="Requests that may wait for a predictor; further ones are told to retry later.",
    )

    prompt_bytes: int = Field(default=64 * 2**20, ge=1, description="Maximum size of a prompt file.")
    dataset_bytes: int = Field(default=2 * 2**30, ge=1, description="Maximum size of a dataset.")
    part_bytes: int = Field(default=64 * 2**20, ge=1, description="Maximum size of one part of a dataset upload.")
    document_bytes: int = Field(default=32 * 2**20, ge=1, description="Maximum size of a JSON request body.")
    requests_per_minute: int = Field(default=1200, ge=0, description="Requests per minute of one API key; 0: no limit.")
    jobs_per_key: int = Field(default=100, ge=1, description="Unfinished jobs that one API key may have.")
    prediction_seconds: float = Field(default=120.0, gt=0, description="Time that a request waits for its prediction.")
    log_level: str = Field(
        default="INFO", pattern="(?i)^(debug|info|warning|error)$", description="DEBUG, INFO, WARNING or ERROR."
    )
    log_json: bool = Field(default=True, description="Log JSON lines; false: human-readable lines.")

    @model_validator(mode="before")
    @classmethod
    def _fill_urls(cls, values: dict[str, object]) -> dict[str, object]:
        home = Path(str(values.get("home") or user_data_path("post"))).expanduser().absolute()
        defaults = {
            "home": home,
            "database_url": f"sqlite:///{home}/post.db",
            "redis_url": f"unix://{home}/redis.sock",
            "storage_url": f"file://{home}/blobs",
        }
        return {
            **defaults,
            **{name: value for name, value in values.items() if value not in ("", None)},
            "home": home,
        }


@lru_cache
def get_settings() -> Settings:
    """The settings from the environment; see :func:`settings_with`."""
    return settings_with()


def settings_with(**overrides: Any) -> Settings:
    """The settings from the environment, with ``overrides``.

    Raises:
        InvalidInput: a setting has an invalid value. The value isn't shown, because it may be secret.
    """
    try:
        return Settings(**overrides)
    except ValidationError as error:
        problems = validation_errors(error.errors())
        detail = "; ".join(f"POST_{name.upper()}: {message}" if name else message for name, message in problems)
        raise InvalidInput(detail) from None
