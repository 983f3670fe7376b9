"""MinHash against exact sets, banding against its formula, and the command against a comparison of all pairs."""

import tracemalloc

import numpy as np
import pytest
from curation_files import counts_of, rows_of

from megatron_srft.curation import minhash


def exact(first: str, second: str, size: int = 3) -> float:
    """Jaccard of sets of word tuples; for texts in lower case without punctuation."""
    sets = [
        {tuple(text.split()[i : i + size]) for i in range(len(text.split()) - size + 1)} for text in (first, second)
    ]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def family(seed: int, texts: int, words: int = 40) -> list[str]:
    """Random texts, each followed by copies with ever more words replaced."""
    numbers = np.random.default_rng(seed)
    vocabulary = [f"w{i}" for i in range(2000)]
    out = []
    for _ in range(texts):
        base = list(numbers.choice(vocabulary, words))
        for changes in (0, 1, 2, 3, 5, 8):
            copy = list(base)
            for place in numbers.choice(words, changes, replace=False):
                copy[place] = str(numbers.choice(vocabulary))
            out.append(" ".join(copy))
    return out


def test_jaccard_is_that_of_the_sets():
    texts = family(0, 4)
    sets = [minhash.shingles(text, 3) for text in texts]
    for i in range(len(texts)):
        for j in range(len(texts)):
            assert minhash.jaccard(sets[i], sets[j]) == pytest.approx(exact(texts[i], texts[j]))


def test_jaccard_by_hand():
    # abc bcd cde | bcd cde def: 2 common of 4
    assert minhash.jaccard(minhash.shingles("A, b c. d E!", 3), minhash.shingles("b c d e f", 3)) == 0.5
    assert minhash.jaccard(minhash.shingles("a b", 3), minhash.shingles("A B?", 3)) == 1.0  # shorter than a 3-gram
    assert len(minhash.shingles("?!", 3)) == 0 and len(minhash.shingles("a a a a a", 3)) == 1
    assert minhash.jaccard(minhash.shingles("", 3), minhash.shingles("", 3)) == 0.0


