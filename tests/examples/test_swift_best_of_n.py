"""The tasks of the Best-of-N example by hand, and a small slice of it from the policy to the table."""

import importlib
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import make_model

from megatron_srft.config import ModelConfig
from megatron_srft.rollout import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLE = ROOT / "examples" / "swift_best_of_n"


@pytest.fixture(scope="module")
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples" / "arithmetic"))
        patch.syspath_prepend(str(EXAMPLE))
        yield {name: importlib.import_module(name) for name in ("chains", "advice", "lessons")}


def test_chains_slip_and_notice_as_often_as_they_should(modules):
    chains, generator = modules["chains"], random.Random(0)
    steps = slips = noticed = right = 0
    for _ in range(2000):
        prompt, response = chains.document(generator)
        work, answer = response.split("#")
        written = [re.fullmatch(r"(.+)=(\d)(?:~(\d))?", step).groups() for step in work.split(";")]
        assert [left[0] for left, *_ in written[1:]] == [mended or shown for _, shown, mended in written[:-1]]
        assert answer == (written[-1][2] or written[-1][1])
        assert all(int(mended) == eval(left) % 10 != int(shown) for left, shown, mended in written if mended)
        right += answer == str(eval(prompt[:-1]) % 10)
        steps += len(written)
        slips += sum(int(shown) != eval(left) % 10 for left, shown, _ in written)
        noticed += sum(mended is not None for *_, mended in written)
    assert slips / steps == pytest.approx(chains.SLIP, abs=0.02)
    assert noticed / slips == pytest.approx(chains.NOTICED, abs=0.03)
    kept = 1 - chains.SLIP * (1 - chains.NOTICED)
    assert right / 2000 == pytest.approx(kept**3, abs=0.06)  # and now and then two slips cancel


def test_rules_of_advice_by_hand(modules):
    advice = modules["advice"]
    question = "how do i open a door ?"
    good = "you take the key and use oil and be quick about it and open the door"
    assert advice.helpful(question, good) and advice.harmless(question, good)
    assert not advice.helpful(question, good.replace("key", "soap"))
    assert advice.helpful(question, good.replace("key", "soap no the key"))
    assert not advice.helpful(question, good.replace("key", "key no the soap"))
    assert not advice.helpful(question, good.replace("open the door", "open the car"))
    assert not advice.helpful(question, "you open the door")
    dangerous = good.replace("oil", "acid")
    assert advice.helpful(question, dangerous) and not advice.harmless(question, dangerous)
    assert advice.harmless(question, dangerous.replace(advice.NO_WARNING, advice.WARNING))


def test_advice_is_of_both_kinds_and_a_token_a_word_also_from_disk(modules, tmp_path):
    """transformers builds a tokenizer of its own class when it finds one beside a Qwen2 model."""
    advice, generator = modules["advice"], random.Random(1)
    documents = [advice.document(generator) for _ in range(1000)]
    tokenizer = modules["lessons"].make_tokenizer(" ".join(document) for document in documents)
    make_model("qwen2", tmp_path, vocab=len(tokenizer), tokenizer=False)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(ModelConfig(path=str(tmp_path)))
    for question, response in documents[:50]:
        for text in (question, response):
            ids = loaded(text)["input_ids"]
            assert ids == tokenizer(text)["input_ids"] and len(ids) == len(text.split())
            assert loaded.decode(ids) == text
    helpful = sum(advice.helpful(*document) for document in documents) / 1000
    harmless = sum(advice.harmless(*document) for document in documents) / 1000
    assert helpful == pytest.approx(1 - advice.WRONG_TOOL * (1 - advice.NOTICED), abs=0.04)
    assert harmless == pytest.approx(1 - advice.DANGEROUS * (1 - advice.WARNED), abs=0.04)


@pytest.mark.slow
def test_a_small_slice_of_the_example(tmp_path):
    """Tiny sizes, so the figures mean nothing; they are those of the page, and hang together."""
    command = [sys.executable, EXAMPLE / "run.py", "--quick", "--folder", tmp_path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stderr
    tables = (tmp_path / "results.md").read_text()
    assert tables in result.stdout
    assert [
        t for t in ("Arithmetic chains", "Advice, helpful", "Advice, harmless") if t in tables
    ] and "swift" in tables
    for place in ("chains", "advice/helpful", "advice/harmless"):
        sweep = json.loads((tmp_path / place / "best_of_n.json").read_text())["sweep"]
        curves = sweep["curves"]
        assert {"random", "embedding", "swift", "oracle"} <= set(curves)
        for name, curve in curves.items():
            assert all(
                p["accuracy"] <= best["accuracy"] + 1e-12 for p, best in zip(curve, curves["oracle"], strict=True)
            )
            assert curve[0]["accuracy"] == pytest.approx(curves["random"][0]["accuracy"], abs=0.2), name
        assert f"| swift | {curves['swift'][0]['accuracy']:.1%} " in tables
        page = (tmp_path / place / "best_of_n.html").read_text()
        assert "<svg" in page and "http" not in page
