"""Requests out of the files that people have: SGLang's request logs, JSON lines of prompts or chats, traces."""

from __future__ import annotations

import ast
import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from packinfer_sgl.tools.estimate_batches import Load, Request

HASH_BLOCK_TOKENS = 512  # Mooncake's
TEXT_BLOCK_BYTES = 4  # what stands for a token of a text without a tokenizer
TEXT_IDS = 1 << 40  # added to blocks of bytes, so that they never equal token ids
DEFAULT_OUTPUT_TOKENS = 256
MOST_SAMPLES = 10_000  # of a prompt; more is a mistake
CURE = "start the server with --log-requests --log-requests-level 3 --log-requests-format json"
TEXT_LOG = re.compile(r"\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)[^\]]*\] (Finish|Receive|Receive OpenAI): obj=")
STRING = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
TEXT_FIELD = re.compile(rf"\btext=(None|{STRING})( \.\.\. )?")
IDS_FIELD = re.compile(r"\binput_ids=(?:None|[\[(]([\d, ]*)[\])])( \.\.\. )?")
TIMES = ("timestamp", "arrival_time", "created_at", "created", "time", "ts")
ANSWER_LIMITS = ("max_completion_tokens", "max_output_tokens", "max_tokens", "max_new_tokens")


class InputError(ValueError):
    """A file cannot be read as requests; the text is the one line that the user reads."""


def read_load(path: Path, tokenizer: Path | None = None, output_tokens: int | None = None) -> Load:
    """The requests of ``path``.

    Args:
        tokenizer: ``tokenizer.json``, or its folder.
        output_tokens: of answers of which the file does not tell.
    """
    with path.open("rb") as file:
        if path.suffix in (".pkl", ".pickle") or file.read(1) == b"\x80":
            raise InputError(f"{path} is a pickle, which can run code when it is read; instead, {CURE}")
    reader = _Reader(_encoder(tokenizer), output_tokens)
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        if path.suffix == ".csv":
            found = list(reader.azure(csv.DictReader(file)))
        else:
            try:
                rows = json.load(file) if path.suffix == ".json" else file
            except ValueError as e:
                raise InputError(f"{path} is no JSON: {e}") from None
            found = [request for row in rows for request in reader.row(row)]
    seen = reader.seen
    if not found:
        hidden = f": its request logs have no prompts; {CURE}" if seen["hidden"] else " (docs/reference.md, estimate)"
        raise InputError(f"{path} has no requests that can be read{hidden}")
    if all(request.arrival_s is not None for request in found):
        found.sort(key=lambda request: request.arrival_s or 0.0)
    elif any(request.arrival_s is not None for request in found):
        raise InputError(f"{path} has times for some of its requests only")
    notes = [note.format(f"{seen[what]:,}") for what, note in NOTES.items() if seen[what]]
    return Load(found, " and ".join(sorted(reader.kinds)), notes)


NOTES = {
    "cut": "{} prompts are cut short in the log, so what they share is a lower bound; "
    "--log-requests-level 3 logs all of them",
    "hidden": "{} logged requests have no prompt and were left out; --log-requests-level 3 logs it",
    "bytes": f"{{}} prompts are text and there is no --tokenizer: {TEXT_BLOCK_BYTES} bytes stand for a token "
    "where the file does not count them",
    "limit": "{} answers are taken to be as long as their request allows",
    "default": "the length of {} answers is not known and assumed (--output-tokens)",
    "skipped": "{} lines are no requests and were skipped",
}


def _encoder(tokenizer: Path | None) -> Callable[[str], list[int]] | None:
    if tokenizer is None:
        return None
    from tokenizers import Tokenizer

    path = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    try:
        model = Tokenizer.from_file(str(path))
    except Exception as e:  # of no narrower class
        raise InputError(f"{path} is no tokenizer.json: {e}") from None
    return lambda text: model.encode(text).ids


