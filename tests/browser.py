"""Headless Chromium by its DevTools protocol: how a page looks at a width, and what it complains of."""

import asyncio
import base64
import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp

# --no-sandbox: as root Chromium starts no other way; the rest keeps it from looking for its maker's hosts
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-port=0",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class View:
    """What a page is at one width, in one colour scheme."""

    width: int  # document.documentElement.scrollWidth
    inner_width: int  # the window's
    title: str
    complaints: list[str]  # console messages, exceptions, what the policy refused
    requests: list[str]  # URLs asked for
    png: bytes  # the whole page


def look(chromium: str, page: Path, views: Sequence[tuple[int, str]]) -> list[View]:
    """Open a file at each (width, "light" or "dark")."""
    return asyncio.run(_look(chromium, page, views))


async def _look(chromium: str, page: Path, views: Sequence[tuple[int, str]]) -> list[View]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        port_file = Path(folder, "DevToolsActivePort")
        program = [chromium, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
        process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            async with asyncio.timeout(60), aiohttp.ClientSession() as session:
                while not port_file.is_file() or len(port_file.read_text().split()) < 2:
                    await asyncio.sleep(0.05)
                port = port_file.read_text().split()[0]
                async with session.get(f"http://127.0.0.1:{port}/json") as reply:
                    [target] = [each for each in await reply.json() if each["type"] == "page"]
                async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    return [await _view(socket, page, width, scheme) for width, scheme in views]
        finally:
            process.kill()
            process.wait()


async def _view(socket: aiohttp.ClientWebSocketResponse, page: Path, width: int, scheme: str) -> View:
    numbers, events = count(1), []

    async def call(method: str, until: str = "", **parameters: Any) -> dict[str, Any]:
        """Call a method; wait for its answer, and for the event `until` too."""
        number, answer = next(numbers), None
        await socket.send_json({"id": number, "method": method, "params": parameters})
        while answer is None or (until and not any(event["method"] == until for event in events)):
            message = json.loads((await socket.receive()).data)
            if message.get("id") == number:
                answer = message["result"]
            elif "method" in message:
                events.append(message)
        return answer

    for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
        await call(f"{domain}.enable")
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    await call("Emulation.setDeviceMetricsOverride", **metrics)
    await call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    events.clear()
    await call("Page.navigate", until="Page.loadEventFired", url=page.as_uri())
    said = "[document.documentElement.scrollWidth, window.innerWidth, document.title]"
    found = await call("Runtime.evaluate", expression=said, returnByValue=True)
    png = await call("Page.captureScreenshot", captureBeyondViewport=True, format="png")
    kinds = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Audits.issueAdded")
    complaints = [json.dumps(event["params"]) for event in events if event["method"] in kinds]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return View(*found["result"]["value"], complaints, urls, base64.b64decode(png["data"]))
