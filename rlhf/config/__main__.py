"""`make conf`: write the YAML files in `conf/` that show every knob."""

from rlhf.config.conf_files import conf_files
from rlhf.config.paths import CONF_DIR

for name, text in conf_files().items():
    (CONF_DIR / name).write_text(text, encoding="utf-8")
