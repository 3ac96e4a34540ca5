"""Every setting of the provider's side, in one place. Each is an environment variable ``POST_<NAME>``."""

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

_ROOM = r"(\d+|cpu)=\d+(\.\d+)?([KMGT]i?B)?"
_KINDS = f"({'|'.join(JobKind)})"


class Settings(BaseSettings):
    """Embedded by default; each URL replaces one embedded part by the real thing at scale."""

    model_config = SettingsConfigDict(env_prefix="POST_", frozen=True, extra="ignore")

    home: Path = Field(default_factory=lambda: user_data_path("post"), description="Folder of all embedded parts.")
    database_url: str = Field(default="", description="SQLAlchemy URL; default: SQLite in the home folder.")
    redis_url: str = Field(
        default="", description="Broker and events; default: an embedded server on a private socket."
    )
    storage_url: str = Field(default="", description="fsspec URL for blobs; default: a folder in the home folder.")

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8321, ge=0, le=65535, description="0 takes a free port.")

    device: str = Field(
        default="auto",
        description="auto, cpu, cuda, cuda:N, or spread: a model's weights over all GPUs, then memory, then the disk.",
    )
    device_memory: str = Field(
        default="",
        pattern=rf"^({_ROOM}(,{_ROOM})*)?$",
        description="With `spread`, what weights may take, such as `0=20GiB,1=20GiB,cpu=60GiB`; default: 70 % of what "
        "is free.",
    )
    precision: Literal["auto", "float32"] = Field(
        default="auto",
        description="`auto`: bfloat16 on a GPU, and for a target that is distilled or gets a prompt also on a CPU with "
        "matrix units for it (AMX).",
    )
    threads: int = Field(default=0, ge=0, description="CPU threads of a job; 0: the cores there are.")
    job_nice: int = Field(
        default=10,
        ge=0,
        le=19,
        description="How far a job's processes stand back (`nice`), so that the API beside them stays fast.",
    )

    lease_seconds: float = Field(
        default=30.0, gt=0, description="A worker that is silent for so long has lost its job."
    )
    heartbeat_seconds: float = Field(
        default=5.0, gt=0, description="How often a worker renews its lease; at most half of it."
    )
    progress_seconds: float = Field(
        default=3600.0, gt=0, description="A job that reports nothing for so long hangs: it is killed and tried again."
    )
    max_attempts: int = Field(default=3, ge=1, description="How often a lost job is started again before it fails.")
    checkpoint_seconds: float = Field(default=60.0, gt=0, description="How often a job keeps a checkpoint.")
    cancel_grace_seconds: float = Field(default=30.0, gt=0, description="From cancel to kill.")

    teacher_cache_bytes: int = Field(
        default=2 * 2**30,  # post_shared.method.distillation.teacher_cache.CACHE_BYTES: importing it would load torch
        ge=0,
        description="Disk that a distillation may use for the target's hidden states, for later passes of its corpus.",
    )
    gpu_jobs: str = Field(
        default="",
        pattern=f"^({_KINDS}(,{_KINDS})*)?$",
        description="Kinds of jobs that only a worker with a GPU takes, such as `distil,transfer`.",
    )
    running_jobs_per_key: int = Field(
        default=0, ge=0, description="Jobs of one API key that run at a time; 0: no limit."
    )
    worker_jobs: int = Field(default=1, ge=1, description="Jobs that one worker runs at a time.")
    reconcile_seconds: float = Field(
        default=5.0, gt=0, description="How often a worker looks for lost and undelivered jobs."
    )
    ring_seconds: float = Field(
        default=10.0,
        ge=0.1,
        description="A job that is queued for longer is announced again; it rests as long while the store is away.",
    )
    visibility_seconds: float = Field(
        default=3600.0, gt=0, description="Redis gives a ring that a worker kept for so long to another one."
    )
    stop_seconds: float = Field(default=30.0, gt=0, description="From a stop signal to kill, for every process.")

    @model_validator(mode="after")
    def _leases_last(self) -> Self:
        if self.lease_seconds < 2 * self.heartbeat_seconds:
            raise ValueError("lease_seconds is at least twice heartbeat_seconds, or every job would be taken for lost")
        return self

    @property
    def step_seconds(self) -> float:
        """How long a job may take to reach the end of its step and keep a checkpoint, once its worker has to stop."""
        return max(self.stop_seconds / 2, self.stop_seconds - 5.0)

    predictor_models: int = Field(default=2, ge=1, description="Models that a predictor keeps in memory.")
    predictor_prompt_bytes: int = Field(
        default=2**30, ge=0, description="Memory that it uses for prompts it keeps ready, of all models together."
    )
    predictor_text_tokens: int = Field(
        default=2048,
        ge=8,
        description="Most tokens of a text in its template, where the model's context allows as many.",
    )
    predictor_queue: int = Field(
        default=256, ge=1, description="Requests that wait for a predictor; with more, callers are told to come later."
    )

    prompt_bytes: int = Field(default=64 * 2**20, ge=1, description="Largest prompt file.")
    dataset_bytes: int = Field(default=2 * 2**30, ge=1, description="Largest dataset upload.")
    part_bytes: int = Field(default=64 * 2**20, ge=1, description="Largest part of a dataset that comes in parts.")
    document_bytes: int = Field(default=32 * 2**20, ge=1, description="Largest JSON document.")
    requests_per_minute: int = Field(
        default=1200, ge=0, description="Requests that an API key may make in a minute; 0: no limit."
    )
    jobs_per_key: int = Field(default=100, ge=1, description="Jobs of one API key that have not ended.")
    prediction_seconds: float = Field(default=120.0, gt=0, description="How long a request waits for a prediction.")
    log_level: str = Field(
        default="INFO", pattern="(?i)^(debug|info|warning|error)$", description="DEBUG, INFO, WARNING or ERROR."
    )
    log_json: bool = Field(default=True, description="JSON lines for machines; false: lines for people.")

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
    """The settings of the environment: see :func:`settings_with`."""
    return settings_with()


def settings_with(**given: Any) -> Settings:
    """The settings of the environment, but for those that are given.

    Raises:
        InvalidInput: a setting has a value that makes no sense; its value, which may be secret, isn't shown.
    """
    try:
        return Settings(**given)
    except ValidationError as error:
        found = validation_errors(error.errors())
        detail = "; ".join(f"POST_{name.upper()}: {message}" if name else message for name, message in found)
        raise InvalidInput(detail) from None
