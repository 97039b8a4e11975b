"""The reward model's report: how good are its scores on held-out rankings?

When training ends, the reward stage writes three files into `final/`: `report.json`, `report.md`
and, with matplotlib (`pip install 'rlhf[plot]'`), `report.png`. PPO reads `report.json` and prints
its summary and warnings before it trains. For a reward model without a report, for other held-out
rows, or to see how far two seeds agree:

    python -m rlhf.reward.report path=runs/mine/reward/final compare=[runs/two/reward/final]

`measures` has the numbers, `verdict` the rules of the warnings, `page` what people read. Left out:
bootstrap over training runs, human agreement. The keys of `report.json` are in
docs/reward-models.md.
"""
