"""The documents from which models learn retrieval."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from yoco_u.errors import UserError

SCRIPT = Path(__file__).parents[2] / "recipes" / "needle_corpus.py"


def test_words_are_hidden_once_and_asked_for_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("needle_corpus", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    texts = []
    for name in ("a", "b"):
        monkeypatch.setattr(sys, "argv", ["needle_corpus.py", "--out", str(tmp_path / name), "--documents", "20"])
        module.main()
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1]
    with pytest.raises(UserError, match="b: is there already"):
        module.main()
    lengths = []
    for line in texts[0].splitlines():
        text = json.loads(line)["text"]
        [(key, words)] = re.findall(r"One of the special magic words for (\S+) is: ([a-z]+-[a-z]+)\.", text)
        asked = re.findall(r"\nWhat is the special magic word for (\S+) mentioned .*? for (\S+) mentioned .*? is (\S+)", text)
        assert asked == 3 * [(key, key, words)]
        lengths.append(len(text))
    assert 700 < min(lengths) < max(lengths) < 4000
    assert max(lengths) > 1.5 * min(lengths)
