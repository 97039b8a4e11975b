"""From a Hub id or a path to files on this disk that are safe to load.

`snapshot` turns a Hub id into the directory of its snapshot, `source` tells what a directory holds
and refuses pickles and damaged files.
"""

from rlhf.hub.snapshot import is_hub_id, local_directory
from rlhf.hub.source import find_source
