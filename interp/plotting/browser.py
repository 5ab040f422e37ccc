"""One headless browser per process for PNG files, through kaleido.

Kaleido starts a browser for every call unless a server runs, and its own server never returns when the browser fails to
start. Here one browser is started on the first figure, in its own thread and event loop (so that it also works inside
Jupyter's), with a time limit on everything, and is closed when Python exits.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import os
import threading
from contextlib import suppress
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


def render(figure: dict[str, Any], *, width: int, height: int, scale: float | int) -> bytes:
    """PNG bytes of a plotly figure given as a dictionary.

    Raises:
        BrowserError: If the browser does not start or does not answer; errors of the figure itself come as they are.
    """
    from choreographer import errors

    shared = _running()
    options = {"format": "png", "width": width, "height": height, "scale": scale}
    try:
        return shared.call(shared.browser.calc_fig(figure, options), RENDER_TIMEOUT + 10)
    except (errors.ChannelClosedError, errors.BrowserClosedError, errors.BrowserFailedError) as error:
        raise BrowserError(f"the browser at {find_browser()} stopped while drawing: {error}") from error


def close() -> None:
    """Close the browser if one is running and forget failed starts; the next `render` starts another."""
    with _lock:
        _failed.clear()
        _drop()


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

    def call(self, coroutine: Any, timeout: float | int) -> Any:
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return future.result(timeout)
        except (TimeoutError, asyncio.TimeoutError, concurrent.futures.TimeoutError) as error:  # one class from 3.11
            future.cancel()
            raise BrowserError(f"the browser at {find_browser()} did not answer within {timeout:g} s") from error

    def alive(self) -> bool:
        # a forked child has no copy of the thread
        return self.pid == os.getpid() and self.browser.subprocess.poll() is None

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
_failed: dict[str | None, str] = {}  # browsers that did not start, so that not every figure waits for one again


def _running() -> _Shared:
    global _shared
    with _lock:
        path = find_browser()
        if path in _failed:
            raise BrowserError(_failed[path])
        if _shared is None or not _shared.alive():
            _drop()
            try:
                _shared = _Shared()
            except Exception as error:
                _failed[path] = f"the browser at {path} did not start: {error.args[0] if error.args else error!r}"
                raise BrowserError(_failed[path]) from error
            atexit.register(close)
        return _shared


def _drop() -> None:
    """Let go of the browser, also if it died; the lock must be held."""
    global _shared
    shared, _shared = _shared, None
    if shared is not None and shared.pid == os.getpid():
        with suppress(Exception):  # a browser that died cannot be closed in order
            shared.close()
