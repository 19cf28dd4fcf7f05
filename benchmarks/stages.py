"""What the studies share: stage scripts run as a user would run them, and the description of the machine."""

import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def call(*words: object) -> str:
    """Run a script of the repository with the command that a user would type, printed; returns that command line.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    command = [str(word) for word in words]
    line = shlex.join(["python", *command])
    print(f"\n{line}", flush=True)
    subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]], check=True)
    return line


def read_lines(path: Path) -> list[dict]:
    """Rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def machine() -> str:
    """Architecture, cores and torch version, for the reports."""
    return f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
