"""Stand-ins for two of SLURM's programs, with what matters to a batch script: `scontrol show hostnames` names the nodes, `scontrol
requeue` notes the job; `srun` starts its command once a node, hands USR1 on to its tasks, and at TERM kills all that they have
started ("forcing job termination"), as SLURM's does. Both nodes are this machine, under two names."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

NODES = ["127.0.0.1", "localhost"]


def scontrol(words: list[str]) -> int:
    if words[:2] == ["show", "hostnames"]:
        print("\n".join(NODES))
        return 0
    assert words[0] == "requeue"
    file = Path(os.environ["FAKE_SLURM"])
    old = json.loads(file.read_text()) if file.exists() else []
    file.write_text(json.dumps([*old, *words[1:]]))
    return 0


def below(pid: int) -> list[int]:
    """The process and all that it has started."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return [pid, *(p for child in found for p in below(int(child)))]


def srun(words: list[str]) -> int:
    options = {}
    while words[0].startswith("--"):
        name, _, value = words.pop(0)[2:].partition("=")
        options[name] = value
    nodes = options["nodelist"].split(",")
    assert int(options["nodes"]) == int(options["ntasks"]) == len(nodes) and set(nodes) <= set(NODES), options
    with open(os.environ["FAKE_SLURM"] + ".srun", "a") as log:
        log.write(json.dumps({"nodes": nodes, "command": words}) + "\n")
    tasks: list[subprocess.Popen] = []

    def hand_on(number, frame):
        for task in tasks:
            task.send_signal(signal.SIGUSR1)

    def end(number, frame):
        for pid in [p for task in tasks for p in below(task.pid)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    signal.signal(signal.SIGUSR1, hand_on)
    signal.signal(signal.SIGTERM, end)
    for number, node in enumerate(nodes):
        own = {"SLURM_NODEID": str(number), "SLURM_PROCID": str(number), "SLURMD_NODENAME": node}
        tasks.append(subprocess.Popen(words, env=os.environ | own))
    codes = [task.wait() for task in tasks]
    return max(code if code >= 0 else 128 - code for code in codes)


if __name__ == "__main__":
    sys.exit({"srun": srun, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:]))
