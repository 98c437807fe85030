"""The reward `judge:FILE.toml`: a score that a served model gives, over HTTP in the form of
OpenAI's chat completions, which vLLM, llama.cpp, Ollama and others speak.

    url = "http://localhost:8000/v1"     what comes before /chat/completions
    model = "name"
    prompt = "...{question}...{answer}...{completion}... Rate it from 0 to 10."
    max_score = 10.0                     the score is divided by this, and cut to [0, 1]
    pattern = "Rating: ([0-9.]+)"        what to read of the reply; its last number if left out
    api_key_env = "JUDGE_KEY"            the environment variable with the key, if it needs one
    timeout = 30.0                       seconds for one request
    retries = 2                          after errors of the network or the server, 1, 2, 4 s apart
    concurrency = 8                      requests at once
    max_tokens = 512
    temperature = 0.0

The questions go out of a child process that has the network and may write nothing; what comes back
is read as one number. A request that fails for good, and a reply without a number, has no score.
The key is read there and written nowhere.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from lowmem_grpo.errors import ConfigError, nearest
from lowmem_grpo.isolation.confine import Limits
from lowmem_grpo.isolation.worker import Worker
from lowmem_grpo.rewards.base import RewardFunction
from lowmem_grpo.rewards.isolated import Isolated, answering
from lowmem_grpo.tasks.answers import last_number
from lowmem_grpo.tasks.messages import question
from lowmem_grpo.text_files import read_text

__all__ = ["Judge", "judge_reward", "make_judge"]

_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
_MOST_REPLY, _MOST_SECONDS = 2**22, 86_400
_PLACES = ("question", "answer", "completion")


@dataclass(frozen=True)
class Judge:
    """See the module."""

    url: str
    model: str
    prompt: str
    max_score: float = 1.0
    pattern: str | None = None
    api_key_env: str | None = None
    timeout: float = 30.0
    retries: int = 2
    concurrency: int = 8
    max_tokens: int = 512
    temperature: float = 0.0


class _Here(urllib.request.HTTPRedirectHandler):
    """The key is for the server that was named, and for none that it names."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_Here)


def judge_reward(path: str) -> RewardFunction:
    """The reward function that the file at `path` describes. Raises `ConfigError`."""
    judge = _read(path)
    # Every request may take its time and all its retries, with so many at once.
    each = (judge.retries + 1) * judge.timeout + 2.0**judge.retries
    worker = Worker("lowmem_grpo.rewards.judge:make_judge", asdict(judge), Limits(network=True))
    return Isolated(worker, each, together=judge.concurrency, apart=True)


def make_judge(**settings: Any) -> Callable[..., list | str]:
    """The child's side."""
    judge = Judge(**settings)

    def ask_all(completions: list[str], answer: list[str], prompts: list, **_: Any) -> list:
        asked = [
            judge.prompt.format(question=question(messages), answer=wanted, completion=text)
            for messages, wanted, text in zip(prompts, answer, completions, strict=True)
        ]
        with ThreadPoolExecutor(judge.concurrency) as threads:
            return list(threads.map(lambda prompt: _score(judge, prompt), asked))

    return answering(ask_all)


def _score(judge: Judge, prompt: str) -> float | str:
    """A score, or in words why there is none, which is then an invalid value."""
    try:
        reply = _ask(judge, prompt)
        if judge.pattern:
            found = re.findall(judge.pattern, reply)
            reply = found[-1] if found else ""
        number = last_number(reply)
        if number is not None:
            return min(1.0, max(0.0, float(number) / judge.max_score))
    except (OSError, ValueError, LookupError, TypeError, OverflowError) as error:
        return f"{type(error).__name__}: {error}"
    return f"no score in the reply {reply[:100]!r}"


def _ask(judge: Judge, prompt: str) -> str:
    body = {
        "model": judge.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": judge.max_tokens,
        "temperature": judge.temperature,
    }
    headers = {"Content-Type": "application/json"}
    if judge.api_key_env:
        headers["Authorization"] = f"Bearer {os.environ[judge.api_key_env].strip()}"
    url = judge.url.rstrip("/") + "/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    for attempt in range(judge.retries + 1):
        try:
            with _OPENER.open(request, timeout=judge.timeout) as response:
                reply = json.loads(response.read(_MOST_REPLY))
            return reply["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            if error.code not in _AGAIN or attempt == judge.retries:
                raise
        except OSError:
            if attempt == judge.retries:
                raise
        time.sleep(2.0**attempt)
    raise AssertionError("the last attempt returns or raises")


def _read(path: str) -> Judge:
    where = f"reward 'judge:{path}'"
    if not path:
        raise ConfigError("reward 'judge' needs a file: write judge:FILE.toml")
    try:
        given = tomlkit.parse(read_text(os.path.expanduser(path))).unwrap()
    except OSError as error:
        raise ConfigError(f"{where}: cannot read it: {error.strerror}") from error
    except (TOMLKitError, ValueError) as error:
        raise ConfigError(f"{where} is not valid TOML: {error}") from error
    known = {field.name: field for field in fields(Judge)}
    for name, value in given.items():
        if name not in known:
            raise ConfigError(f"{where}: unknown key '{name}'{nearest(name, known)}")
        wanted = known[name].type.partition(" ")[0]
        taken = {"float": (int, float), "int": (int,), "str": (str,)}[wanted]
        if not isinstance(value, taken) or isinstance(value, bool):
            raise ConfigError(f"{where}: {name} = {value!r} should be of type {wanted}")
    for name in ("url", "model", "prompt"):
        if not given.get(name):
            raise ConfigError(f"{where} needs {name}")
    judge = Judge(**given)
    _check(judge, where)
    return judge


def _check(judge: Judge, where: str) -> None:
    if not judge.url.startswith(("http://", "https://")):
        raise ConfigError(f"{where}: url = {judge.url!r} should begin with http:// or https://")
    if not (0 < judge.max_score < math.inf and 0 < judge.timeout <= _MOST_SECONDS):
        raise ConfigError(
            f"{where}: max_score is above 0 and finite, timeout above 0 and at most {_MOST_SECONDS}"
        )
    if not (0 <= judge.retries <= 16 and 1 <= judge.concurrency <= 1024 and judge.max_tokens > 0):
        raise ConfigError(
            f"{where}: retries is from 0 to 16, concurrency from 1 to 1024, max_tokens above 0"
        )
    if not 0 <= judge.temperature < math.inf:
        raise ConfigError(f"{where}: temperature is 0 or more, and finite")
    try:
        shown = judge.prompt.format(**dict.fromkeys(_PLACES, "x"))
        re.compile(judge.pattern or "")
    except (KeyError, IndexError, ValueError, re.error) as error:
        raise ConfigError(
            f"{where}: {error!r}: the prompt's places are {{question}}, {{answer}}, {{completion}} "
            "(other braces are doubled), and pattern is a regular expression"
        ) from error
    if "{completion}" not in judge.prompt or shown == judge.prompt:
        raise ConfigError(f"{where}: prompt has no place for the {{completion}}")
    if judge.api_key_env and judge.api_key_env not in os.environ:
        raise ConfigError(f"{where}: the environment has no {judge.api_key_env}, set it first")
    key = os.environ[judge.api_key_env].strip() if judge.api_key_env else ""
    if not (key.isascii() and key.isprintable()):
        # Not sent: the error that this would be shows the key.
        raise ConfigError(f"{where}: the key in {judge.api_key_env} is not one line of ASCII")
