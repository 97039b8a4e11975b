"""`python -m rlhf.diagnose`: which stage of a run is the weakest link, and where should PPO stop?

    found = diagnose(DiagnoseOptions(run_name="mine", gold="my_module.my_score"))

`options` finds the run's models and held-out rows, `answers` lets the policies answer and scores
the answers, `weakest_link` turns scores into `diagnosis.json`, `remedies` names commands, `show`
prints and draws. The formulas are in `rlhf.functional.stage_gains`.
"""

from rlhf.diagnose.diagnosis import diagnose
from rlhf.diagnose.options import DiagnoseOptions
