"""The tests of what changed, for `make check`: prints test files and folders, one a line.

A changed file `shared/post_shared/a/b.py` has its tests in `tests/shared/a/test_b.py`, else in that folder. Changed
test files run themselves. What changed is what differs from the last commit or, if nothing does, the last commit
itself.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
ALWAYS = ("tests/test_house_rules.py", "tests/test_imports.py")
ROOTS = {
    "shared/post_shared": "tests/shared",
    "client/post_client": "tests/client",
    "server/post_server": "tests/server",
    "benchmarks/post_bench": "tests/bench",
}


def changed_files() -> list[str]:
    """Paths from the root: uncommitted and new files, or those of the last commit."""
    found = _git("diff", "--name-only", "HEAD") + _git("ls-files", "--others", "--exclude-standard")
    return found or _git("diff", "--name-only", "HEAD~1", "HEAD")


def tests_of(path: str) -> str | None:
    """The tests of one file: a file, a folder, or None.

    >>> tests_of("shared/post_shared/method/losses.py")
    'tests/shared/method/test_losses.py'
    """
    file = Path(path)
    if path.startswith("tests/"):
        return path if file.name.startswith("test_") and (ROOT / path).exists() else None
    for source, tests in ROOTS.items():
        if file.is_relative_to(source) and file.suffix == ".py":
            folder = Path(tests) / file.relative_to(source).parent
            own = folder / f"test_{file.stem}.py"
            places = [own, *(each for each in (folder, *folder.parents) if each != Path(tests).parent)]
            return next((str(each) for each in places if (ROOT / each).exists() and each != Path(tests)), None)
    return "tests/test_docs.py" if file.suffix == ".md" else None


def _git(*arguments: str) -> list[str]:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


if __name__ == "__main__":
    wanted = {each for path in changed_files() if (each := tests_of(path))}
    print("\n".join(sorted(wanted | set(ALWAYS))))
