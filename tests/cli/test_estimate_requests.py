"""What the estimate reads of files: the lines that SGLang logs, requests of OpenAI's API, traces."""

from __future__ import annotations

import json

import numpy as np
import pytest

from packinfer_sgl.tools.estimate_requests import TEXT_IDS, InputError, chat_text, read_load

ANSWER = {
    "text": "said: 'completion_tokens': 7, text='no'",
    "output_ids": [5, 6],
    "meta_info": {"prompt_tokens": 9, "completion_tokens": 4, "e2e_latency": 2.5},
}


@pytest.fixture
def log(tmp_path, monkeypatch):
    """Requests as this SGLang logs them; gives the file."""

    def write(level: int, style: str, *requests: dict, answer: dict = ANSWER):
        from sglang.srt.managers.io_struct import GenerateReqInput
        from sglang.srt.utils.request_logger import RequestLogger

        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        logger = RequestLogger(True, level, style, [str(folder)])
        for request in requests:
            obj = GenerateReqInput(**request)
            logger.log_received_request(obj)
            logger.log_finished_request(obj, answer)
        return next(folder.iterdir())

    return write


@pytest.fixture
def read(tmp_path):
    def rows(*lines: object, **more):
        path = tmp_path / "load.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
        return read_load(path, **more)

    return rows


@pytest.mark.contract
@pytest.mark.parametrize("style", ["json", "text"])
def test_sglang_logs(log, style):
    text = "it's \"mine\",\n input_ids=[1, 2], \\ text='x' é"
    path = log(
        3, style, {"rid": "a", "text": text, "sampling_params": {"n": 4}}, {"rid": "b", "input_ids": [7, 8, 9]},
        {"rid": "HEALTH_CHECK_1", "input_ids": [0]},
    )  # fmt: skip
    load = read_load(path)
    assert load.kind == "SGLang log" and len(load.requests) == 2 and len(load.notes) == 1
    words, ids = load.requests
    assert (words.blocks - TEXT_IDS).astype(">u4").tobytes().rstrip(b"\0").decode() == text
    assert words.block_tokens * len(words.blocks) == pytest.approx(9) and load.known == pytest.approx(2 / 3)
    assert ids.blocks.tolist() == [7, 8, 9] and ids.block_tokens == 1.0
    for one in load.requests:
        assert (one.input_tokens, one.output_tokens, one.latency_s) == (9, 4, 2.5)
    # the log says when they were done, in text to the second
    assert -0.1 <= path.stat().st_mtime - words.arrival_s - 2.5 <= 1.5


@pytest.mark.contract
@pytest.mark.parametrize("style", ["json", "text"])
def test_logs_of_containers(log, read, tmp_path, style):
    path = log(3, style, {"rid": "b", "input_ids": [7, 8, 9]})
    lines = path.read_text().splitlines()
    (request,) = read(*({"log": f"{line}\n", "stream": "stdout"} for line in lines)).requests
    assert request.blocks.tolist() == [7, 8, 9]
    (tmp_path / "pod.log").write_text("".join(f"2026-11-27T14:00:00Z stdout F {line}\n" for line in lines))
    assert len(read_load(tmp_path / "pod.log").requests) == 1


