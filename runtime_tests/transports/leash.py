"""`python leash.py FD FOLDER COMMAND…`: run a command whose life ends with the file descriptor's other side.

Programs that do not watch their stdin while they compute (node) or have none (a browser) would outlive a client that
is killed. This process stands between: when FD ends, or the command does, the command's whole process group is killed
and FOLDER (unless it is "-") removed. Its exit code is the command's,
or 128 + the number of the signal that ended it, as a shell says it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading


def main() -> None:
    """Run; see the module."""
    lifeline, folder, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    os.set_inheritable(lifeline, False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to the client
    process = subprocess.Popen(command, start_new_session=True)

    def watch() -> None:
        while os.read(lifeline, 1):
            pass
        _kill(process.pid)

    threading.Thread(target=watch, daemon=True).start()
    code = process.wait()
    _kill(process.pid)  # what it may have left behind
    if folder != "-":
        for _ in range(20):  # helpers of a browser may still be writing
            shutil.rmtree(folder, ignore_errors=True)
            if not os.path.exists(folder):
                break
            threading.Event().wait(0.1)
    sys.stderr.flush()
    os._exit(code if code >= 0 else 128 - code)


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
