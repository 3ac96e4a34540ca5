"""The API under load: job endpoints, event streams, and how fast and how large it starts.

``python -m benchmarks.api_load`` starts servers of its own and prints, as JSON: latency of job endpoints under 50
clients at 200 requests a second (p50, p99), the same beside a process that takes every core as a job does, the same
with 1,000 event streams open, how late events reach them, seconds from ``post serve`` to ready and the API process's
memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from benchmarks.live_api import LiveApi
from post_server.db.tables import JobRow
from post_server.jobs import states
from post_shared.schemas.jobs import JobKind

JOBS = 40


def add_jobs(api: LiveApi, count: int) -> list[str]:
    """Running jobs with some history, all of the owner's."""
    jobs = []
    for _ in range(count):
        with api.database.write() as session:
            row = JobRow(kind=JobKind.EVALUATE, request={}, owner_key_id=api.owner_id)
            states.announce(session, row)
            jobs.append(row.id)
            claimed = states.claim(session, row.id, lease_seconds=3600, max_attempts=3)
            if claimed is None:
                raise RuntimeError("a job that was just made could not be claimed")
            for step in range(20):
                metrics = {"loss": 1.0 / (step + 1)}
                states.record_progress(
                    session, claimed[1], progress=0.1, stage="x", step=step, steps=99, metrics=metrics
                )
    return jobs


def connect(api: LiveApi) -> httpx.AsyncClient:
    """A client with one connection of its own. Without TLS, whose certificates take a while to load."""
    return httpx.AsyncClient(base_url=api.url, headers=api.owner, timeout=120, trust_env=False, verify=False)


async def load(api: LiveApi, jobs: list[str], *, clients: int, rate: float, seconds: float) -> dict[str, Any]:
    """Requests at a steady rate, whatever the answers take. Latency counts from when a request was due."""
    paths = [f"/v1/jobs/{job}{end}" for job in jobs for end in ("", "/events", "/metrics")] + ["/v1/jobs?limit=20"] * 20
    process, latencies = psutil.Process(api.pid), list[float]()
    used = process.cpu_times()
    failures: list[str] = []
    begin = time.perf_counter() + 1.0

    async def client(number: int) -> None:
        async with connect(api) as http:
            for at in range(number, int(rate * seconds), clients):
                due = begin + at / rate
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                try:
                    answer = await http.get(paths[at % len(paths)])
                    if answer.status_code != 200:
                        failures.append(str(answer.status_code))
                except httpx.HTTPError as error:
                    failures.append(type(error).__name__)
                latencies.append(time.perf_counter() - due)

    await asyncio.gather(*(client(number) for number in range(clients)))
    took, now_used = time.perf_counter() - begin, process.cpu_times()
    processor = now_used.user + now_used.system - used.user - used.system
    p50, p99 = np.percentile(latencies, [50, 99]) * 1000
    return {
        "requests": len(latencies),
        "failures": len(failures),
        "per_second": round(len(latencies) / took, 1),
        "api_processor_ms_per_request": round(1000 * processor / len(latencies), 2),
        "p50_ms": round(float(p50), 1),
        "p99_ms": round(float(p99), 1),
    }


@contextmanager
def heavy_job(nice: int) -> Iterator[None]:
    """Matrix products on every core, with the priority of a job: what a distillation is to the API."""
    work = f"import os, torch; os.nice({nice}); a = torch.randn(512, 512)\nwhile True: a @ a"
    process = subprocess.Popen([sys.executable, "-c", work], env=os.environ | {"OMP_NUM_THREADS": str(os.cpu_count())})
    try:
        time.sleep(10)  # torch is slow to import
        yield
    finally:
        process.kill()
        process.wait()


async def open_streams(api: LiveApi, jobs: list[str], count: int, arrived: list[float]) -> list[asyncio.Task[None]]:
    """Streams over the jobs; each notes when the event after its snapshot came."""
    opened = asyncio.Semaphore(0)
    few = asyncio.Semaphore(50)

    async def follow(job: str) -> None:
        params, headers = {"snapshot": "true"}, {"Accept": "text/event-stream"}
        async with connect(api) as http:
            await few.acquire()
            async with http.stream("GET", f"/v1/jobs/{job}/events", params=params, headers=headers) as answer:
                first = True
                async for line in answer.aiter_lines():
                    if line.startswith("data:"):
                        if first:
                            few.release()
                            opened.release()
                            first = False
                        else:
                            arrived.append(time.perf_counter())

    tasks = [asyncio.ensure_future(follow(jobs[at % len(jobs)])) for at in range(count)]
    for _ in range(count):
        await asyncio.wait_for(opened.acquire(), 120)
    return tasks


async def measure(api: LiveApi, given: argparse.Namespace) -> dict[str, Any]:
    jobs = add_jobs(api, JOBS)
    process = psutil.Process(api.pid)
    found: dict[str, Any] = {"load_average": [round(each, 1) for each in os.getloadavg()]}
    options = {"clients": given.clients, "rate": given.rate, "seconds": given.seconds}
    await load(api, jobs, **options | {"seconds": 2.0})  # warm
    found["jobs"] = await load(api, jobs, **options)
    with heavy_job(api.settings.job_nice):
        found["jobs_beside_a_heavy_job"] = await load(api, jobs, **options)
    arrived: list[float] = []
    before = time.perf_counter()
    streams = await open_streams(api, jobs, given.streams, arrived)
    found["streams"] = {"open": len(streams), "seconds_to_open": round(time.perf_counter() - before, 1)}
    used = process.cpu_times()
    await asyncio.sleep(5)
    idle = process.cpu_times()
    found["streams"]["idle_cores"] = round((idle.user + idle.system - used.user - used.system) / 5, 2)
    found["jobs_beside_streams"] = await load(api, jobs, **options)
    arrived.clear()
    written = time.perf_counter()
    for job in jobs:
        with api.database.write() as session:
            states.request_cancel(session, job)
    while len(arrived) < len(streams) and time.perf_counter() - written < 30:
        await asyncio.sleep(0.05)
    late = [1000 * (at - written) for at in arrived]
    found["streams"] |= {"events": len(late), "p99_ms_late": round(float(np.percentile(late, 99)), 1) if late else None}
    found["api_megabytes"] = round(process.memory_info().rss / 2**20, 1)
    for stream in streams:
        stream.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    return found


def start_up() -> dict[str, Any]:
    """From the start of ``post serve`` until it says that it is ready."""
    with tempfile.TemporaryDirectory(prefix="post-") as home:
        told = os.environ | {"POST_HOME": home, "POST_PORT": "0", "POST_DEVICE": "cpu"}
        begin = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "post_server.serve"], env=told, stdout=subprocess.DEVNULL)
        try:
            ready = Path(home, "serve.json")
            while not ready.exists() and process.poll() is None:
                time.sleep(0.02)
            seconds = time.perf_counter() - begin
            parts = psutil.Process(process.pid).children(recursive=True)
            (api,) = [each for each in parts if each.cmdline()[2:4] == ["post_server.serve.child", "api"]]
            memory = api.memory_info().rss / 2**20
            return {"seconds_to_ready": round(seconds, 2), "api_megabytes": round(memory, 1)}
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--clients", type=int, default=50)
    options.add_argument("--rate", type=float, default=200.0)
    options.add_argument("--seconds", type=float, default=15.0)
    options.add_argument("--streams", type=int, default=1000)
    given = options.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4 * given.streams + 1000)), hard))
    found = {"start": start_up()}
    with tempfile.TemporaryDirectory(prefix="post-") as home, LiveApi(Path(home)) as api:
        found |= asyncio.run(measure(api, given))
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
