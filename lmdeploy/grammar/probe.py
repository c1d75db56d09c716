"""The process in which grammars are tried out: ``python -m lmdeploy.grammar.probe``.

Reads one grammar a line (JSON ``[kind, text]``), answers each with a line, ``null`` or the reason why it cannot be
used as a JSON text. Ends when its input does, or after a minute without work. It may be killed at any time.
"""

from __future__ import annotations

import json
import select
import sys

from lmdeploy.grammar.automata import load, reason_of

IDLE_SECONDS = 60
MEMORY = 1 << 30  # of address space
CPU_SECONDS = 600  # over its whole life; a single grammar is timed from outside


def main() -> None:
    """Serve until the input ends."""
    load()
    if sys.platform == 'linux':
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print('ready', flush=True)
    while select.select([sys.stdin], [], [], IDLE_SECONDS)[0]:
        line = sys.stdin.readline()
        if not line:
            return
        print(json.dumps(reason_of(line)), flush=True)


if __name__ == '__main__':
    main()
