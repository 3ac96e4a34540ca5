"""Packages, pinned versions, make targets and containers."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
ROOTS = {"post_shared": "shared", "post_client": "client", "post_server": "server", "post_bench": "benchmarks"}


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): pinned for name, pinned in pins}


def _requirements() -> list[Requirement]:
    extras = PROJECT["project"]["optional-dependencies"].values()
    lines = [*PROJECT["project"]["dependencies"], *(line for extra in extras for line in extra)]
    return [r for r in map(Requirement, lines) if r.name != "post-transfer"]


@pytest.mark.parametrize("requirement", _requirements(), ids=str)
def test_every_requirement_is_pinned(requirement: Requirement) -> None:
    """constraints.txt pins one version, which pyproject.toml allows."""
    pinned = _pins()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pinned)


def test_installed_versions_are_the_pinned_ones() -> None:
    for requirement in _requirements():
        if not requirement.marker or requirement.marker.evaluate():
            installed = version(requirement.name).split("+")[0]  # torch's CPU wheels are local versions
            assert installed == _pins()[canonicalize_name(requirement.name)], requirement.name


def test_four_packages_one_distribution() -> None:
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert sorted(packages) == sorted(f"{root}/{name}" for name, root in ROOTS.items())
    for name, root in ROOTS.items():
        assert (ROOT / root / name / "py.typed").exists()
        if root != "benchmarks":  # whose programs run as python -m benchmarks.NAME
            assert not (ROOT / root / "__init__.py").exists(), "a source root is not a package"


def test_one_command_with_the_subcommands_of_all_packages() -> None:
    (script,) = entry_points(group="console_scripts", name="post")
    assert callable(script.load())
    assert {entry.name for entry in entry_points(group="post.commands")} == {"bench", "client", "server"}


def test_version_is_in_the_changelog() -> None:
    assert f"## {version('post-transfer')}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


@pytest.mark.parametrize("target", ["demo", "test", "test-slow", "lint", "format", "install", "clean"])
def test_make_targets(target: str) -> None:
    """Each exists, and each except clean uses the virtual environment."""
    command = ["make", "--dry-run", "--always-make", target, "ARGS=--xyz"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert ("-c constraints.txt -e '.[dev]'" in done.stdout) == (target != "clean")
    assert ("--xyz" in done.stdout) == (target in ("demo", "test", "test-slow"))


def test_an_old_python_is_refused(tmp_path: Path) -> None:
    """With a clear message, and before anything is created."""
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    old.chmod(0o755)
    makefile = (ROOT / "Makefile").read_text("utf-8")
    (tmp_path / "Makefile").write_text(makefile, encoding="utf-8")
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    done = subprocess.run(["make", "test", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "POST needs Python 3.11 or later" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_ci_script_is_valid_shell() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)


def test_pre_commit_needs_no_network() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    assert {repository["repo"] for repository in config["repos"]} == {"local"}


# --- containers ---------------------------------------------------------------------------------------


def _compose() -> dict[str, dict[str, object]]:
    services: dict[str, dict[str, object]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))[
        "services"
    ]
    return services


def test_compose_has_every_part() -> None:
    services = _compose()
    assert {"redis", "postgres", "api", "worker", "predictor", "migrate"} == services.keys()
    ours = [service for service in services.values() if "build" in service]
    assert len(ours) == 4
    assert len({str(service["image"]) for service in ours}) == 1
    assert [name for name, service in services.items() if "ports" in service] == ["api"]


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose isn't installed")
@pytest.mark.parametrize("options", [[], ["--env-file", ".env.example"]], ids=["bare", "example"])
def test_compose_file_validates(options: list[str]) -> None:
    done = subprocess.run(
        ["docker-compose", *options, "config", "--quiet"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_compose_reads_only_what_the_example_shows() -> None:
    """Every variable is in .env.example, if only as a comment, and no secret has a default."""
    used = dict(re.findall(r"(?<!\$)\$\{([A-Z_]+):-([^}]*)\}", (ROOT / "docker-compose.yml").read_text("utf-8")))
    example = (ROOT / ".env.example").read_text("utf-8")
    assert used.keys() == set(re.findall(r"^#?([A-Z_]+)=", example, re.MULTILINE))
    assert all(default == "" for name, default in used.items() if "PASSWORD" in name or "SECRET" in name)


def test_image_copies_what_exists_and_runs_unprivileged() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    copied = [
        name for line in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.MULTILINE) for name in line.split()
    ]
    allowed = (ROOT / ".dockerignore").read_text("utf-8")
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}" in allowed
    assert re.findall(r"^USER (.+)$", dockerfile, re.MULTILINE)[-1] != "root"


@pytest.mark.slow
def test_wheel_holds_code_and_data_and_nothing_else(tmp_path: Path) -> None:
    """Built from a copy of the checkout without caches and virtual environment."""
    copy = shutil.copytree(
        ROOT, tmp_path / "copy", ignore=shutil.ignore_patterns(".venv", ".git", "__pycache__", ".*_cache")
    )
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("post_transfer-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {*ROOTS, "post_transfer"}
    for name, root in ROOTS.items():
        for path in (copy / root / name).rglob("*"):
            if path.is_file():
                assert str(path.relative_to(copy / root)) in names
