"""What we start dies with us, however we end: it is on a leash, whose other end we hold.

Programs that do not watch their stdin while they compute (node) or have none (a browser) would outlive a client that is
killed. On this machine a process stands between us and them:

    python leash.py FD FOLDER COMMAND…

runs a command whose life ends with the file descriptor's other side. When FD ends, or the command does, the command's
whole process group is killed and FOLDER (unless it is "-") removed. Its exit code is the command's, or 128 + the number
of the signal that ended it, as a shell says it. `Leash` is our side of it. On a machine with nothing but `sh` a line
for the shell does the same for one process: `leashed_line`.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence


class Leash:
    """Our end: when it is let go, or when we end, what was started on it is killed.

    Args:
        folder: removed at the end; None: nothing.
    """

    def __init__(self, folder: str | None = None) -> None:
        self._folder = folder or "-"
        self._end: int | None = None

    @contextlib.contextmanager
    def around(self, command: Sequence[str]) -> Iterator[tuple[list[str], tuple[int, ...]]]:
        """What to start instead of a command, and the file descriptors that it must inherit (`pass_fds`).

        It is let go where that cannot be started.
        """
        other_end, self._end = os.pipe()
        try:
            yield [sys.executable, "-P", __file__, str(other_end), self._folder, *command], (other_end,)
        except BaseException:
            self.let_go()
            raise
        finally:
            os.close(other_end)

    def let_go(self) -> None:
        """End what is on it. May be repeated."""
        end, self._end = self._end, None
        if end is not None:
            os.close(end)


def leashed_line(command: Sequence[str], environment: dict[str, str], output: str | None = None) -> str:
    """A shell line that runs a command until it ends, or until the shell's stdin does.

    The command runs beside a `cat` that reads the connection, and dies when that ends.

    Args:
        command: the program and its arguments.
        environment: set for it besides what is there.
        output: file there that takes what it says on both streams, shown when it has ended; None: said at once.
    """
    setting = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
    line = f"{setting} {shlex.join(command)}".strip()
    to_file, show = (f" >{shlex.quote(output)} 2>&1", f"cat {shlex.quote(output)}; ") if output else ("", "")
    return (
        f"exec 3<&0; {line} </dev/null{to_file} & p=$!; "
        "(cat <&3 >/dev/null 2>&1; kill -9 $p) >/dev/null 2>&1 & w=$!; "
        f"wait $p; c=$?; kill $w 2>/dev/null; {show}exit $c"
    )


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
