"""Reward fine-tuning (GRPO): the model draws, judges score, and what scored above its group's mean
becomes likelier.

    reward_options.py  the settings of a run, without torch
    reward_recipes.py  the named settings
    reward_prompts.py  what is drawn: GenEval's grammar without the benchmark's prompts, or a file
    rewards.py         the judges, each a function of images and metadata
    panel.py           asks them, and stops a run whose reward says nothing
    policy.py          log-probabilities of what was drawn, advantages, the loss, the start's copy
    reward_run.py      the run: supervised training's, with another step
    reward_watch.py    what is not rewarded: other benchmarks, diversity, what text is answered with
    reward_check.py    --check

Distribution that is drawn = distribution that is scored = distribution that is trained: unguided at
temperature 1 without filters, unless guidance or temperature are asked for, which then stand in all
three places.
"""
