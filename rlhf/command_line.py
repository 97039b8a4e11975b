"""The Hydra entry point that the three stages share: overrides in, one clear message out when "
"they are wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from rlhf.config import (
    CONF_DIR,
    STAGES,
    InputError,
    StageConfig,
    check,
    explain,
    schema,
)

OWN_WORK = ("recipe", "model=", "model.path=", "model.config=", "dataset=", "dataset.path=")


def hydra_main(stage: str, run: Callable[[Any], Any]) -> None:
    """Run one stage from the command line.

    With neither a model nor a data set nor a recipe on the command line, the stage runs the embedded
    demo (`recipe=demo`). An `InputError` or a Hydra complaint becomes one message and exit status
    2; anything else keeps its traceback.

    Args:
        stage: key of `STAGES`; also the name of the YAML file.
        run: called with the resolved dataclass.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand exceptions to us instead of printing and exiting
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config_class = STAGES[stage]
    ConfigStore.instance().store(name=f"{stage}_schema", node=schema(config_class))
    if not any(o.lstrip("+~").startswith(OWN_WORK) for o in sys.argv[1:]):
        sys.argv.append("recipe=demo")
    # recipe=null is the default, but Hydra refuses null for a group on the command line
    sys.argv = [argument for argument in sys.argv if argument != "recipe=null"]

    @hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=stage)
    def task(node: Any) -> None:
        try:
            config = OmegaConf.to_object(node)
            assert isinstance(config, config_class)
            _name_sweep_run(config)
            check(config)
            run(config)
        except InputError as error:
            _exit(str(error))

    try:
        task()
    except (HydraException, OmegaConfBaseException) as error:
        _exit(explain(error, config_class))
    except KeyboardInterrupt:
        _exit("interrupted; nothing that was saved is lost. Continue with resume=true", status=130)


def _name_sweep_run(config: StageConfig) -> None:
    """Give each job of a sweep (`-m`) its own run name, unless the sweep names the runs itself."""
    from hydra.core.hydra_config import HydraConfig

    job = HydraConfig.get().job
    swept = [o for o in HydraConfig.get().overrides.task if not o.startswith("recipe=demo")]
    if str(HydraConfig.get().mode).endswith("MULTIRUN") and not any(
        o.startswith("run_name=") for o in swept
    ):
        config.run_name = (
            "-".join([config.run_name, *(o.replace("/", "_") for o in swept)])
            if swept
            else f"run-{job.num}"
        )


def _exit(message: str, status: int = 2) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)
