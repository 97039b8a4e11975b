"""The fork server imports this last: what all forks have from their start.

They draw no pictures, and a Trainer, which collects garbage, does not search all that they inherit.
"""

import gc

from helpers.commands import draw_no_pictures

draw_no_pictures()
gc.freeze()
