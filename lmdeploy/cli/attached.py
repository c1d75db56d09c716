"""``python -m lmdeploy.cli.attached FD PID FOLDER ARGUMENT...``: a command that lives no longer than its parent.

:func:`lmdeploy.serve` starts the server so. FD is an end of a socket pair, PID the parent, FOLDER the one to work in.
If the command fails, its error goes to the parent. When the parent closes its end, or is no more, the command is
interrupted as by Ctrl-C, and killed if it does not end soon.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time

from lmdeploy.cli.entrypoint import main
from lmdeploy.serve.launch import tell

TICK_SECONDS = 1.0  # a process that the parent forked may hold its end open: whether the parent lives is looked at, too
END_SECONDS = 15.0


def watch(sock: socket.socket, parent: int) -> None:
    """Wait for the end of the parent, then end this process."""
    sock.settimeout(TICK_SECONDS)
    while os.getppid() == parent:
        try:
            if not sock.recv(1):
                break
        except TimeoutError:
            continue
        except OSError:
            break
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(END_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def run(argv: list[str]) -> int:
    fd, parent, folder, *command = argv
    os.chdir(folder)
    with socket.socket(fileno=int(fd)) as sock:
        sock.set_inheritable(False)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without
        threading.Thread(target=watch, args=(sock, int(parent)), daemon=True).start()
        return main(command, report=lambda error: sock.sendall(tell(error)))


if __name__ == '__main__':
    sys.exit(run(sys.argv[1:]))
