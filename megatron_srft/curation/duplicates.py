"""Rows that nearly repeat an earlier row, or a row of a benchmark: found by minhash.py, listed and left out.

Defaults as in "Demystifying Long Chain-of-Thought Reasoning" (arXiv 2502.03373): word 3-grams, 128 permutations,
Jaccard similarity of at least 0.5.
"""

import argparse
from collections import Counter

from megatron_srft import config as configuration
from megatron_srft.config import DataConfig
from megatron_srft.curation import minhash, settings
from megatron_srft.curation.output import check_output
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
    for path in filter(None, (options.output, options.pairs)):
        check_output(path, mode)
    data = configuration.load(options.config).data if options.config is not None else DataConfig()
    benchmark, rows = read_all(options.against), read_all(options.files)
    everything = benchmark + rows
    sets = [minhash.shingles(text_of(row, options.field, data), options.shingle) for row in everything]
    found = minhash.repeats(sets, options.threshold, options.permutations, options.seed, fixed=len(benchmark))
    counts, kept, pairs = Counter(rows=len(rows), against=len(benchmark)), [], []
    for place, matches in enumerate(found):
        if place < len(benchmark):
            continue
        row = everything[place]
        counts["wordless"] += not len(sets[place])
        if not matches:
            kept.append((row.fields, row.where))
            continue
        counts["repeat_benchmark" if matches[0][0] < len(benchmark) else "repeat_row"] += 1
        pairs += [({"row": row.where, "repeats": everything[o].where, "jaccard": j}, "") for o, j in matches]
    counts["kept"] = len(kept)
    if not kept:
        raise CurationError("every row repeats a row of --against; nothing is written")
    write_rows(options.output, kept, mode)
    if options.pairs is not None:
        write_rows(options.pairs, pairs, mode)
    print(table(counts, COUNTS))
    return 0
