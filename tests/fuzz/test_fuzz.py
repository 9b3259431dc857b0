"""A slice of `make fuzz`: the same hundred inputs every time, each refused in a sentence or taken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and watches are Linux's")
SLICE = {"hdf5": 20, "npz": 20, "minari": 16, "flat": 12, "run": 12, "checkpoint": 8, "d3rlpy": 6, "ogbench": 6}
HERE = Path(__file__).resolve().parent


def test_mutated_inputs_are_taken_or_refused_in_a_sentence() -> None:
    """In a process of its own: the harness forks, which the threads of other tests would not survive."""
    words = [word for kind, count in SLICE.items() for word in ("--count", f"{kind}={count}")]
    done = subprocess.run([sys.executable, str(HERE / "fuzz.py"), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


FAULTS = {
    "raise ValueError('x')": "traceback",
    "sys.exit(3)": "status",
    "print('offrl: error: One.', 'Two.', sep=chr(10), file=sys.stderr); sys.exit(2)": "not one sentence",
    "import offrl_fuzz_canary": "imported",
    "open(OUTSIDE).read()": "read outside",
    "os.kill(os.getpid(), 9)": "died",
    "while True: pass": "hang",
    "time.sleep(60)": "hang",
    "bytearray(1 << 40)": "traceback",
    "open(KEPT, 'w'); print('offrl: error: No.', file=sys.stderr); sys.exit(2)": "changed",
    "print('offrl: error: No.', file=sys.stderr); sys.exit(2)": "refused",
    "pass": "success",
    "WRONG": "wrong",
}
SCRIPT = """
import json, os, sys, time
from pathlib import Path
here, place, codes = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
sys.path.insert(0, here)
import judge, offrl.cli.main
OUTSIDE, KEPT = place / "canaries/secret.txt", place / "run/kept"
for file in (OUTSIDE, KEPT):
    file.parent.mkdir()
    file.write_text("x")
judge.CPU_SECONDS, judge.WALL_SECONDS = 1, 20
def act(words):
    exec(words[0]) if words[0] != "WRONG" else None
    return 0
offrl.cli.main.main = act
judges = judge.Judge(place)
cases = [judge.Case([code], "", place / "run", wrong=lambda code=code: code * (code == "WRONG")) for code in codes]
print(json.dumps([judges.judge(case, place).name for case in cases]))
"""


def test_the_judge_sees_every_fault(tmp_path: Path) -> None:
    """Each verdict, on a command that does nothing else than earn it."""
    words = [sys.executable, "-c", SCRIPT, str(HERE), str(tmp_path), json.dumps(list(FAULTS))]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert dict(zip(FAULTS, json.loads(done.stdout))) == FAULTS
