"""The command: python -m vlarft.report RUN ... [--out FILE]."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import vlarft.report
from vlarft.report.page import write_report
from vlarft.run.config import Parser
from vlarft.run.script import clear_errors


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    parser = Parser(
        prog="python -m vlarft.report",
        description=vlarft.report.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="folder of a stage or of demo.py")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="page to write; by default report.html in the first RUN"
    )
    args = parser.parse_args(argv)
    out = args.out or args.runs[0] / "report.html"
    write_report(args.runs, out)
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    with clear_errors():
        main(sys.argv[1:])
