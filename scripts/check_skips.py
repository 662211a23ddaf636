"""Say how many tests were skipped and why, and fail where one could have run.

Reads what `pytest --junitxml=REPORT` wrote, on the machine that the tests ran on. A reason that
is not "needs ..." for one of NEEDS is an error too: whether that test could run, nobody can tell.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

sys.path.append(str(Path(__file__).resolve().parents[1]))

from tests.support.skips import problem


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, help="what pytest --junitxml wrote")
    report = parser.parse_args(arguments).report
    try:
        found = ElementTree.parse(report).iter("skipped")
    except (OSError, ElementTree.ParseError) as error:
        print(f"{report} is not a report of pytest ({error}); run pytest --junitxml={report}")
        return 1
    skips = Counter(element.get("message", "") for element in found)
    print(f"{report}: {skips.total()} tests skipped")
    status = 0
    for said, n_tests in sorted(skips.items()):
        wrong = problem(said)
        print(f"  {n_tests:3} {said}" + (f" -- error, {wrong}" if wrong else ""))
        status = 1 if wrong else status
    return status


if __name__ == "__main__":
    sys.exit(main())
