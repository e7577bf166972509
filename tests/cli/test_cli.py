from __future__ import annotations

import json
import socket

import pytest

from packinfer_sgl.cli import main
from packinfer_sgl.serving.metrics import Stats

KEY = "secret"


@pytest.fixture
def serve(http_server):
    """Starts a server that answers GET /server_info with one text and status; gives its URL."""

    def start(status: int, text: str, key: str | None = None) -> str:
        def answer(path, headers):
            welcome = key is None or headers.get("Authorization") == f"Bearer {key}"
            return status if welcome and path == "/server_info" else 401, text

        return http_server(answer)

    return start


STARTED = {
    "packs": ["decode"],
    "device": {"record": "H100", "measured": True, "least_saving": 1.4},
    "config": {"extend": "auto", "check": False},
}


def info(**state) -> str:
    return json.dumps({"internal_states": [{"packinfer": {**Stats().as_dict(), **STARTED, **state}}]})


def test_inspect_once(serve, capsys):
    node = {"parent": -1, "rows": 8, "start": 0, "end": 2048}
    counted = {"packed_steps": 9, "kv_tokens_logical": 6000, "kv_tokens_unique": 3000, "kv_tokens_read": 4000}
    url = serve(200, info(active=True, rows=8, rows_grouped=8, groups=1, tree=[node], **counted))
    assert main(["inspect", url + "/", "--once"]) == 0
    out = " ".join(capsys.readouterr().out.split())  # sentences are wrapped
    parts = ("8 requests · tokens 0..2,048 · 2,048 read once", "packed decode steps", "the bound is 2.00x")
    tree, table, words = map(out.find, parts)
    assert 0 <= tree < table < words


def test_inspect_shows_every_rank(serve, capsys):
    rank = json.loads(info(active=True))["internal_states"][0]
    assert main(["inspect", serve(200, json.dumps({"internal_states": [rank, rank]})), "--once"]) == 0
    assert capsys.readouterr().out.count("last packed step") == 2


def test_inspect_sends_the_key(serve, capsys):
    url = serve(200, info(active=True), key=KEY)
    assert main(["inspect", url, "--once", "--api-key", KEY]) == 0
    assert main(["inspect", url, "--once"]) == 1
    assert "--api-key" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "text", "says"),
    [
        (200, info(active=False, reason="no graph"), "not active at http://127.0.0.1:{port}: no graph"),
        (200, '{"internal_states": [{}]}', "packinfer-sgl is not installed in the server"),
        (200, "[]", "no SGLang server"),
        (404, "not found", "no SGLang server: /server_info answers 404"),
    ],
)
def test_inspect_explains_in_one_line(serve, capsys, status, text, says):
    url = serve(status, text)
    assert main(["inspect", url, "--once"]) == 1
    out, err = capsys.readouterr()
    assert says.format(port=url.rsplit(":", 1)[1]) in err
    assert out == "" and err.count("\n") == 1


def test_explain(serve, capsys):
    url = serve(200, info(active=False, reason="no graph", base_backend="fa3"), key=KEY)
    assert main(["explain", url, "--api-key", KEY]) == 0
    assert capsys.readouterr().out == "- packinfer is not active: no graph.\n"
    assert main(["explain", url]) == 1
    assert capsys.readouterr().err.startswith("packinfer-sgl explain: ")
    rank = json.loads(info())["internal_states"][0]
    assert main(["explain", serve(200, json.dumps({"internal_states": [rank, rank]}))]) == 0
    assert "data-parallel rank 1:\n- packinfer is not active" in capsys.readouterr().out


def test_inspect_nobody_there(capsys):
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert main(["inspect", url]) == 1
    assert capsys.readouterr().err == f"packinfer-sgl inspect: no server answers at {url}\n"
    assert main(["inspect", "localhost"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "often"])
def test_inspect_interval(interval):
    with pytest.raises(SystemExit) as stop:
        main(["inspect", "http://127.0.0.1:1", "--interval", interval])
    assert stop.value.code == 2


def test_tiny_model(tmp_path, capsys):
    small = ["--layers", "1", "--heads", "4", "--kv-heads", "2", "--head-dim", "8"]
    assert main(["tiny-model", str(tmp_path / "model"), *small]) == 0
    assert (tmp_path / "model" / "model.safetensors").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").touch()
    for arguments in ([str(tmp_path / "mine"), *small], [str(tmp_path / "odd"), *small, "--heads", "3"]):
        assert main(["tiny-model", *arguments]) == 1
        err = capsys.readouterr().err
        assert err.startswith("packinfer-sgl tiny-model: ") and err.count("\n") == 1


@pytest.mark.contract
def test_doctor(monkeypatch, capsys):
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookType

    from packinfer_sgl import plugin
    from packinfer_sgl.patches import hold
    from packinfer_sgl.patches.hook import Hook

    load_plugins()
    assert main(["doctor"]) == 0
    report = capsys.readouterr().out
    assert "--packinfer-grouping" in report and "PackInferCpuPlatform" in report
    assert report.rstrip().endswith("healthy")

    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["healthy"] and found["platform"] == "PackInferCpuPlatform" and set(found["hooks"].values()) == {"hooked"}
    )
    assert found["versions"]["packinfer-sgl"] and found["settings"]["grouping"] == "multi"
    holds = {hook.target for hook in hold.hooks()}
    assert holds < set(found["hooks"]) and not found["warnings"]

    # without its seams nothing is held by default; told to hold, a server would not start
    missing = Hook("sglang.srt.nowhere", hold.hold, HookType.AROUND)
    for config, code, says in (
        ("{}", 0, "warning: no requests can be held"),
        ('{"hold_siblings": true}', 1, "not healthy: no requests can be held for a shared prefix: cannot hook sglang."),
        ('{"hold_siblings": false}', 0, None),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(hold, "hooks", lambda: [missing])
            patch.setenv("PACKINFER_CONFIG", config)
            assert main(["doctor"]) == code
        out = capsys.readouterr().out
        assert says is None or says in out
        assert ("nowhere" in out) == (says is not None)

    # a seam that this SGLang does not have
    monkeypatch.setattr(plugin, "check", lambda *_: [plugin.Check("sglang.srt.nowhere", False, "not found")])
    assert main(["doctor"]) == 1
    assert "not healthy: sglang.srt.nowhere: not found" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["healthy"] and found["hooks"] == {"sglang.srt.nowhere": "not found"}
    monkeypatch.undo()

    monkeypatch.setattr(plugin, "TESTED", ("0.0.1",))
    assert main(["doctor"]) == 0
    assert "warning: SGLang" in capsys.readouterr().out

    monkeypatch.setenv("PACKINFER_CONFIG", '{"grouping": "some"}')
    assert main(["doctor"]) == 1
    assert "not healthy: packinfer: grouping is 'some'" in capsys.readouterr().out
