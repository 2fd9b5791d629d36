"""Reward fine-tuning (GRPO): the model draws, judges score, and images that scored above their
group's mean become likelier.

    reward_options.py  settings of a run; imports no torch
    reward_recipes.py  named settings
    reward_prompts.py  prompts: GenEval's grammar without the benchmark's own prompts, or a file
    rewards.py         the judges, each a function of images and metadata
    panel.py           calls the judges, and stops the run if a reward fails or never varies
    policy.py          log-probabilities of drawn images, advantages, loss, the copy of the start
    reward_run.py      the run: that of supervised training, with another step
    reward_watch.py    what is not rewarded: other benchmarks, diversity, how text is continued
    reward_check.py    --check

Images are drawn, scored and trained with one distribution: unguided, temperature 1, no filters. If
guidance or another temperature is configured, it applies in all three places.
"""
