"""Tools that make, check and measure data files: `megatron-srft data distil | act | filter | duplicates | statistics`.

    distil, act     long demonstrations, sampled and verified; harvest is the loop of both, selection what is kept,
                    output the file that can be gone on with, sources the models that are asked, actions the state
                    machine of act
    filter          rows whose reference answer is of use
    duplicates      rows that nearly repeat another; minhash finds the candidates
    statistics      lengths, reflection, repetition

A folder on the path of neither training nor evaluation.
"""
