"""The API under load: job endpoints, event streams, start-up time and memory.

``python -m benchmarks.api_load`` starts its own servers and prints, as JSON: latency of job endpoints under 50 clients
at 200 requests per second (p50, p99), the same beside a process that loads all cores like a job, the same with 1,000
open event streams, the delay of their events, seconds from ``post serve`` to ready, and memory of the API process.
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
    """Running jobs of the owner, with some progress events."""
    jobs = []
    for _ in range(count):
        with api.database.write() as session:
            row = JobRow(kind=JobKind.EVALUATE, request={}, owner_key_id=api.owner_id)
            states.announce(session, row)
            jobs.append(row.id)
            claimed = states.claim(session, row.id, lease_seconds=3600, max_attempts=3)
            if claimed is None:
                raise RuntimeError("a new job could not be claimed")
            for step in range(20):
                metrics = {"loss": 1.0 / (step + 1)}
                states.record_progress(
                    session, claimed[1], progress=0.1, stage="x", step=step, steps=99, metrics=metrics
                )
    return jobs


def connect(api: LiveApi) -> httpx.AsyncClient:
    """A client with its own connection; ``verify=False``, because loading TLS certificates is slow."""
    return httpx.AsyncClient(base_url=api.url, headers=api.owner, timeout=120, trust_env=False, verify=False)


async def load(api: LiveApi, jobs: list[str], *, clients: int, rate: float, seconds: float) -> dict[str, Any]:
    """Requests at a steady rate. Latency is measured from the time at which a request was due."""
    paths = [f"/v1/jobs/{job}{end}" for job in jobs for end in ("", "/events", "/metrics")] + ["/v1/jobs?limit=20"] * 20
    process, latencies = psutil.Process(api.pid), list[float]()
    used = process.cpu_times()
    failures: list[str] = []
    begin = time.perf_counter() + 1.0

    async def client(number: int) -> None:
        async with connect(api) as http:
            for index in range(number, int(rate * seconds), clients):
                due = begin + index / rate
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                try:
                    answer = await http.get(paths[index % len(paths)])
                    if answer.status_code != 200:
                        failures.append(str(answer.status_code))
                except httpx.HTTPError as error:
                    failures.append(type(error).__name__)
                latencies.append(time.perf_counter() - due)

    await asyncio.gather(*(client(number) for number in range(clients)))
    elapsed, now_used = time.perf_counter() - begin, process.cpu_times()
    processor = now_used.user + now_used.system - used.user - used.system
    p50, p99 = np.percentile(latencies, [50, 99]) * 1000
    return {
        "requests": len(latencies),
        "failures": len(failures),
        "per_second": round(len(latencies) / elapsed, 1),
        "api_processor_ms_per_request": round(1000 * processor / len(latencies), 2),
        "p50_ms": round(float(p50), 1),
        "p99_ms": round(float(p99), 1),
    }


@contextmanager
def heavy_job(nice: int) -> Iterator[None]:
    """Matrix products on all cores with a job's priority, like a distillation beside the API."""
    code = f"import os, torch; os.nice({nice}); a = torch.randn(512, 512)\nwhile True: a @ a"
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": str(os.cpu_count())})
    try:
        time.sleep(10)  # torch is slow to import
        yield
    finally:
        process.kill()
        process.wait()


async def open_streams(api: LiveApi, jobs: list[str], count: int, arrived: list[float]) -> list[asyncio.Task[None]]:
    """Event streams of the jobs; each records the arrival of the event after its snapshot."""
    opened = asyncio.Semaphore(0)
    opening = asyncio.Semaphore(50)

    async def follow(job: str) -> None:
        params, headers = {"snapshot": "true"}, {"Accept": "text/event-stream"}
        async with connect(api) as http:
            await opening.acquire()
            async with http.stream("GET", f"/v1/jobs/{job}/events", params=params, headers=headers) as answer:
                first = True
                async for line in answer.aiter_lines():
                    if line.startswith("data:"):
                        if first:
                            opening.release()
                            opened.release()
                            first = False
                        else:
                            arrived.append(time.perf_counter())

    tasks = [asyncio.ensure_future(follow(jobs[index % len(jobs)])) for index in range(count)]
    for _ in range(count):
        await asyncio.wait_for(opened.acquire(), 120)
    return tasks


async def measure(api: LiveApi, arguments: argparse.Namespace) -> dict[str, Any]:
    jobs = add_jobs(api, JOBS)
    process = psutil.Process(api.pid)
    results: dict[str, Any] = {"load_average": [round(average, 1) for average in os.getloadavg()]}
    options = {"clients": arguments.clients, "rate": arguments.rate, "seconds": arguments.seconds}
    await load(api, jobs, **options | {"seconds": 2.0})  # warm-up
    results["jobs"] = await load(api, jobs, **options)
    with heavy_job(api.settings.job_nice):
        results["jobs_beside_a_heavy_job"] = await load(api, jobs, **options)
    arrived: list[float] = []
    before = time.perf_counter()
    streams = await open_streams(api, jobs, arguments.streams, arrived)
    results["streams"] = {"open": len(streams), "seconds_to_open": round(time.perf_counter() - before, 1)}
    used = process.cpu_times()
    await asyncio.sleep(5)
    idle = process.cpu_times()
    results["streams"]["idle_cores"] = round((idle.user + idle.system - used.user - used.system) / 5, 2)
    results["jobs_beside_streams"] = await load(api, jobs, **options)
    arrived.clear()
    written = time.perf_counter()
    for job in jobs:
        with api.database.write() as session:
            states.request_cancel(session, job)
    while len(arrived) < len(streams) and time.perf_counter() - written < 30:
        await asyncio.sleep(0.05)
    delays = [1000 * (time_of_arrival - written) for time_of_arrival in arrived]
    p99 = round(float(np.percentile(delays, 99)), 1) if delays else None
    results["streams"] |= {"events": len(delays), "p99_ms_late": p99}
    results["api_megabytes"] = round(process.memory_info().rss / 2**20, 1)
    for stream in streams:
        stream.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    return results


def start_up() -> dict[str, Any]:
    """Seconds from the start of ``post serve`` until it is ready, and memory of its API process."""
    with tempfile.TemporaryDirectory(prefix="post-") as home:
        environment = os.environ | {"POST_HOME": home, "POST_PORT": "0", "POST_DEVICE": "cpu"}
        begin = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "post_server.serve"], env=environment, stdout=subprocess.DEVNULL
        )
        try:
            ready = Path(home, "serve.json")
            while not ready.exists() and process.poll() is None:
                time.sleep(0.02)
            seconds = time.perf_counter() - begin
            children = psutil.Process(process.pid).children(recursive=True)
            (api,) = [child for child in children if child.cmdline()[2:4] == ["post_server.serve.child", "api"]]
            memory = api.memory_info().rss / 2**20
            return {"seconds_to_ready": round(seconds, 2), "api_megabytes": round(memory, 1)}
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--rate", type=float, default=200.0)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--streams", type=int, default=1000)
    arguments = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4 * arguments.streams + 1000)), hard))
    results = {"start": start_up()}
    with tempfile.TemporaryDirectory(prefix="post-") as home, LiveApi(Path(home)) as api:
        results |= asyncio.run(measure(api, arguments))
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
