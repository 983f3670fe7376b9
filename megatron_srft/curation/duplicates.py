"""Rows that nearly repeat an earlier row, or a row of a benchmark: found by minhash.py, listed and left out.

Defaults as in "Demystifying Long Chain-of-Thought Reasoning" (arXiv 2502.03373): word 3-grams, 128 permutations,
Jaccard similarity of at least 0.5. The files are read twice: the n-grams of all rows are in memory, the rows are not.
"""

import argparse
from collections import Counter
from collections.abc import Sequence

import numpy as np

from megatron_srft import config as configuration
from megatron_srft.config import DataConfig
from megatron_srft.curation import minhash, settings
from megatron_srft.curation.output import check_outputs
from megatron_srft.curation.rows import read_all, text_of, write_rows
from megatron_srft.curation.selection import table
from megatron_srft.curation.sources import CurationError

COUNTS = {
    "rows": "read",
    "against": "rows of the files they were compared with",
    "wordless": "without a word to compare; they are kept",
    "repeat_benchmark": "left out: they repeat a row of --against",
    "repeat_row": "left out: they repeat an earlier row",
    "kept": "written",
}


def main(options: argparse.Namespace) -> int:
    """`megatron-srft data duplicates`: print the counts; see data_command.py for the options."""
    mode = settings.mode(options)
    check_outputs([options.output, options.pairs], mode, [*options.files, *options.against])
    data = configuration.load(options.config).data if options.config is not None else DataConfig()
    benchmark, benchmark_places = _shingles(options.against, options, data)
    own, own_places = _shingles(options.files, options, data)
    repeats = minhash.repeats(
        benchmark + own, options.threshold, options.permutations, options.seed, fixed=len(benchmark)
    )
    found = list(repeats)[len(benchmark) :]
    counts = Counter(rows=len(own), against=len(benchmark), wordless=sum(not len(values) for values in own))
    counts.update(_fate(matches, len(benchmark)) for matches in found)
    if not counts["kept"]:
        raise CurationError("every row repeats a row of --against; nothing is written")
    rows = zip(read_all(options.files), found, strict=True)
    write_rows(options.output, ((row.fields, row.where) for row, matches in rows if not matches), mode)
    if options.pairs is not None:
        places = benchmark_places + own_places
        pairs = ((where, *match) for where, matches in zip(own_places, found, strict=True) for match in matches)
        listed = (({"row": where, "repeats": places[other], "jaccard": j}, where) for where, other, j in pairs)
        write_rows(options.pairs, listed, mode)
    print(table(counts, COUNTS))
    return 0


def _shingles(
    files: Sequence[str], options: argparse.Namespace, data: DataConfig
) -> tuple[list[np.ndarray], list[str]]:
    """N-grams and place of every row; the rows themselves are not kept."""
    sets, places = [], []
    for row in read_all(files):
        sets.append(minhash.shingles(text_of(row, options.field, data), options.shingle))
        places.append(row.where)
    return sets, places


def _fate(matches: list[tuple[int, float]], benchmark: int) -> str:
    """The count under which a row falls; rows of the benchmark have the first `benchmark` numbers."""
    if not matches:
        return "kept"
    return "repeat_benchmark" if matches[0][0] < benchmark else "repeat_row"
