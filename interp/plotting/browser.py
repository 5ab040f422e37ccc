"""One headless browser per process for PNG files, through kaleido.

Kaleido starts a browser for every call unless a server runs, and its own server never returns when the browser fails to
start. Here one browser is started on the first figure, in its own thread and event loop (so that it also works inside
Jupyter's), with a time limit on everything, and is closed when Python exits.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from pathlib import Path
from typing import Any

START_TIMEOUT = 60.0  # seconds; a cold start on two busy cores takes a few
RENDER_TIMEOUT = 90.0


class BrowserError(RuntimeError):
    """The browser could not be started, or has died."""


def find_browser() -> str | None:
    """Path of the browser that kaleido would use (`BROWSER_PATH`, then Chrome, Chromium, Edge, ...), or None.

    None also where kaleido is not installed.
    """
    try:
        from choreographer.browsers.chromium import Chromium
    except ImportError:
        return None
    path = Chromium.find_browser(skip_local=False)
    return str(path) if path and Path(path).is_file() else None


def render(figure: dict[str, Any], *, width: int, height: int, scale: float) -> bytes:
    """PNG bytes of a plotly figure given as a dictionary.

    Raises:
        BrowserError: If the browser does not start or does not answer; errors of the figure itself come as they are.
    """
    kaleido = _running()
    options = {"format": "png", "width": width, "height": height, "scale": scale}
    return kaleido.call(kaleido.browser.calc_fig(figure, options), RENDER_TIMEOUT)


def close() -> None:
    """Close the browser if one is running; the next `render` starts another."""
    global _shared
    with _lock:
        if _shared is not None and _shared.pid == os.getpid():
            _shared.close()
        _shared = None


class _Shared:
    """A kaleido browser and the event loop it lives in."""

    def __init__(self) -> None:
        import kaleido

        self.pid = os.getpid()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="interp-kaleido", daemon=True)
        self.thread.start()
        try:
            # mathjax is off: kaleido would load it from a network address, and labels here never are formulas
            self.browser = self.call(_make(kaleido.Kaleido), START_TIMEOUT)
            self.call(self.browser.open(), START_TIMEOUT)
        except BaseException:
            self._stop_loop()
            raise

    def call(self, coroutine: Any, timeout: float) -> Any:
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return future.result(timeout)
        except TimeoutError as error:
            future.cancel()
            raise BrowserError(f"the browser at {find_browser()} did not answer within {timeout:g} s") from error

    def close(self) -> None:
        try:
            self.call(self.browser.close(), 15)
        finally:
            self._stop_loop()

    def _stop_loop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)
        if not self.loop.is_running():
            self.loop.close()


async def _make(kaleido_class: Any) -> Any:
    return kaleido_class(mathjax=False, timeout=RENDER_TIMEOUT)  # its queues must be made inside the loop


_lock = threading.Lock()
_shared: _Shared | None = None


def _running() -> _Shared:
    global _shared
    with _lock:
        if _shared is None or _shared.pid != os.getpid():  # a forked child has no copy of the thread
            try:
                _shared = _Shared()
            except Exception as error:
                raise BrowserError(f"the browser at {find_browser()} did not start: {error}") from error
            atexit.register(close)
        return _shared
