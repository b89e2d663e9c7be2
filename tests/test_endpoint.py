"""Asking a language model behind an OpenAI-compatible interface: against a server in this process that can misbehave in every way."""

import json
import logging
import random
import threading
import time
from collections import Counter
from dataclasses import asdict, replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import pytest

from limbeck.endpoint import Endpoint, EndpointSettings, Request
from limbeck.endpoint.pace import Pace, retry_after, wait_before
from limbeck.errors import UserError

pytest.importorskip("openai")

KEY = "sk-very-secret-0123456789"


class Fake(ThreadingHTTPServer):
    """Answers `you said: <prompt>`, unless `rule(prompt, number of the try)` says otherwise.

    A rule returns None for the usual answer, bytes to send as they are with 200, "drop" to hang up, a dict merged into the reply, or
    (status, headers, body).
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.rule = lambda prompt, times: None
        self.models = ["tiny", "tiny-chat", "large"]
        self.asked, self.bodies, self.keys, self.listed = [], [], [], 0
        self.guard = threading.Lock()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, headers, body):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        self.server.listed += 1
        if self.path != "/v1/models" or self.server.models is None:
            return self.reply(404, {}, {"error": {"message": "nothing here"}})
        return self.reply(200, {}, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.server.models]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        chat = self.path.endswith("/chat/completions")
        prompt = body["messages"][-1]["content"] if chat else body["prompt"]
        with self.server.guard:
            self.server.asked.append(prompt)
            self.server.bodies.append(body)
            self.server.keys.append(self.headers["Authorization"])
            times = self.server.asked.count(prompt)
        said = self.server.rule(prompt, times)
        if said == "drop":
            self.close_connection = True
            return self.connection.close()
        if isinstance(said, bytes):
            return self.reply(200, {}, said)
        if isinstance(said, tuple):
            return self.reply(*said)
        text = f"you said: {prompt}"
        choice = {"index": 0, "finish_reason": "stop", **({"message": {"role": "assistant", "content": text}} if chat else {"text": text})}
        choice |= (said or {}).get("choice", {})
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(text), "total_tokens": 0}
        return self.reply(200, {}, {"id": "x", "object": "y", "choices": [choice], "usage": usage} | (said or {}).get("reply", {}))


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Fake()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


class Clock:
    """Time that passes only when somebody sleeps; the sleeps are kept."""

    def __init__(self):
        self.now, self.sleeps, self.guard = 0.0, [], threading.Lock()

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        with self.guard:
            self.now += seconds
            self.sleeps.append(seconds)


@pytest.fixture
def make(fake, tmp_path):
    """An endpoint on the fake server; its clock is `endpoint.clock`."""

    def made(log="log.jsonl", **settings):
        clock = Clock()
        address = settings.pop("base_url", fake.address)
        endpoint = Endpoint(EndpointSettings(address, "tiny", **settings), tmp_path / log, clock=clock, sleep=clock.sleep)
        endpoint.clock = clock
        return endpoint

    return made


def questions(count, word="q"):
    return [Request(f"id{n}", f"{word}{n}") for n in range(count)]


def test_answers_come_in_order_and_each_question_is_asked_once(make, fake):
    requests = [*questions(12), Request("again", "q3")]
    seen = []
    endpoint = make()
    answers = endpoint.ask(requests, progress=lambda done, total: seen.append((done, total)))
    assert [a.text for a in answers] == [f"you said: {r.prompt}" for r in requests] and [a.id for a in answers] == [r.id for r in requests]
    assert answers[0].prompt_tokens == 2 and answers[0].completion_tokens == 12 and answers[0].finish_reason == "stop"
    assert Counter(fake.asked) == {f"q{n}": 1 for n in range(12)}
    assert seen[0] == (0, 13) and seen[-1] == (13, 13) and seen == sorted(seen)
    assert endpoint.ask(requests) == make().ask(requests) == answers and len(fake.asked) == 12


def test_only_what_is_missing_is_asked_by_a_later_run(make, fake):
    make().ask(questions(3))
    make().ask([Request("other name", "q1"), *questions(5)])
    assert sorted(fake.asked) == ["q0", "q1", "q2", "q3", "q4"]


@pytest.mark.parametrize(
    "change",
    [{"temperature": 0.5}, {"top_p": 0.9}, {"max_tokens": 7}, {"stop": "x"}, {"seed": 1}, {"system": "be kind"}, {"logprobs": 2},
     {"chat": False}, {"temperature": None}],
)  # fmt: skip
def test_a_setting_that_decides_the_answer_asks_again(make, fake, change):
    make().ask(questions(1))
    make(**change).ask(questions(1))
    make(**change).ask(questions(1))
    assert len(fake.asked) == 2


def test_settings_that_do_not_decide_the_answer_do_not_ask_again(make, fake):
    make().ask(questions(1))
    other = {"concurrency": 9, "timeout": 3.0, "retries": 1, "price_input": 1.0, "requests_per_minute": 6.0, "key_env": "OTHER_KEY"}
    make(**other, token_limit_name="max_completion_tokens").ask(questions(1))
    make(base_url=fake.address.replace("//", "//me:hush@") + "/").ask(questions(1))
    assert len(fake.asked) == 1


def test_what_is_sent(make, fake):
    make(system="be kind", stop=("a", "b"), seed=4, logprobs=2, max_tokens=9).ask([Request("a", "hello")])
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    assert fake.bodies[-1] == {
        "model": "tiny", "messages": messages, "max_tokens": 9, "temperature": 0.0, "top_p": 1.0, "stop": ["a", "b"], "seed": 4,
        "logprobs": True, "top_logprobs": 2,
    }  # fmt: skip
    make(temperature=None, top_p=None, token_limit_name="max_completion_tokens").ask([Request("a", [{"role": "user", "content": "hi"}])])
    assert fake.bodies[-1] == {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 256}
    make(chat=False, logprobs=3).ask([Request("a", "hello")])
    assert fake.bodies[-1] == {"model": "tiny", "prompt": "hello", "max_tokens": 256, "temperature": 0.0, "top_p": 1.0, "logprobs": 3}


def test_log_probabilities_of_both_interfaces_survive_the_log(make, fake):
    top = [{"token": "a", "logprob": -0.1}, {"token": "b", "logprob": -2.5}]
    entry = {"token": "a", "logprob": -0.1, "bytes": [97], "top_logprobs": top}
    fake.rule = lambda prompt, times: {"choice": {"logprobs": {"content": [entry]}}}
    expected = [("a", -0.1, (("a", -0.1), ("b", -2.5)))]
    assert make(logprobs=2).ask(questions(1))[0].logprobs == expected == make(logprobs=2).ask(questions(1))[0].logprobs
    plain = {"tokens": ["a"], "token_logprobs": [-0.1], "top_logprobs": [{"a": -0.1, "b": -2.5}], "text_offset": [0]}
    fake.rule = lambda prompt, times: {"choice": {"logprobs": plain}}
    answer = make(logprobs=2, chat=False).ask(questions(1))[0]
    assert answer.logprobs == expected and answer.logprobs[0].top[1] == ("b", -2.5)


def test_passing_troubles_are_repeated_with_growing_waits(make, fake):
    troubles = [(500, {}, {"error": {"message": "oops"}}), "drop", b'{"choices": [', b'{"choices": []}', (503, {}, b"busy")]
    fake.rule = lambda prompt, times: troubles[times - 1] if times <= 5 else None
    endpoint = make(concurrency=1)
    assert endpoint.ask(questions(1))[0].text == "you said: q0" and len(fake.asked) == 6
    assert len(endpoint.clock.sleeps) == 5 and all(2**n / 2 <= wait <= 2**n for n, wait in enumerate(endpoint.clock.sleeps))


def test_a_slow_server_is_a_timeout_and_is_asked_again(make, fake):
    fake.rule = lambda prompt, times: time.sleep(0.6) if times == 1 else None
    assert make(timeout=0.2, retries=1).ask(questions(1))[0].text == "you said: q0"
    fake.rule = lambda prompt, times: time.sleep(0.4)
    with pytest.raises(UserError, match=r"did not answer within 0\.1 seconds.*raise timeout"):
        make(timeout=0.1, retries=0).ask(questions(1, "slow"))


def test_retry_after_is_honoured(make, fake):
    fake.rule = lambda prompt, times: (429, {"Retry-After": "17"}, {"error": {"message": "slow down"}}) if times == 1 else None
    endpoint = make(concurrency=1)
    endpoint.ask(questions(1))
    assert 17 <= endpoint.clock.now < 18 and len(fake.asked) == 2


@pytest.mark.parametrize(
    ("reply", "words", "asked"),
    [
        ((429, {}, {"error": {"message": "slow down"}}), r"HTTP 429.*after all retries: slow down.*lower requests_per_minute", 3),
        ((429, {"Retry-After": "86400"}, b""), "asks to wait 86400 seconds", 1),
        ((429, {}, {"error": {"message": "no", "code": "insufficient_quota"}}), "nothing left.*add credit", 1),
        ((401, {}, {"error": {"message": f"wrong key {KEY}"}}), r"does not accept the key \(HTTP 401\).*OPENAI_API_KEY", 1),
        ((403, {}, b"no"), r"does not allow this \(HTTP 403\).*OPENAI_API_KEY", 1),
        ((400, {}, {"error": {"message": "too long"}}), "refuses a request.*too long.*first: request 'id0'", 1),
        ((400, {}, {"error": {"message": "use max_completion_tokens"}}), 'set token_limit_name="max_completion_tokens"', 1),
        ((500, {}, b"<html>"), "HTTP 500.*server's log", 3),
        (b"<html>hello</html>", "web page, not JSON.*ends in /v1", 3),
        (b'{"choices": [{"message": {"content": 3}}]}', "the answer is not text", 3),
        (b'{"choices": [{"message": {"role": "assistant", "content": "a"}, "finish_reason": 3}]}', "finish_reason is not text", 3),
        (b'{"choices": [{"message": {"content": "a"}}], "usage": {"prompt_tokens": -1}}', "usage.prompt_tokens is not a count", 3),
        (b'{"choices": [{"message": {"content": "a"}, "logprobs": {"content": [{"token": "a"}]}}]}', "logprobs are not well formed", 3),
        (b'{"choices": [{"message": {"content": "a"}, "logprobs": {"content": [{"token": "a", "logprob": NaN}]}}]}', "not JSON", 3),
        (b'{"error": {"message": "model is asleep"}}', "the reply is an error: model is asleep", 3),
        (b'{"choices": [{"message": {}}]}', "the reply has no message", 3),
        (b"[1]", "not a JSON object", 3),
        (b"[" * 100000, "not JSON", 3),
        ("drop", "no connection to http://127.0.0.1", 3),
    ],
)
def test_lasting_troubles_are_one_clear_line(make, fake, reply, words, asked):
    fake.rule = lambda prompt, times: reply
    with pytest.raises(UserError, match=words) as caught:
        make(retries=2).ask(questions(1))
    assert KEY not in str(caught.value) and "\n" not in str(caught.value) and caught.value.hint
    assert "1 of 1 requests are not answered" in str(caught.value) and len(fake.asked) == asked


def test_a_missing_key_is_named_by_its_variable(make, fake, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    fake.rule = lambda prompt, times: (401, {}, b"")
    with pytest.raises(UserError, match="set the environment variable OPENAI_API_KEY to your key; it is not set"):
        make().ask(questions(1))
    monkeypatch.setenv("OPENAI_API_KEY", "two\nlines")
    with pytest.raises(UserError, match="OPENAI_API_KEY holds characters that no key has") as caught:
        make().ask(questions(1))
    assert "two" not in str(caught.value)


def test_a_server_that_is_down(make, fake, tmp_path):
    make().ask(questions(2))
    fake.shutdown()
    fake.server_close()
    endpoint = make(concurrency=2, retries=1)
    with pytest.raises(UserError, match=r"no connection to .*; 298 of 300 requests are not answered.*the other 2 are kept"):
        endpoint.ask(questions(300))
    assert len(endpoint.clock.sleeps) < 200  # it did not try them all
    with pytest.raises(UserError, match=r"no connection to .*check that the server runs"):
        endpoint.probe()


def test_a_setting_that_every_request_is_refused_for_ends_the_job(make, fake):
    fake.rule = lambda prompt, times: (400, {}, {"error": {"message": "temperature is not allowed"}})
    with pytest.raises(UserError, match="temperature is not allowed; 500 of 500 requests are not answered"):
        make().ask(questions(500))
    assert len(fake.asked) < 30


def test_a_model_that_is_not_there_and_a_wrong_address(make, fake):
    fake.models = ["large", "tiny-chat"]
    fake.rule = lambda prompt, times: (404, {}, {"error": {"message": "no such model"}})
    with pytest.raises(UserError, match=r"does not have the model 'tiny'.*it offers 2: tiny-chat"):
        make().ask(questions(3))
    fake.models = ["tiny"]
    with pytest.raises(UserError, match=r"has the model tiny and no /chat/completions.*try chat=False"):
        make().ask(questions(3))
    fake.models = None
    with pytest.raises(UserError, match=r"404.*usually ends in /v1"):
        make().ask(questions(3))
    with pytest.raises(UserError, match="no list of models"):
        make().probe()


def test_probe_lists_the_models_with_one_request(make, fake):
    assert make().probe() == ["large", "tiny", "tiny-chat"] and fake.listed == 1 and not fake.asked


def test_half_a_batch_failing_keeps_the_other_half(make, fake):
    fake.rule = lambda prompt, times: (500, {}, b"") if int(prompt[1:]) < 10 else None
    words = r"10 of 20 requests are not answered: .*HTTP 500.*the other 10 are kept in .*log\.jsonl; running again asks only"
    with pytest.raises(UserError, match=words):
        make(retries=1).ask(questions(20))
    asked = len(fake.asked)
    fake.rule = lambda prompt, times: None
    assert len(make().ask(questions(20))) == 20 and Counter(fake.asked[asked:]) == {f"q{n}": 1 for n in range(10)}


def test_an_error_that_repeats_a_secret_is_blotted_out(make, fake):
    fake.rule = lambda prompt, times: (400, {}, {"error": {"message": f"bad {KEY} for hush"}})
    with pytest.raises(UserError, match=r"bad \*\*\* for \*\*\*"):
        make(base_url=fake.address.replace("//", "//me:hush@")).ask(questions(1))


def test_the_key_and_the_password_appear_nowhere(make, fake, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    endpoint = make(base_url=fake.address.replace("//", "//me:hu%40sh@"), retries=0)
    endpoint.ask(questions(2))
    fake.rule = lambda prompt, times: (401, {}, {"error": {"message": KEY}}) if prompt == "z0" else "drop"
    fields = asdict(endpoint.settings)
    said = [caplog.text, repr(endpoint), repr(endpoint.settings), repr(fields), json.dumps(fields, default=str)]
    for word in ("z", "y"):
        with pytest.raises(UserError) as caught:
            endpoint.ask(questions(1, word))
        said.append(f"{caught.value!r} {caught.value} {caught.value.__cause__} {caught.value.__context__}")
    fake.rule = lambda prompt, times: None
    plain = make(log="plain.jsonl")
    plain.ask(questions(1))
    said += [repr(plain), caplog.text, *(path.read_text() for path in tmp_path.iterdir())]
    assert fake.keys[0] == "Basic bWU6aHVAc2g=" and fake.keys[-1] == f"Bearer {KEY}"
    for text in said:
        assert not any(secret in text for secret in (KEY, "hu@sh", "hu%40sh", "bWU6aHVAc2g="))
    assert replace(endpoint.settings, seed=1).credentials == endpoint.settings.credentials


def test_empty_answers_are_kept_and_only_too_many_are_an_error(make, fake):
    empty = {"choice": {"message": {"role": "assistant", "content": None}, "finish_reason": "length"}}
    fake.rule = lambda prompt, times: empty if int(prompt[1:]) < 2 else None
    answers = make().ask(questions(4))
    assert [a.empty for a in answers] == [True, True, False, False] and answers[0].finish_reason == "length"
    with pytest.raises(UserError, match=r"2 of 4 answers of tiny are empty .*2 times 'length'"):
        make(most_empty=0.4).ask(questions(4))
    with pytest.raises(UserError, match="2 of 2 answers"):
        make(most_empty=1.0).ask(questions(2))
    assert len(fake.asked) == 4


def test_estimate_before_anything_is_sent(make, fake):
    endpoint = make(price_input=3.0, price_output=10.0, max_tokens=100, requests_per_minute=30.0)
    requests = [*questions(4, "x" * 29), Request("again", "x" * 29 + "0")]
    estimate = endpoint.estimate(requests)
    assert (estimate.requests, estimate.already_answered, estimate.to_ask) == (5, 0, 4)
    assert estimate.prompt_tokens == 4 * (10 + 4) and estimate.most_completion_tokens == 400
    assert estimate.cost == pytest.approx((56 * 3 + 400 * 10) / 1e6) and estimate.seconds == 8.0 and not fake.asked

    class Letters:
        def encode(self, text):
            return list(text)

    assert endpoint.estimate(requests, Letters()).prompt_tokens == 4 * 34
    endpoint.ask(requests[:1])
    after = endpoint.estimate(requests)
    assert (after.already_answered, after.to_ask) == (2, 3) and make(log="b").estimate(requests).cost is None
    assert make(log="b").estimate(requests).seconds is None and make(log="b").estimate([]).to_ask == 0


def test_the_limit_of_cost_holds_and_no_money_lies_idle(make, fake):
    prices = {"price_input": 0.0, "price_output": 1e6, "max_tokens": 20}
    # each answer is 12 tokens and costs 12; 20 are set aside for it: after four answers 52 are left of 100, after seven 16
    with pytest.raises(UserError, match=r"3 of 10 requests are not answered: the limit of cost \(100\) is reached.*the other 7 are kept"):
        make(**prices, concurrency=4).ask(questions(10), limit_cost=100)
    assert len(fake.asked) == 7
    with pytest.raises(UserError, match="the limit of cost"):
        make(**prices).ask(questions(10), limit_cost=19)
    assert len(fake.asked) == 7 and len(make(**prices).ask(questions(10), limit_cost=60)) == 10
    # near the end two do not fit at once, one after the other they do
    assert len(make(log="other", **prices, concurrency=4).ask(questions(10), limit_cost=130)) == 10
    with pytest.raises(UserError, match="limit_cost needs prices"):
        make().ask(questions(1), limit_cost=1)


def test_a_request_that_may_have_been_billed_counts(make, fake):
    fake.rule = lambda prompt, times: "drop"
    with pytest.raises(UserError, match="the limit of cost"):
        make(price_input=0.0, price_output=1e6, max_tokens=20, retries=9).ask(questions(1), limit_cost=50)
    assert len(fake.asked) == 2


def test_the_rate_limit_spaces_requests_and_counts_repeats(make, fake):
    fake.rule = lambda prompt, times: (500, {}, b"") if prompt == "q0" and times == 1 else None
    endpoint = make(requests_per_minute=10.0, concurrency=1)
    endpoint.ask(questions(4))
    assert endpoint.clock.now == pytest.approx(24.0)  # five starts, six seconds apart


def test_no_window_of_a_minute_has_more_starts_than_allowed():
    clock, chance, starts = Clock(), random.Random(0), []
    pace = Pace(20.0, clock, lambda seconds, stop: clock.sleep(seconds) is None)
    for _ in range(200):
        pace.take()
        starts.append(clock.now)
        clock.now += chance.random() * 6
    assert all(b - a >= 3.0 - 1e-9 for a, b in pairwise(starts))


def test_a_wait_that_the_server_asks_for_holds_for_all_threads():
    clock = Clock()
    pace = Pace(None, clock, lambda seconds, stop: clock.sleep(seconds) is None)
    pace.take()
    pace.hold(17)
    pace.hold(5)
    assert pace.take() and clock.now == 17 and pace.take() and clock.now == 17


def test_waits_and_retry_after():
    chance = random.Random(0)
    assert all(2 ** (n - 1) / 2 <= wait_before(n, chance) <= 2 ** (n - 1) for n in range(1, 7))
    assert all(30 <= wait_before(n, chance) <= 60 for n in (7, 50, 10**6))
    now = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
    assert retry_after({"retry-after": "2.5"}) == 2.5 and retry_after({"retry-after-ms": "1500", "retry-after": "9"}) == 1.5
    assert retry_after({"retry-after": "Thu, 01 Jan 2026 12:00:30 GMT"}, now) == 30 and retry_after({"retry-after": "-3"}) == 0
    assert retry_after({}) is None and retry_after({"retry-after": "soon"}) is None and retry_after({"retry-after": "nan"}) is None


def test_requests_go_out_together_but_no_more_than_allowed(make, fake):
    barrier, now, most, guard = threading.Barrier(3, timeout=5), [0], [0], threading.Lock()

    def rule(prompt, times):
        with guard:
            now[0] += 1
            most[0] = max(most[0], now[0])
        barrier.wait()
        with guard:
            now[0] -= 1

    fake.rule = rule
    make(concurrency=3).ask(questions(9))
    assert most[0] == 3


def test_ctrl_c_keeps_what_was_answered(make, fake):
    def progress(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(concurrency=1).ask(questions(50), progress=progress)
    before = list(fake.asked)
    assert 3 <= len(before) < 50
    assert len(make().ask(questions(50))) == 50 and Counter(fake.asked) == {f"q{n}": 1 for n in range(50)}


def test_two_threads_take_turns_and_two_writers_are_refused(make, fake):
    endpoint, answers = make(), []
    threads = [threading.Thread(target=lambda: answers.append(endpoint.ask(questions(6)))) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(answers) == 4 and all(a == answers[0] for a in answers) and len(fake.asked) == 6
    with make().log.writing(), pytest.raises(UserError, match="another run is writing the log"):
        endpoint.ask(questions(9))
    assert len(endpoint.ask(questions(9))) == 9


def test_a_client_of_ones_own(fake, tmp_path):
    import openai

    client = openai.OpenAI(base_url=fake.address, api_key="mine", max_retries=7)
    fake.rule = lambda prompt, times: (500, {}, b"")
    with pytest.raises(UserError, match="HTTP 500"):
        Endpoint(EndpointSettings(fake.address, "tiny", retries=0), tmp_path / "log", client).ask(questions(1))
    assert len(fake.asked) == 1 and fake.keys == ["Bearer mine"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base_url": "localhost:8000"}, "must begin with http"), ({"base_url": None}, "base_url"),
        ({"base_url": "http://h:port/v1"}, "not an address"),
        ({"base_url": "http://h/v1?key=abc"}, "query"), ({"model": ""}, "no model"), ({"key_env": "sk-abc"}, "key_env"),
        ({"concurrency": 0}, "concurrency=0"), ({"concurrency": 2.5}, "whole"), ({"timeout": 0}, "timeout"), ({"retries": -1}, "retries"),
        ({"max_tokens": True}, "max_tokens"), ({"temperature": float("nan")}, "temperature"), ({"top_p": 1.5}, "from 0 to 1"),
        ({"price_input": -1}, "price_input"), ({"requests_per_minute": 0}, "requests_per_minute"),
        ({"system": "x", "chat": False}, "chat=True"),
        ({"token_limit_name": "tokens"}, "token_limit_name"), ({"most_empty": 2}, "most_empty"), ({"seed": 1.5}, "seed"),
        ({"timeout": float("inf")}, "timeout"), ({"max_tokens": None}, "max_tokens"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_meant(change, words):
    with pytest.raises(UserError, match=words) as caught:
        EndpointSettings(**({"base_url": "http://h/v1", "model": "m"} | change))
    assert "abc" not in str(caught.value)


@pytest.mark.parametrize(
    ("requests", "words"),
    [
        ([Request("a", "x"), Request("a", "y")], "two requests have the id 'a'"),
        ([Request("a", 3)], "neither text nor a list"), ([Request("a", [])], "neither text"),
        ([Request("a", [{"content": "x"}])], "neither text"),
        ([Request("a", "half \ud800")], "lone surrogate"),
    ],
)  # fmt: skip
def test_requests_that_cannot_be_sent(make, fake, requests, words):
    with pytest.raises(UserError, match=words):
        make().ask(requests)
    with pytest.raises(UserError, match="messages need chat=True"):
        make(chat=False).ask([Request("a", [{"role": "user", "content": "x"}])])
    assert not fake.asked and make().ask([]) == []