@pytest.mark.contract
@pytest.mark.parametrize("style", ["json", "text"])
def test_sglang_logs_of_lower_levels(log, style):
    text, ids = "ab" * 1500, list(range(3000))
    load = read_load(log(2, style, {"rid": "a", "text": text}, {"rid": "b", "input_ids": ids}))
    assert [len(one.blocks) for one in load.requests] == [1024 // 4, 1024]
    assert load.requests[1].blocks.tolist() == ids[:1024]
    assert any("2 prompts are cut short" in note for note in load.notes)
    whole = read_load(log(2, style, {"rid": "a", "text": "a ... b..." * 9}))
    assert not any("cut short" in note for note in whole.notes)
    for level in (0, 1):
        with pytest.raises(InputError, match="have no prompts; start the server with .*--log-requests-level 3"):
            read_load(log(level, style, {"rid": "a", "text": text}))


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Why?"}]}]


@pytest.mark.parametrize(
    ("line", "tokens"),
    [
        ({"custom_id": "1", "method": "POST", "body": {"messages": CHAT, "max_tokens": 5}}, 5),
        ({"messages": CHAT, "max_completion_tokens": 5}, 5),
        ({"request": {"messages": CHAT}, "response": {"body": {"usage": {"completion_tokens": 5}}}}, 5),
        ({"input": CHAT, "max_output_tokens": 5, "usage": {"output_tokens": 6}}, 6),
        ({"prompt": chat_text(CHAT), "output_tokens": 5, "max_tokens": 9}, 5),
        ({"text": chat_text(CHAT), "sampling_params": {"max_new_tokens": 5}}, 5),
        ({"prompt": chat_text(CHAT)}, 256),
    ],
)
def test_requests_of_openai(read, line, tokens):
    (request,) = read(line).requests
    assert request.output_tokens == tokens and request.arrival_s is None
    assert (request.blocks - TEXT_IDS).astype(">u4").tobytes().rstrip(b"\0").decode() == chat_text(CHAT)


def test_samples_and_batches(read):
    load = read({"prompt": [[1, 2], [3]], "n": 2, "usage": {"completion_tokens": 40}, "created": 17})
    assert [r.blocks.tolist() for r in load.requests] == [[1, 2], [1, 2], [3], [3]]
    assert {(r.output_tokens, r.arrival_s) for r in load.requests} == {(10, 17.0)}
    assert [r.output_tokens for r in read({"prompt": "a"}, output_tokens=3).requests] == [3]


def test_chats_begin_alike():
    follow_up = [*CHAT, {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]
    assert chat_text(follow_up).startswith(chat_text(CHAT)) and '"id": 1' in chat_text(follow_up)
    assert chat_text(CHAT, [{"name": "f"}]).startswith('[{"name": "f"}]')
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]
    assert '"url": "u"' in chat_text(image)


@pytest.mark.parametrize(
    ("early", "late", "seconds"),
    [(3.0, 4.5, 1.5), (1795789444000, 1795789445500, 1.5), ("2026-11-27T14:00:00Z", "2026-11-27T14:00:01.500Z", 1.5)],
)
def test_times(read, early, late, seconds):
    requests = read({"prompt": "b", "timestamp": late}, {"prompt": "a", "timestamp": early}).requests
    assert requests[1].arrival_s - requests[0].arrival_s == seconds  # in the order of arrival
    assert requests[0].blocks[0] == TEXT_IDS + (ord("a") << 24)


def test_traces(read, tmp_path):
    line = {"timestamp": 500, "input_length": 700, "output_length": 3}
    load = read({**line, "hash_ids": ["x", "y"]}, {**line, "hash_ids": ["x", "z"]})
    assert [r.blocks.tolist() for r in load.requests] == [[0, 1], [0, 2]] and load.known == 1.0
    one = load.requests[0]
    assert (one.block_tokens, one.input_tokens, one.output_tokens, one.arrival_s) == (512, 700, 3, 0.5)
    (tmp_path / "a.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n")
    load = read_load(tmp_path / "a.csv")
    assert (load.requests[0].input_tokens, load.requests[0].output_tokens, load.known) == (374, 44, 0.0)


def test_a_tokenizer(read, tmp_path):
    from packinfer_sgl.tools.tiny_model import build_tokenizer

    tokenizer, _ = build_tokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    expected = tokenizer.encode(" house and garden").ids
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        (request,) = read({"prompt": " house and garden"}, tokenizer=path).requests
        assert np.array_equal(request.blocks, expected) and request.input_tokens == len(expected)


def test_other_lines_are_skipped_and_said(read, tmp_path):
    load = read("text", {"event": "other"}, {"prompt": "a"}, {"prompt": 3}, {"hash_ids": [1]}, 7)
    assert len(load.requests) == 1 and any("are no requests and were skipped" in note for note in load.notes)
    (tmp_path / "all.json").write_text(json.dumps([{"prompt": "a"}, {"prompt": "b"}]))
    assert len(read_load(tmp_path / "all.json").requests) == 2
