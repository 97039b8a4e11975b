"""People rank answers in a web page; `python -m rlhf.rank` is the command.

    tasks        a file of prompts -> tasks in a store
    store        tasks, queues of annotators, judgements: one SQLite file
    app, serving the web page over a store; `page/` has its files
    by_scorer    a judge as one of the annotators
    ranked_rows  judgements -> rankings.jsonl and demonstrations
    summary      agreement, and which policy wins; `agreement` has the formulas

Other commands use the parts: add tasks to a `Store`, `serve` it, read `store.judgements()`.
Serving needs the extra `web`; a store needs nothing.
"""

from rlhf.rank.serving import serve
from rlhf.rank.store import Judgement, Showing, Store, Task
from rlhf.rank.summary import make_report, policy_wins, report_text
from rlhf.web.server import Refused, bound, check_server
