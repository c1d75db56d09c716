"""The conversation on a real terminal: a pseudo-terminal that types keys and reads what appears."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.test_chat import environment

fcntl, pty, termios = (pytest.importorskip(name) for name in ('fcntl', 'pty', 'termios'))
ESCAPES = re.compile(r'\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]|\r')


class Terminal:
    """A process on a pseudo-terminal."""

    def __init__(self, argv: list[str], folder: Path, **env: str) -> None:
        self.main, child = pty.openpty()
        variables = environment(folder, TERM='xterm', PROMPT_TOOLKIT_NO_CPR='1', **env)
        self.process = subprocess.Popen([sys.executable, '-m', 'lmdeploy', *argv], stdin=child, stdout=child,
                                        stderr=child, cwd=folder, env=variables, start_new_session=True,
                                        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))  # Ctrl-C is a signal
        os.close(child)
        self.raw = b''
        self.seen = 0

    def screen(self) -> str:
        return ESCAPES.sub('', self.raw.decode('utf-8', 'replace'))

    def expect(self, text: str, seconds: float = 60) -> str:
        """Wait until ``text`` appears behind what was expected before; returns what came until then."""
        end = time.monotonic() + seconds
        while (found := self.screen().find(text, self.seen)) < 0:
            ready, _, _ = select.select([self.main], [], [], max(0, end - time.monotonic()))
            assert ready, f'no {text!r} on the screen:\n{self.screen()[self.seen:]}'
            try:
                more = os.read(self.main, 65536)
            except OSError:  # Linux says so when the last process has left the terminal
                more = b''
            assert more, f'ended without {text!r}:\n{self.screen()[self.seen:]}'
            self.raw += more
        start, self.seen = self.seen, found + len(text)
        return self.screen()[start:found]

    def type(self, keys: str) -> None:
        os.write(self.main, keys.encode())

    def leave(self) -> int:
        """Read until the process ends; its exit code."""
        while True:
            try:
                if not os.read(self.main, 65536):
                    break
            except OSError:
                break
        return self.process.wait(timeout=60)

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self.main)


@pytest.fixture
def terminal(tmp_path):
    opened = []

    def open_(*argv: str, **env: str) -> Terminal:
        opened.append(Terminal(list(argv), tmp_path, **env))
        return opened[-1]

    yield open_
    for one in opened:
        one.close()


def test_a_conversation(terminal, toy, tmp_path):
    screen = terminal('chat', str(toy), '--max-new-tokens', '6', '--verbose')
    screen.expect('Ready in')
    screen.expect('>>>')
    screen.type('first question\r')
    assert 'tokens' in screen.expect('tokens/s]')
    screen.expect('>>>')
    screen.type('one\x1b\rtwo\r')  # Alt-Enter starts a new line, Enter sends
    screen.expect('...')
    screen.expect('tokens/s]')
    screen.expect('>>>')
    screen.type('/what\r')
    screen.expect('LMD-407')
    screen.expect('>>>')
    screen.type('"""\rin quotes\r"""\r')  # the block is sent when it is closed
    screen.expect('tokens/s]')
    screen.expect('>>>')
    screen.type('/exit\r')
    assert screen.leave() == 0

    history = tmp_path / 'cache' / 'chat_history'
    assert '+first question' in history.read_text()
    assert history.stat().st_mode & 0o077 == 0  # nobody else's to read

    screen = terminal('chat', str(toy), '--max-new-tokens', '4')
    screen.expect('>>>')
    screen.type('\x1b[A\x1b[A')  # what was typed in an earlier session is above
    screen.expect('"""')
    screen.type('\x03')
    screen.expect('Ctrl-D')
    screen.expect('>>>')
    screen.type('\x04')
    assert screen.leave() == 0


def test_ctrl_c_stops_the_answer_and_keeps_the_session(terminal, toy):
    screen = terminal('chat', str(toy), '--max-new-tokens', '30000', '--verbose')
    screen.expect('>>>')
    screen.type('/set ignore_eos=on\r')
    screen.expect('>>>')
    screen.type('go on\r')
    screen.expect('\n')
    time.sleep(1)
    screen.type('\x03')
    screen.expect('[stopped]')
    screen.expect('>>>')
    screen.type('/set max_new_tokens=3\r')
    screen.expect('>>>')
    screen.type('and now?\r')
    screen.expect(' 3 tokens at')
    screen.expect('>>>')
    screen.type('\x04')
    assert screen.leave() == 0


def test_the_ladder_and_chinese(terminal, toy):
    screen = terminal('chat', '--max-new-tokens', '3', LMDEPLOY_LANG='zh')
    ladder = screen.expect('编号或名称')
    assert 'smollm2:135m' in ladder and '演示级' in ladder and 'Apache-2.0' in ladder
    screen.type('99\r')
    screen.expect('请输入 1 到')
    screen.type('hello\r')
    screen.expect('请输入 1 到')
    screen.type(f'{toy}\r')
    screen.expect('就绪')
    screen.expect('>>>')
    screen.type('/help\r')
    screen.expect('清空对话')
    screen.expect('>>>')
    screen.type('end\r')
    screen.expect('对话已清空')
    screen.expect('>>>')
    screen.type('exit\r')
    assert screen.leave() == 0
