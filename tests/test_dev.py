"""dev.py where it can't become the command that it runs: on Windows."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Ends a second after Ctrl+C, with an exit code of its own.
SLOW_TO_END = """
import signal, sys, time
def end(*arguments):
    time.sleep(1)
    sys.exit(7)
signal.signal(signal.SIGINT, end)
print("ready", flush=True)
time.sleep(30)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals a process group")
def test_a_command_may_take_its_time_to_end_after_an_interruption():
    program = f"import os, sys, dev; sys.exit(dev.wait_for([sys.executable, '-c', {SLOW_TO_END!r}], dict(os.environ)))"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=20) == 7
