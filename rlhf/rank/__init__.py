"""People rank answers in a web page; `python -m rlhf.rank` is the command.

    tasks        a file of prompts -> tasks in a store
    store        tasks, queues of annotators, judgements: one SQLite file
    app, server  the web page over a store; `page/` has its files, `render` its texts
    ranked_rows  judgements -> rankings.jsonl and demonstrations
    summary      agreement, and which policy wins; `agreement` has the formulas

Other commands use the parts: add tasks to a `Store`, `serve` it, read `store.judgements()`.
Serving needs the extra `web`; a store needs nothing.
"""

from rlhf.rank.server import bound, check_server, serve
from rlhf.rank.store import Judgement, Refused, Showing, Store, Task
from rlhf.rank.summary import make_report, policy_wins, report_text
