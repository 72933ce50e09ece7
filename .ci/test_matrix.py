"""The tests with several versions of torch, one after the other: test_matrix.py VERSION...

VERSION is torch's, such as 2.14.1, or names an interpreter too: 2.14.1:python3.12. Each has a
folder of its own in build/matrix/, with a copy of the files that git knows of, a .venv and a build.
They are kept: the next run only copies what changed, and compiles again if it was compiled from.
Nothing stops the run. The table at its end says what passed; the exit status is 1 if one failed.
"""

import argparse
import filecmp
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = "{:24} {:10} {:>7} {:>7} {:>8} {:>8} {:>8}"


def copy_changed(folder: Path):
    """Make the folder hold the files of ROOT, untouched where they are equal, and what it built."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    wanted = [name for name in names.split("\0") if name and (ROOT / name).is_file()]
    for name in wanted:
        copy = folder / name
        if not copy.is_file() or not filecmp.cmp(ROOT / name, copy, shallow=False):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy)  # dated now, which is what make looks at
    manifest = folder / "build" / "copied"
    manifest.parent.mkdir(exist_ok=True)
    before = manifest.read_text().splitlines() if manifest.is_file() else []
    for name in set(before) - set(wanted):
        (folder / name).unlink(missing_ok=True)
    manifest.write_text("\n".join(wanted))


def counts(results: Path) -> dict[str, int] | None:
    """How many tests passed, failed and were skipped by pytest's report; None without one."""
    if not results.is_file():
        return None
    suite = ElementTree.parse(results).getroot().find("testsuite")
    failed = int(suite.get("failures")) + int(suite.get("errors"))
    skipped = int(suite.get("skipped"))
    passed = int(suite.get("tests")) - failed - skipped
    return {"passed": passed, "failed": failed, "skipped": skipped}


def gigabytes(folder: Path) -> float:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir()) / 1e9


def run_one(version: str, python: str, arguments: str) -> tuple[bool, str]:
    """Whether all tests passed with that torch, and a line of the table."""
    name = f"torch-{version}" + ("" if python == "python3" else f"-{Path(python).name}")
    folder = ROOT / "build" / "matrix" / name
    folder.mkdir(parents=True, exist_ok=True)
    copy_changed(folder)
    results, log = folder / "build" / "results.xml", folder / "build" / "log"
    results.unlink(missing_ok=True)
    print(f"== {name}: {log.relative_to(ROOT)}", flush=True)
    start = time.monotonic()
    # The CUDA operators need a toolkit of that torch's CUDA, and the tests none.
    environment = {"MOE_EXT_CUDA": "0", **os.environ}
    command = ["make", "test", f"PYTHON={python}", f"TORCH=torch=={version}"]
    command += [f"ARGS=-q --timeout 600 --junitxml={results} {arguments}"]
    with log.open("w") as out:
        status = subprocess.run(
            command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT
        ).returncode
    seconds = time.monotonic() - start
    found = counts(results)
    if status:
        print("".join(log.open(errors="replace").readlines()[-15:]), flush=True)
    said = "passed" if not status else "failed" if found else "not built"
    numbers = found.values() if found else ["-"] * 3
    line = COLUMNS.format(name, said, *numbers, f"{seconds:.0f} s", f"{gigabytes(folder):.1f} GB")
    return not status, line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default="python3", help="where VERSION names none")
    parser.add_argument("--pytest", default="", metavar="ARGS", help="passed on to pytest")
    parser.add_argument("versions", nargs="+", metavar="VERSION")
    options = parser.parse_args()
    free = shutil.disk_usage(ROOT).free / 1e9
    print(f"A torch with CUDA takes 6 GB, one without 1 GB; {free:.0f} GB are free.", flush=True)
    passed, lines = [], []
    for entry in options.versions:
        version, _, python = entry.partition(":")
        good, line = run_one(version, python or options.python, options.pytest)
        passed.append(good)
        lines.append(line)
        print(line, flush=True)
    print("\n" + COLUMNS.format("", "", "passed", "failed", "skipped", "time", "disk"))
    print("\n".join(lines))
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
