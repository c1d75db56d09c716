"""A headless Chromium, driven over its DevTools protocol: what a reader does with mouse and keyboard, and what is seen.

The protocol: https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from websockets.sync.client import connect

EXECUTABLE = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
FLAGS = ('--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
         '--disable-background-networking', '--disable-component-update', '--disable-dev-shm-usage',
         '--remote-debugging-port=0', '--remote-allow-origins=*', '--lang=en')
SECONDS = 30.0  # a busy machine
KEYS = {'Enter': (13, '\r'), 'Escape': (27, ''), 'Tab': (9, ''), 'ArrowRight': (39, ''), 'ArrowLeft': (37, '')}


class Page:
    """One tab.

    Attributes:
        problems: texts of uncaught errors, and of what the content security policy has stopped.
        requested: addresses of all requests.
    """

    def __init__(self, socket) -> None:
        self._socket = socket
        self._last = 0
        self.problems: list[str] = []
        self.requested: list[str] = []
        for domain in ('Page', 'Runtime', 'Log', 'Network'):
            self.send(f'{domain}.enable')
        self.send('Emulation.setFocusEmulationEnabled', enabled=True)

    def send(self, method: str, **params) -> dict:
        """One command, and its result."""
        self._last += 1
        self._socket.send(json.dumps({'id': self._last, 'method': method, 'params': params}))
        while True:
            message = json.loads(self._socket.recv(timeout=SECONDS))
            if message.get('id') == self._last:
                assert 'error' not in message, (method, message['error'])
                return message['result']
            self._note(message.get('method'), message.get('params', {}))

    def _note(self, event: str | None, params: dict) -> None:
        if event == 'Runtime.exceptionThrown':
            self.problems.append(json.dumps(params['exceptionDetails'])[:1000])
        elif event == 'Log.entryAdded' and params['entry']['source'] in ('security', 'javascript', 'violation'):
            self.problems.append(params['entry']['text'])
        elif event == 'Network.requestWillBeSent':
            self.requested.append(params['request']['url'])

    def open(self, url: str) -> None:
        self.send('Page.navigate', url=url)
        self.wait('document.readyState === "complete"')

    def js(self, expression: str):
        """The value of an expression, awaited if it is a promise."""
        result = self.send('Runtime.evaluate', expression=expression, returnByValue=True, awaitPromise=True)
        assert 'exceptionDetails' not in result, (expression, result['exceptionDetails'])
        return result['result'].get('value')

    def wait(self, condition: str) -> None:
        """Wait for an expression to be true."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            if self.js(f'Boolean({condition})'):
                return
            time.sleep(0.05)
        raise AssertionError(f'{condition} stays false; the page shows: {self.js("document.body.innerText")}')

    def text(self, selector: str) -> str:
        """What is shown of the first element."""
        return self.js(f'document.querySelector({json.dumps(selector)}).innerText')

    def place(self, selector: str) -> tuple[float, float]:
        """The middle of an element's first box, in the window."""
        return tuple(self.js(f"""(() => {{
            const node = document.querySelector({json.dumps(selector)});
            node.scrollIntoView({{block: 'nearest'}});
            const box = node.getClientRects()[0];
            return [box.x + box.width / 2, box.y + box.height / 2];
        }})()"""))

    def hover(self, selector: str) -> None:
        x, y = self.place(selector)
        self.send('Input.dispatchMouseEvent', type='mouseMoved', x=x, y=y)

    def click(self, selector: str) -> None:
        x, y = self.place(selector)
        for kind in ('mousePressed', 'mouseReleased'):
            self.send('Input.dispatchMouseEvent', type=kind, x=x, y=y, button='left', clickCount=1)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.send('Input.insertText', text=text)

    def key(self, name: str) -> None:
        code, text = KEYS[name]
        for kind in ('keyDown', 'keyUp'):
            self.send('Input.dispatchKeyEvent', type=kind, key=name, code=name, windowsVirtualKeyCode=code,
                      **({'text': text} if text and kind == 'keyDown' else {}))

    def size(self, width: int, height: int, *, scale: float = 1, mobile: bool = False) -> None:
        self.send('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=scale,
                  mobile=mobile)
        self.send('Emulation.setTouchEmulationEnabled', enabled=mobile)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send('Page.captureScreenshot', format='png')['data']))


@contextmanager
def browse(folder: Path):
    """A browser with an empty profile in ``folder``; yields its :class:`Page`."""
    assert EXECUTABLE is not None
    with (folder / 'chromium.log').open('wb') as log:
        process = subprocess.Popen([EXECUTABLE, *FLAGS, f'--user-data-dir={folder / "profile"}', 'about:blank'],
                                   stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        with connect(_tab(folder, process), max_size=None, open_timeout=SECONDS) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _tab(folder: Path, process: subprocess.Popen) -> str:
    """The address of the first tab; the browser writes its port into its profile."""
    file = folder / 'profile' / 'DevToolsActivePort'
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if file.exists() and len(lines := file.read_text().split()) == 2:
            with urllib.request.urlopen(f'http://127.0.0.1:{lines[0]}/json/list', timeout=SECONDS) as response:
                tabs = [tab for tab in json.load(response) if tab['type'] == 'page']
            if tabs:
                return tabs[0]['webSocketDebuggerUrl']
        time.sleep(0.05)
    raise AssertionError(f'Chromium did not start: {(folder / "chromium.log").read_text(errors="replace")[-2000:]}')