class _Reader:
    def __init__(self, encode: Callable[[str], list[int]] | None, output_tokens: int | None) -> None:
        self.encode, self.output_tokens = encode, output_tokens
        self.seen: Counter[str] = Counter()  # what NOTES says
        self.kinds: set[str] = set()
        self._hashes: dict[Any, int] = {}

    def azure(self, rows: csv.DictReader) -> Iterator[Request]:
        self.kinds.add("Azure trace")
        for row in rows:
            try:
                tokens, answer = int(row["ContextTokens"]), int(row["GeneratedTokens"])
                arrival = _seconds(row["TIMESTAMP"][:26])
            except (KeyError, TypeError, ValueError):
                raise InputError("a CSV needs the columns TIMESTAMP, ContextTokens, GeneratedTokens") from None
            yield Request(np.zeros(0, np.int64), 1.0, tokens, answer, arrival)

    def row(self, row: str | dict[str, Any]) -> Iterator[Request]:
        try:
            text = TEXT_LOG.search(row) if isinstance(row, str) else None
            found = self._text_log(text) if text else self._json(row)
            if found is None:
                self.seen["skipped"] += 1
            yield from found or ()
        except (KeyError, TypeError, ValueError, SyntaxError, AttributeError):
            self.seen["skipped"] += 1

    def _json(self, row: str | dict[str, Any]) -> list[Request] | None:
        if isinstance(row, str):
            if not row.strip():
                return []
            row = json.loads(row[row.index("{") :])
        if isinstance(row.get("log"), str):  # Docker's own file
            return list(self.row(row["log"]))
        if "hash_ids" in row:
            self.kinds.add("hash trace")
            blocks = [self._hashes.setdefault(name, len(self._hashes)) for name in row["hash_ids"]]
            arrival = row["timestamp"] / 1e3 if "timestamp" in row else None
            tokens, answer = int(row["input_length"]), int(row["output_length"])
            return [Request(np.array(blocks, np.int64), HASH_BLOCK_TOKENS, tokens, answer, arrival)]
        if "event" in row:
            if row["event"] != "request.finished" or str(row["rid"]).startswith("HEALTH_CHECK"):
                return []  # the same request, earlier; or nobody's
            obj, about = row["obj"], row["out"]["meta_info"]
            ids, text = obj.get("input_ids"), obj.get("text")
            is_cut = "..." in ids if ids else _is_cut(text)
            if is_cut:
                ids, text = (ids[: ids.index("...")], None) if ids else (None, text[: len(text) // 2 - 1])
            return self._logged(ids, text, is_cut, about, _seconds(row["timestamp"]))
        return self._openai(row)

    def _text_log(self, log: re.Match[str]) -> list[Request]:
        line = log.string
        if log[2] != "Finish" or "(rid='HEALTH_CHECK" in line:
            return []
        text = TEXT_FIELD.search(line)
        ids = IDS_FIELD.search(line, text.end() if text else 0)  # beyond what the text says
        about = {
            name: float(values[-1])  # the last: a text before it may say anything
            for name in ("prompt_tokens", "completion_tokens", "e2e_latency")
            if (values := re.findall(rf"'{name}': ([\d.e+-]+)", line))
        }
        numbers = [int(number) for number in ids[1].split(",")] if ids and ids[1] else None
        words = ast.literal_eval(text[1]) if text else None
        is_cut = bool(ids and ids[2]) if numbers else bool(text and text[2])
        return self._logged(numbers, words, is_cut, about, _seconds(log[1]))

    def _logged(
        self, ids: list[int] | None, text: str | None, is_cut: bool, about: dict[str, Any], finished_s: float | None
    ) -> list[Request]:
        self.kinds.add("SGLang log")
        if not ids and not text:
            self.seen["hidden"] += 1
            return []
        self.seen["cut"] += is_cut
        latency = about.get("e2e_latency")
        arrival = None if finished_s is None else finished_s - (latency or 0.0)
        tokens = int(about["prompt_tokens"])
        return [self._request(ids or text, int(about["completion_tokens"]), arrival, latency, tokens, is_cut)]

    def _openai(self, row: dict[str, Any]) -> list[Request] | None:
        body = next((row[name] for name in ("body", "request") if isinstance(row.get(name), dict)), row)
        prompt = next((body[name] for name in ("prompt", "input_ids", "text", "input") if body.get(name)), None)
        if messages := body.get("messages") or (isinstance(body.get("input"), list) and prompt):
            prompt = chat_text(messages, body.get("tools"))
        if not prompt:
            return None
        self.kinds.add("JSON lines")
        is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
        sampling = {**body, **(body.get("sampling_params") or {})}
        response = row.get("response") or row
        usage = (response.get("body") or response).get("usage") or {}
        samples = int(sampling.get("n") or 1)
        if samples > MOST_SAMPLES:
            return None
        answers = [one for one in ([prompt] if is_one else prompt) for _ in range(samples)]
        total = usage.get("completion_tokens", usage.get("output_tokens", row.get("output_tokens")))
        if total is not None:
            output_tokens = round(total / len(answers))
        elif self.output_tokens is None and (limit := [sampling[x] for x in ANSWER_LIMITS if sampling.get(x)]):
            output_tokens = int(limit[0])
            self.seen["limit"] += len(answers)
        else:
            output_tokens = self.output_tokens or DEFAULT_OUTPUT_TOKENS
            self.seen["default"] += len(answers)
        time = next((part[name] for part in (row, body) for name in TIMES if part.get(name) is not None), None)
        arrival = None if time is None else _seconds(time)
        return [self._request(one, output_tokens, arrival) for one in answers]

    def _request(
        self,
        prompt: str | list[int],
        output_tokens: int,
        arrival_s: float | None,
        latency_s: float | None = None,
        input_tokens: int | None = None,
        is_cut: bool = False,
    ) -> Request:
        width = 1.0
        if isinstance(prompt, str) and self.encode is None:
            self.seen["bytes"] += 1
            data = prompt.encode(errors="replace")
            data += bytes(-len(data) % TEXT_BLOCK_BYTES)
            blocks = np.frombuffer(data, ">u4").astype(np.int64) + TEXT_IDS
            if input_tokens and not is_cut:
                width = input_tokens / max(len(blocks), 1)
        else:
            blocks = np.array(self.encode(prompt) if isinstance(prompt, str) else prompt, np.int64)  # type: ignore[misc]
        return Request(blocks, width, input_tokens or len(blocks), output_tokens, arrival_s, latency_s)


def chat_text(messages: list[dict[str, Any]], tools: object = None) -> str:
    """A chat as one text, about as chat templates write it: equal beginnings stay equal."""
    parts = [json.dumps(tools)] if tools else []
    for message in messages:
        content = message.get("content") or ""
        if not isinstance(content, str):
            content = "".join(part.get("text") or json.dumps(part) for part in content)
        calls = json.dumps(message["tool_calls"]) if message.get("tool_calls") else ""
        parts.append(f"<|{message.get('role')}|>\n{content}{calls}")
    return "\n".join(parts)


def _is_cut(text: str | None) -> bool:
    """Whether SGLang left out the middle of a text (level 2: all but 1,024 characters at either end)."""
    return text is not None and len(text) == 2051 and text[1024:1027] == "..."


def _seconds(time: float | str) -> float:
    """Seconds since 1970 or since any start; milliseconds are told by their size."""
    if isinstance(time, str):
        try:
            return datetime.fromisoformat(time).timestamp()
        except ValueError:
            time = float(time)
    return time / 1e3 if time > 1e11 else float(time)
