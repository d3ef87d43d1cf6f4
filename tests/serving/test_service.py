"""The HTTP service as a process, and real clients: right answers, right refusals, and an end that drops nothing."""

import contextlib
import json
import re
import select
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from mmlrec.serving.server import listen
from tests import processes
from tests.serving.folders import DIM, LOOKUPS, ROWS, encoded_by_hand, raw_rows, scores_by_hand, tables, write_model
from tests.serving.served import answer, head, served

MIB = 1 << 20


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Folder of a model, and what gives its scores by hand."""
    folder, contents = tmp_path_factory.mktemp("toy") / "model", tables("fp32", ROWS, DIM)
    weight = write_model(folder, contents)
    return folder, lambda rows: scores_by_hand(encoded_by_hand(rows), contents, [LOOKUPS], weight)


@pytest.fixture(scope="module")
def service(toy, tmp_path_factory):
    options = ("--max-rows", "500", "--max-bytes", str(2 * MIB), "--timeout", "60")
    with served(toy[0], tmp_path_factory.mktemp("log") / "log", *options) as service:
        yield service


@pytest.fixture(scope="module")
def impatient(toy, tmp_path_factory):
    with served(toy[0], tmp_path_factory.mktemp("log") / "log", "--timeout", "1") as service:
        yield service


@pytest.fixture(scope="module")
def client(service):
    with httpx.Client(base_url=service.url, timeout=60) as client:
        yield client


def array(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.array([[row["score.click"], row["score.buy"]] for row in answer.json()["scores"]]).reshape(-1, 2)


def test_scores(toy, client):
    for num_rows in (0, 1, 300):
        rows = raw_rows(num_rows)
        np.testing.assert_allclose(array(client.post("/score", json={"rows": rows})), toy[1](rows), atol=2e-6)


def test_health_documentation_and_its_example(client):
    health = client.get("/health")
    assert health.status_code == 200
    assert health.json() == {"status": "ready", "name": "toy", "method": "toy", "digest": None, "outputs": ["click", "buy"]}
    assert "swagger" in client.get("/docs").text
    content = client.get("/openapi.json").json()["paths"]["/score"]["post"]["requestBody"]["content"]["application/json"]
    assert list(content["schema"]["properties"]["rows"]["items"]["properties"]) == [
        "user",
        "price",
        "tags",
        "marks",
        "age",
        "place",
    ]
    assert len(array(client.post("/score", json=content["example"]))) == 1


ROW = {"user": "u1", "price": 1.0, "tags": [101], "marks": [], "age": 30, "place": "home"}


def rows_with(**change):
    return json.dumps({"rows": [ROW, ROW | change]})


REFUSED = {
    "malformed": (400, '{"rows": [}', r"the body is no JSON: Expecting value: line 1 column 11"),
    "empty": (400, "", r"the body is no JSON: Expecting value"),
    "key twice": (400, '{"rows": [{"user": "u1", "user": "u2"}]}', r"the body is no JSON: an object has the key 'user' twice"),
    "rows twice": (400, '{"rows": [], "rows": [{}]}', r"the body is no JSON: an object has the key 'rows' twice"),
    "above float64": (422, rows_with(price=0).replace(": 0,", ": 1e999,"), r"row 1 .*: price must be a finite number"),
    "no utf-8": (400, b'{"rows": ["\xff"]}', r"the body is no JSON: .*utf-8"),
    "nan": (400, '{"rows": [{"age": NaN}]}', r"NaN is no number in JSON: write null"),
    "deep": (400, "[" * 100_000, r"nested too deeply"),
    "long number": (400, '{"rows": [{"age": ' + "9" * 5000 + "}]}", r"the body is no JSON: .*digits"),
    "no rows": (422, '{"row": []}', r"the body must be an object with a list of rows"),
    "list": (422, "[]", r"the body must be an object with a list of rows"),
    "no object": (422, '{"rows": [7]}', r"row 0 .*: an object with a value for each column is needed, found 7"),
    "no column": (422, json.dumps({"rows": [{"user": "u1"}]}), r"there is no column 'price', which feature price is made of"),
    "wrong type": (422, rows_with(price="cheap"), r"row 1 .*: price must be a number, found cheap"),
    "wrong object": (422, rows_with(user={}), r"row 1 .*: user must be text or an integer"),
    "beyond 64 bits": (422, rows_with(tags=[1, 2**63]), r"row 1 .*: tags does not fit into 64 bits, found .* type: string"),
    "scenario": (422, rows_with(place="street"), r"row 1 .*: place .*found street.* Known are: home, search, cart"),
    "surrogate": (422, rows_with(user="\ud800"), r"row 1 .*: user is no text"),
    "rows": (413, json.dumps({"rows": [ROW] * 501}), r"501 rows are more than 500, the most of a request: send several"),
    "bytes": (413, b" " * (2 * MIB + 1), r"the body is longer than 2,097,152 bytes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(client, name):
    status, body, words = REFUSED[name]
    answered = client.post("/score", content=body)
    assert answered.status_code == status
    assert answered.headers["content-type"] == "application/json"
    assert re.search(words, answered.json()["error"]), answered.text


def test_what_is_not_there(client):
    for answered, status in ((client.get("/nothing"), 404), (client.post("/score/"), 404), (client.get("/score"), 405)):
        assert answered.status_code == status
        assert "There are POST /score" in answered.json()["error"]


def test_bodies_of_a_gigabyte_are_not_read_into_memory(service):
    before = service.peak_bytes()
    with service.connected() as connection:
        connection.sendall(head(1 << 30))
        assert answer(connection)[0] == 413  # before any of it is sent
    pieces = 0
    with service.connected() as connection:
        connection.sendall(head(0).replace(b"content-length: 0", b"transfer-encoding: chunked"))
        try:
            while pieces < 1024:
                connection.sendall(b"100000\r\n" + bytes(MIB) + b"\r\n")
                pieces += 1
        except OSError:  # it has closed the connection
            pass
        assert answer(connection)[0] == 413
    assert pieces < 100
    assert service.peak_bytes() - before < 100 * MIB


def test_bodies_that_fill_the_memory_together_are_refused(client, service):
    """Of many clients at once, none of whose bodies is too long: one that was sent at once, and those that never are."""
    body = json.dumps({"rows": [ROW]}).encode().ljust(2 * MIB)
    before = metrics(client)
    for _ in range(2):  # what was held is given back by clients that went away
        with contextlib.ExitStack() as clients:
            unfinished = [clients.enter_context(service.connected()) for _ in range(17)]
            for connection in unfinished:
                connection.sendall(head(2 * MIB) + body[:-1])
            refused, _, _ = select.select(unfinished, [], [], 60)
            assert len(refused) == 1  # all but the one that came last have room
            assert refused[0].recv(1 << 16).startswith(b"HTTP/1.1 503 ")
            for content in (body, b" "):
                answered = client.post("/score", content=content)  # is sent to its end, and the answer is read after that
                assert (answered.status_code, answered.headers["retry-after"]) == (503, "1")
                assert (
                    answered.json()["error"]
                    == "requests that are worked on fill the 33,554,432 bytes that they may: try again."
                )
            refused[0].sendall(b" ")
            unfinished.remove(refused[0])
            unfinished[0].sendall(b" ")
            text = b""
            while b"score.click" not in text:  # head and body may come apart
                piece = unfinished[0].recv(1 << 16)
                assert piece, text
                text += piece
            assert len(array(client.post("/score", content=body))) == 1  # has the room of the one that was answered
        deadline = time.monotonic() + 60
        while (gone := metrics(client)).get('requests_total{status="499"}', 0) < before.get(
            'requests_total{status="499"}', 0
        ) + 15:
            assert time.monotonic() < deadline, gone
        before = gone
    assert len(array(client.post("/score", content=body))) == 1


def test_clients_that_are_too_slow(impatient):
    with impatient.connected() as silent, impatient.connected() as of_head, impatient.connected() as of_body:
        of_head.sendall(b"POST /score HTTP/1.1\r\nho")
        of_body.sendall(head(100) + b'{"rows"')
        begun = time.monotonic()
        httpx.get(f"{impatient.url}/health", timeout=60)  # which is answered meanwhile
        for connection, words in ((silent, "the head"), (of_head, "the head"), (of_body, "the body did not arrive within 1 s")):
            status, content = answer(connection)
            assert status == 408
            assert words in content["error"]
        assert time.monotonic() - begun > 0.5


def test_a_trickle_is_too_slow(impatient):
    """A byte now and then does not start the time again."""
    with impatient.connected() as of_head, impatient.connected() as of_body:
        of_body.sendall(head(100))
        for letter in b"POST /score HTTP/1.1\r\n":
            try:
                of_head.sendall(bytes([letter]))
                of_body.sendall(b" ")
            except OSError:
                break
            time.sleep(0.1)
        assert answer(of_head)[0] == answer(of_body)[0] == 408


def metrics(client) -> dict[str, float]:
    answered = client.get("/metrics")
    assert answered.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = (line.rsplit(" ", 1) for line in answered.text.splitlines() if not line.startswith("#"))
    return {name.removeprefix("mmlrec_"): float(value) for name, value in lines}


def test_metrics(client):
    before = metrics(client)
    for rows in (raw_rows(3), raw_rows(4)):
        client.post("/score", json={"rows": rows})
    client.post("/score", content="{")
    client.post("/score", json={"rows": [{}]})
    after = metrics(client)
    more = {name: value - before.get(name, 0) for name, value in after.items()}
    assert [more[f'requests_total{{status="{status}"}}'] for status in (200, 400, 422)] == [2, 1, 1]
    assert (more["errors_total"], more["rows_total"]) == (2, 7)
    buckets = [count for name, count in more.items() if "_bucket" in name]
    assert buckets == sorted(buckets)
    assert buckets[-1] == more["request_seconds_count"] == 4
    assert 0 < more["request_seconds_sum"] < 4 * 20


def test_many_clients_at_once_get_their_own_scores(toy, service):
    """Also those whose requests are scored together with others, and with one that is wrong."""
    wrong = json.dumps({"rows": [ROW, ROW | {"price": "cheap"}]})

    def ask(number: int) -> None:
        with httpx.Client(base_url=service.url, timeout=60) as client:
            for turn in range(12):
                rows = raw_rows(1 + number % 3, seed=100 * number + turn)
                if turn % 4 == number % 4:
                    answered = client.post("/score", content=wrong)
                    assert answered.status_code == 422
                    assert "row 1 (counted from 0)" in answered.json()["error"]
                np.testing.assert_allclose(array(client.post("/score", json={"rows": rows})), toy[1](rows), atol=2e-6)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))


def test_a_signal_under_load_drops_nothing(toy, tmp_path):
    """Each request, on connections that are kept and on new ones, is answered with scores or refused in words."""
    body = json.dumps({"rows": raw_rows(200)})
    outcomes: list[int] = []

    def ask(number: int) -> None:
        url = f"{service.url}/score"
        with httpx.Client(base_url=service.url, timeout=60) as kept:
            while True:
                try:
                    found = kept.post("/score", content=body) if number % 2 else httpx.post(url, content=body, timeout=60)
                except httpx.ConnectError:  # nobody listens any more: the last answer took longer than others were refused
                    outcomes.append(503)
                    return
                outcomes.append(found.status_code)
                if found.status_code != 200:
                    assert found.status_code == 503
                    assert found.headers["connection"] == "close"
                    assert found.json() == {"error": "the service is ending: send the request to another one."}
                    return
                assert len(found.json()["scores"]) == 200

    with served(toy[0], tmp_path / "log", "--timeout", "60") as service, ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask, number) for number in range(8)]
        with service.connected() as slow:
            text = body.encode()
            slow.sendall(head(len(text)) + text[:10])  # begun before the signal, ended after it
            deadline = time.monotonic() + 60
            while len(outcomes) <= 8:
                assert time.monotonic() < deadline, outcomes
                time.sleep(0.01)
            service.command.send_signal(signal.SIGTERM)
            while (health := httpx.get(f"{service.url}/health", timeout=60)).status_code == 200:
                pass  # the signal is on its way
            assert (health.status_code, health.json()["status"]) == (503, "ending")
            for one in asking:
                one.result(60)
            slow.sendall(text[10:])
            assert len(answer(slow)[1]["scores"]) == 200
        assert service.command.wait(60) == 0, service.log.read_text()
        assert "Traceback" not in service.log.read_text()
    assert outcomes.count(200) > 8
    assert outcomes.count(503) == 8


@pytest.mark.parametrize("fault", ["no model", "port"])
def test_what_cannot_start_ends_with_2(toy, service, tmp_path, fault):
    arguments = {"no model": ["--model", str(tmp_path / "none")], "port": ["--model", str(toy[0]), "--port", str(service.port)]}
    done = processes.run([sys.executable, "-m", "apps.serve", *arguments[fault]], timeout=60)
    assert done.returncode == 2
    words = {"no model": "none is not an exported model: the folder does not exist", "port": f"--port {service.port}: "}
    assert words[fault] in done.stderr
    assert "Traceback" not in done.stderr


def test_answers_do_not_wait_for_acknowledgements():
    """Head and body are two writes: without TCP_NODELAY the second one waits 40 ms on connections that are kept."""
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()), listening.accept()[0] as taken:
        assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