def test_a_signature_estimates_the_similarity():
    texts = family(1, 10)
    sets = [minhash.shingles(text, 3) for text in texts]
    rows = minhash.signatures(sets, 2048, seed=0)
    pairs = [(i, j) for start in range(0, len(texts), 6) for i in range(start, start + 6) for j in range(start, i)]
    differences = [np.mean(rows[i] == rows[j]) - minhash.jaccard(sets[i], sets[j]) for i, j in pairs]
    assert np.abs(differences).max() < 5 * 0.5 / np.sqrt(2048)  # five standard deviations of a share of 2048
    assert abs(np.mean(differences)) < 0.01


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.8, 0.95, 1.0])
def test_bands_miss_few_pairs_at_the_threshold_and_longer_ones_more(threshold):
    bands, rows = minhash.banding(threshold, 128)
    assert bands * rows <= 128
    assert (1 - threshold**rows) ** bands <= 0.01
    assert threshold == 1.0 or (1 - threshold ** (rows + 1)) ** (128 // (rows + 1)) > 0.01


def test_bands_of_one_where_no_length_is_good_enough():
    assert minhash.banding(0.01, 128) == (128, 1)


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_what_is_kept_is_what_a_comparison_of_all_pairs_keeps(threshold):
    texts = family(2, 30)
    sets = [minhash.shingles(text, 3) for text in texts]
    kept, expected = [], []
    for i, values in enumerate(sets):
        found = [(j, minhash.jaccard(sets[j], values)) for j in kept if minhash.jaccard(sets[j], values) >= threshold]
        kept += [] if found else [i]
        expected.append(found)
    assert list(minhash.repeats(sets, threshold, 128, seed=0)) == expected
    assert 0 < len(kept) < len(texts)


BENCHMARK = [{"problem": "A train goes from Rome to Paris in nine hours."}]
ROWS = [
    {"problem": "Ann has three red apples and two pears.", "answer": "5", "extra": [1, {"a": None}]},
    {"problem": "a train goes from rome, to paris, in nine hours", "answer": "9"},
    {"problem": "ann has THREE red apples, and two pears", "answer": "5"},
    {"problem": "Ann has three red apples and two plums.", "answer": "5"},
    {"problem": "??", "answer": "1"},
    {"problem": "!", "answer": "1"},
]


def test_the_command(write, data, tmp_path):
    rows, benchmark = write("rows.jsonl", ROWS), write("benchmark.jsonl", BENCHMARK)
    output, pairs = tmp_path / "out.jsonl", tmp_path / "pairs.jsonl"
    arguments = ("duplicates", rows, "--output", output, "--pairs", pairs, "--against", benchmark)
    code, out, _ = data(*arguments)
    assert code == 0
    assert rows_of(output) == [ROWS[0], ROWS[4], ROWS[5]]  # every field as it was
    assert counts_of(out) == dict(rows=6, against=1, wordless=2, repeat_benchmark=1, repeat_row=2, kept=3)
    # ... three red apples and two pears | plums: 5 of 7 three-word runs are common
    assert rows_of(pairs) == [
        {"row": f"{rows}:2", "repeats": f"{benchmark}:1", "jaccard": 1.0},
        {"row": f"{rows}:3", "repeats": f"{rows}:1", "jaccard": 1.0},
        {"row": f"{rows}:4", "repeats": f"{rows}:1", "jaccard": 5 / 7},
    ]
    code, _, error = data(*arguments)
    assert code == 2 and "is already there" in error
    code, out, _ = data(*arguments, "--overwrite", "--threshold", 0.72)
    assert code == 0 and counts_of(out)["repeat_row"] == 1 and len(rows_of(output)) == 4


def test_a_single_row_and_one_without_words(write, data, tmp_path):
    for rows in (ROWS[:1], ROWS[4:5]):
        output = tmp_path / "out.jsonl"
        code, out, _ = data("duplicates", write("rows.jsonl", rows), "--output", output, "--overwrite")
        assert code == 0 and rows_of(output) == rows and counts_of(out)["kept"] == 1


def test_another_field(write, data, tmp_path):
    rows, output = write("rows.jsonl", ROWS), tmp_path / "out.jsonl"
    code, out, _ = data("duplicates", rows, "--output", output, "--field", "answer")
    assert code == 0 and [row["answer"] for row in rows_of(output)] == ["5", "9", "1"]
    code, _, error = data("duplicates", rows, "--output", output, "--field", "solution", "--overwrite")
    assert code == 2 and "rows.jsonl:1: no text in the field 'solution'" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threshold", "0"], "--threshold: must be a number above 0 and at most 1, not 0"),
        (["--threshold", "1.01"], "--threshold: must be a number above 0 and at most 1, not 1.01"),
        (["--shingle", "0"], "--shingle: must be a whole number of at least 1"),
        (["--permutations", "x"], "--permutations: must be a whole number of at least 1 and at most 4096, not x"),
        (["--against", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--pairs", "pairs.txt"], "pairs.txt: the output is written as JSONL"),
    ],
)
def test_wrong_options(write, data, tmp_path, arguments, message):
    output = tmp_path / "out.jsonl"
    code, _, error = data("duplicates", write("rows.jsonl", ROWS), "--output", output, *arguments)
    assert code == 2 and message in error and not output.exists()


def test_nothing_left_is_no_empty_file(write, data, tmp_path):
    output = tmp_path / "out.jsonl"
    rows = write("rows.jsonl", BENCHMARK)
    code, _, error = data("duplicates", rows, "--output", output, "--against", write("b.jsonl", BENCHMARK))
    assert code == 1 and "every row repeats a row of --against" in error and not output.exists()


def test_what_is_read_is_not_written_over(write, data, tmp_path):
    """Nor two outputs into one file; the rows are read a second time while they are written."""
    rows, output = write("rows.jsonl", ROWS), tmp_path / "out.jsonl"
    for arguments in ((rows, "--output", rows), (rows, "--output", output, "--pairs", output)):
        code, _, error = data("duplicates", *arguments, "--overwrite")
        assert code == 2 and "is named twice; what is read" in error
    code, _, error = data("duplicates", rows, rows, "--output", output)
    assert code == 2 and "rows.jsonl is named twice" in error
    assert rows_of(rows) == ROWS and not output.exists()


EXACT = ("--reward", "exact", "--answer-after", "#")


def test_rows_are_not_kept_in_memory(data, write, tmp_path):
    """Of a file of long demonstrations a portion at most is held at a time."""
    text = {number: str(number % 10) * 30_000 for number in range(400)}
    rows = write("rows.jsonl", [{"problem": f"{n} apples", "answer": "1", "target": text[n]} for n in text])
    small, output = write("small.jsonl", [{"problem": "1", "answer": "1"}]), tmp_path / "out.jsonl"
    del text
    for tool in (("duplicates",), ("filter", *EXACT)):
        data(*tool, small, "--output", output, "--overwrite")  # so that no import counts
        tracemalloc.start()
        code, out, error = data(*tool, rows, "--output", output, "--overwrite")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert code == 0 and counts_of(out)["kept"] == 400, error
        assert peak < 5e6, f"{tool[0]}: {peak / 1e6:.0f} MB for a file of 12 MB"
