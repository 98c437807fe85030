"""The reward `judge`, against a server in this process that speaks as the served ones do."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lowmem_grpo.errors import ConfigError
from lowmem_grpo.rewards.judge import judge_reward
from lowmem_grpo.tasks import Problem

PROBLEMS = [Problem(f"p{i}", ({"role": "user", "content": f"Q{i}?"},), f"A{i}") for i in range(4)]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))
        text = body["messages"][0]["content"]
        code, reply = self.server.answer(text, len(self.server.seen))
        content = {"choices": [{"message": {"content": reply}}]}
        payload = json.dumps(content).encode() if isinstance(reply, str) else b"no JSON"
        self.send_response(code)
        if code == 302:
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/elsewhere")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()


@pytest.fixture
def judged(server, tmp_path):
    def judged(answer, texts, **settings):
        server.answer = answer
        settings = {
            "url": f"http://127.0.0.1:{server.server_port}/v1/",
            "model": "m",
            "prompt": "{question}|{answer}|{completion}|rate from 0 to 10",
            "max_score": 10,
            "retries": 0,
            "timeout": 5,
            **settings,
        }
        path = tmp_path / "judge.toml"
        path.write_text("\n".join(f"{k} = {json.dumps(v)}" for k, v in settings.items()))
        function = judge_reward(str(path))
        problems = PROBLEMS[: len(texts)]
        prompts = [[dict(message) for message in problem.messages] for problem in problems]
        return function(
            completions=texts,
            problems=problems,
            answer=[p.answer for p in problems],
            prompts=prompts,
        )

    return judged


def test_scores_are_read_from_the_replies(judged, server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sesame")
    replies = {"good": "I say 8", "bad": "Rating: 0.", "best": "11/1", "odd": "-3"}
    answer = lambda text, n: (200, replies[text.split("|")[2]])  # noqa: E731
    found = judged(answer, list(replies), api_key_env="JUDGE_KEY")
    assert found == [0.8, 0.0, 1.0, 0.0]
    path, key, body = min(server.seen, key=lambda seen: seen[2]["messages"][0]["content"])
    assert (path, key) == ("/v1/chat/completions", "Bearer sesame")
    assert body["model"] == "m"
    assert body["messages"][0]["content"] == "Q0?|A0|good|rate from 0 to 10"


def test_a_pattern_reads_what_it_matches(judged):
    answer = lambda text, n: (200, "Of 10 points: score=4, that is all 100")  # noqa: E731
    assert judged(answer, ["x"], pattern="score=([0-9]+)") == [0.4]


def test_errors_of_the_server_are_tried_again_and_others_have_no_score(judged, server):
    assert judged(lambda text, n: (503, "") if n == 1 else (200, "5"), ["x"], retries=1) == [0.5]
    assert len(server.seen) == 2
    server.seen.clear()
    (failure,) = judged(lambda text, n: (401, "5"), ["x"], retries=3)
    assert (failure.reason, len(server.seen)) == ("invalid", 1)
    assert "401" in failure.message
    (failure,) = judged(lambda text, n: (200, "no idea"), ["x"])
    assert "no score in the reply 'no idea'" in failure.message
    (failure,) = judged(lambda text, n: (200, None), ["x"])
    assert failure.reason == "invalid"


def test_a_key_is_shown_to_the_server_that_was_named_alone(judged, server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "hf_SECRET\n")  # as it is read out of a file
    assert judged(lambda text, n: (200, "5"), ["x"], api_key_env="JUDGE_KEY") == [0.5]
    assert server.seen[0][1] == "Bearer hf_SECRET"
    server.seen.clear()
    (failure,) = judged(lambda text, n: (302, "5"), ["x"], api_key_env="JUDGE_KEY")
    assert "302" in failure.message
    assert len(server.seen) == 1
    for key in ("hf_SECRET\nHost: elsewhere", "hf_SECRET\u20ac"):
        monkeypatch.setenv("JUDGE_KEY", key)
        with pytest.raises(ConfigError, match="JUDGE_KEY is not one line of ASCII") as caught:
            judged(lambda text, n: (200, "5"), ["x"], api_key_env="JUDGE_KEY")
        assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"retries": 10**30}, "retries is from 0 to 16"),
        ({"timeout": 1e300}, "at most 86400"),
        ({"url": "localhost"}, "http://"),
        ({"prompt": "rate it"}, "no place for the {completion}"),
        ({"prompt": "{completion} {reply}"}, "places are"),
        ({"pattern": "("}, "regular expression"),
        ({"max_score": 0}, "above 0"),
        ({"api_key_env": "NO_SUCH_KEY"}, "no NO_SUCH_KEY"),
        ({"modle": "x"}, "did you mean 'model'"),
        ({"retries": "x"}, "should be of type int"),
        ({"model": ""}, "needs model"),
    ],
)
def test_wrong_files_are_refused(judged, settings, says):
    with pytest.raises(ConfigError) as caught:
        judged(None, ["x"], **settings)
    assert says in str(caught.value)
