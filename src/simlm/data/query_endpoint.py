"""Queries from a language model behind an OpenAI-compatible endpoint: POST URL/chat/completions, one request a query.

Sources: doc2query (arXiv 1904.08375); prompts for queries of a domain, InPars (arXiv 2202.05144) and Promptagator (arXiv 2209.11755).
Every answer is on disk before the next one is waited for, in `FOLDER/KEY/answers.jsonl`, one JSON line each; KEY is the digest of what an
answer depends on besides the passage (model, prompts, sampling; not the address). So a run that is killed, or repeated with other
settings elsewhere, pays for no answer twice.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from simlm.artifacts import json_digest
from simlm.data.store import hash_bytes
from simlm.errors import EndpointError
from simlm.recipe import EndpointSettings

ANSWERS = "answers.jsonl"
SYSTEM = "You write search queries. Answer with the query alone, on one line, in the language of the passage."
PROMPTS = {
    "ask_question": "Write a question that this passage answers. A person who has not seen the passage asks it, in their own words.",
    "ask_keywords": "Write the few keywords that a person would type into a search box to find this passage.",
    "ask_claim": "Write one short statement of fact that this passage supports or contradicts, in other words than the passage's.",
}
RETRIED_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
LONGEST_WAIT_SECONDS = 60.0
LONGEST_QUERY_WORDS = 40
"""A longer answer is no query: the model has explained itself."""
_REASONING = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
_BULLET = re.compile(r"^(?:[-*]|\d{1,2}[.)])\s+")
_LABEL = re.compile(r"^[*]*(?:(?:search )?query|question|keywords|claim|statement)[*]*\s*:[*]*\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Request:
    """One query to ask for. number: 0, 1 ... of this kind for this passage."""

    kind: str
    passage_id: str
    title: str
    text: str
    number: int = 0


class Endpoint:
    """Asks, keeps and finds answers.

    folder: where answers are kept, beside the artifacts, so that they outlive the step. sleep: how retries wait.
    Raises EndpointError at once if nothing listens at the address, or the key's variable is not set.
    """

    def __init__(self, settings: EndpointSettings, folder: Path, *, seed: int, sleep: Callable[[float], None] = time.sleep) -> None:
        self.settings, self.seed, self._sleep = settings, seed, sleep
        self.num_asked = 0
        """Requests that this object has had answered; the others were there."""
        self._key = _api_key(settings)
        sampling = {"model": settings.model, "temperature": settings.temperature, "max_tokens": settings.max_tokens}
        about = {"system": SYSTEM, "prompts": PROMPTS, "passage_words": settings.passage_words, "seed": seed, **sampling}
        self._file = folder / json_digest(about)[:32] / ANSWERS
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._known = _read_answers(self._file)

    def ask(self, requests: Sequence[Request], on_answer: Callable[[], object] = lambda: None) -> list[str | None]:
        """The query of each request, in their order; None where the answer holds none (empty, or far too long).

        on_answer: called after each new answer. Raises EndpointError when one request has failed `max_tries` times, or is refused; what has
        been answered by then is kept.
        """
        keys = [self._digest(request) for request in requests]
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._known}
        if missing:
            self._reach()
            self._ask_all(missing, on_answer)
        return [query_in(self._known[key]) for key in keys]

    def _ask_all(self, missing: dict[str, Request], on_answer: Callable[[], object]) -> None:
        waiting = list(missing.items())[::-1]
        with open(self._file, "ab") as kept, ThreadPoolExecutor(self.settings.max_parallel) as pool:
            under_way: dict[Future[str], str] = {}
            try:
                while waiting or under_way:
                    while waiting and len(under_way) < self.settings.max_parallel:
                        key, request = waiting.pop()
                        under_way[pool.submit(self._answer, request)] = key
                    done, _ = wait(under_way, return_when=FIRST_COMPLETED)
                    failed: BaseException | None = None
                    for future in done:
                        key = under_way.pop(future)
                        failed = future.exception() or failed
                        if future.exception() is None:
                            self._keep(kept, key, future.result())
                            on_answer()
                    if failed is not None:
                        raise failed
            finally:
                # Requests under way when one fails are paid for too.
                for future, key in under_way.items():
                    if future.exception() is None:
                        self._keep(kept, key, future.result())

    def _keep(self, file: Any, key: str, answer: str) -> None:
        self._known[key] = answer
        self.num_asked += 1
        file.write(json.dumps({"request": key, "answer": answer}, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())

    def _digest(self, request: Request) -> str:
        return json_digest([request.kind, request.number, self._passage(request)])

    def _passage(self, request: Request) -> str:
        words = request.text.split()[: self.settings.passage_words]
        return "\n".join(part for part in (request.title, " ".join(words)) if part)

    def _reach(self) -> None:
        """EndpointError if nothing listens there: said before the first request, not after all its tries."""
        parts = urlsplit(self.settings.url)
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        if urllib.request.getproxies().get(parts.scheme) and not urllib.request.proxy_bypass(host):
            return
        try:
            socket.create_connection((host, port), timeout=min(self.settings.timeout_seconds, 10.0)).close()
        except OSError as error:
            raise EndpointError(
                f"pseudo_queries.endpoint.url: nothing answers at {self.settings.url} ({error}); start the server, or correct the address. "
                "Queries that it has given before are kept"
            ) from None

    def _answer(self, request: Request) -> str:
        """The text of one answer; tried again where that may help."""
        body = {
            "model": self.settings.model,
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": f"{PROMPTS[request.kind]}\n\nPassage:\n{self._passage(request)}"},
            ],
            "temperature": self.settings.temperature,
            "max_tokens": self.settings.max_tokens,
            "seed": hash_bytes(f"{request.kind}/{request.number}/{request.passage_id}".encode(), self.seed) % (1 << 31),
        }
        why = ""
        for tried in range(self.settings.max_tries):
            try:
                return _content(self._post(body), self.settings.url)
            except urllib.error.HTTPError as error:
                said = error.read(300).decode(errors="replace").strip()
                why = f"status {error.code}: {said}"
                if error.code not in RETRIED_STATUS:
                    raise EndpointError(f"{self.settings.url}: refuses the request with {why}; check model, url and api_key_env") from None
                pause = _retry_after(error.headers.get("Retry-After"), 2.0**tried)
            except (OSError, ValueError) as error:  # URLError and timeouts are OSErrors, a broken body is a ValueError
                why, pause = str(error) or type(error).__name__, 2.0**tried
            if tried + 1 < self.settings.max_tries:
                self._sleep(min(pause, LONGEST_WAIT_SECONDS))
        raise EndpointError(
            f"{self.settings.url}: no answer after {self.settings.max_tries} tries, the last failed with {why}; see the server's log, "
            "then run the same command again: what has been answered is kept"
        )

    def _post(self, body: dict[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        request = urllib.request.Request(f"{self.settings.url}/chat/completions", json.dumps(body).encode(), headers, method="POST")
        with urllib.request.urlopen(request, timeout=self.settings.timeout_seconds) as response:
            answer: bytes = response.read()
            return answer


def query_in(answer: str) -> str | None:
    """The query in an answer: its first line with words, without reasoning, bullets, label or quotes; None where there is none."""
    for line in _REASONING.sub("", answer).splitlines():
        query = _LABEL.sub("", _BULLET.sub("", line.strip())).strip("\"'“”`*").strip()
        if re.search(r"\w", query):
            return " ".join(query.split()) if len(query.split()) <= LONGEST_QUERY_WORDS else None
    return None


def _api_key(settings: EndpointSettings) -> str:
    if settings.api_key_env is None:
        return ""
    key = os.environ.get(settings.api_key_env, "")
    if not key:
        raise EndpointError(
            f"pseudo_queries.endpoint.api_key_env: the environment variable {settings.api_key_env} is not set; export it, "
            "or leave api_key_env out for a server without keys"
        )
    return key


def _content(answer: bytes, url: str) -> str:
    try:
        content = json.loads(answer)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        shown = answer[:200].decode(errors="replace")
        raise EndpointError(
            f"{url}: the answer is not one of an OpenAI-compatible endpoint (choices[0].message.content): {shown!r}; check the url"
        ) from None
    return content if isinstance(content, str) else ""


def _retry_after(header: str | None, default: float) -> float:
    try:
        return max(float(header or ""), 0.0)
    except ValueError:
        return default


def _read_answers(file: Path) -> dict[str, str]:
    """Answers kept so far. A last line that a kill has cut short is dropped from the file, so that the next one does not join it."""
    if not file.exists():
        return {}
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with open(file, "r+b") as kept:
            kept.truncate(len(whole))
    answers: dict[str, str] = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            entry = json.loads(line)
            answers[entry["request"]] = entry["answer"]
        except (ValueError, KeyError, TypeError):
            raise EndpointError(f"{file}:{number}: not a kept answer; delete this line, the query is then asked for again") from None
    return answers
