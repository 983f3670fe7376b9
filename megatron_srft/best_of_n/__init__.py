"""Best-of-N: which of a question's candidates each rule would pick, how often that one is right, and what it costs.

candidates   rollout dumps and JSONL files to groups with verdicts and external scores
fusion       two or more scores put together
sweep        accuracy of every rule over N, with intervals; within-question AUROC
cost         seconds and FLOPs per candidate of a head and of a text reward model
page         the table, the page and the figures
"""
