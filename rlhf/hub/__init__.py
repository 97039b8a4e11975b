"""From a Hub id or a path to files on this disk that are safe to load.

`snapshot` turns a Hub id into the directory of its snapshot, reads JSON files and tensor names, and
calls `from_pretrained`. `source` says what a directory holds and refuses pickles and missing files.
"""

from rlhf.hub.snapshot import (
    call_loader,
    is_hub_id,
    local_directory,
    one_line,
    read_json,
    tensor_names,
)
from rlhf.hub.source import (
    ADAPTER_WEIGHTS,
    Misfits,
    Source,
    config_directory,
    find_source,
    tokenizer_directory,
    weight_files,
)
